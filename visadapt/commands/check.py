"""Check a config without training: every argument, the model, some samples of every data set, the metrics.

A few samples of the first and the last batch of every loader are read, transformed and collated, and two of them go
through the model: for a loss in training, for a prediction elsewhere. `visadapt data check` reads all samples.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

PARTS = ("train", "val", "test")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a config file")
    parser.add_argument("overrides", nargs="*", default=[], help="a.b.c=value, for keys that the config has")


def run(args: argparse.Namespace) -> int:
    from mmengine.optim import build_optim_wrapper
    from mmengine.runner import Runner

    from ..checks import check_data, doubts
    from ..config import load
    from ..errors import refusals
    from ..hooks.cache import CacheFeatures
    from ..registry import TASKS

    cfg = load(args.config, args.overrides)
    loaders = {}
    for name in PARTS:
        part = f"{name}_dataloader"
        if cfg.get(part) is not None:
            with refusals(part):
                loaders[name] = Runner.build_dataloader(cfg[part], seed=0)
            print(f"{name:<6}{len(loaders[name].dataset):>9,} samples", flush=True)
    task = TASKS.build(cfg.model)
    for name, loader in loaders.items():
        check_data(task, loader.dataset, f"{name}_dataloader")
    compare(loaders)
    if cfg.get("cache_features") and "train" in loaders:
        CacheFeatures.check(task, loaders["train"].dataset)
    print(task.adapted.trainable_report(task.heads), flush=True)
    if cfg.get("optim_wrapper") is not None:
        with refusals("optim_wrapper"):
            build_optim_wrapper(task, cfg.optim_wrapper)
    try_parts(cfg, task, loaders)
    for said in doubts(task):
        print(f"visadapt: warning: {said}", file=sys.stderr)
    print(f"OK    {args.config}")
    return 0


def compare(loaders: dict[str, Any]) -> None:
    """Refuse data sets whose classes or bands differ."""
    from ..checks import check_names, names_of

    place = "val" if "val" in loaders else "test"
    for name, loader in loaders.items():
        if name != place and place in loaders:
            wanted = names_of(loaders[place].dataset), f"{place}_dataloader"
            check_names(names_of(loader.dataset), f"{name}_dataloader", *wanted, fewer_classes=name == "train")


def try_parts(cfg: Any, task: Any, loaders: dict[str, Any]) -> None:
    """Take samples of every loader through the task and the metrics, and look whether hooks name metrics."""
    from mmengine.evaluator import Evaluator
    from mmengine.registry import HOOKS

    from ..checks import check_monitors, try_samples
    from ..errors import refusals

    given = [*cfg.get("custom_hooks", ()), *filter(None, cfg.get("default_hooks", {}).values())]
    with refusals("custom_hooks, default_hooks"):
        hooks = [HOOKS.build({k: v for k, v in hook.items() if k != "priority"}) for hook in given]
    for name, loader in loaders.items():
        if name == "train":
            try_samples(task, loader, "train_dataloader", "loss")
            continue
        with refusals(f"{name}_evaluator"):
            evaluator = Evaluator(cfg[f"{name}_evaluator"])
        evaluator.dataset_meta = getattr(loader.dataset, "metainfo", {})
        if name == "val":
            check_monitors(hooks, evaluator)
        batch, outputs = try_samples(task, loader, f"{name}_dataloader", "predict")
        if outputs is not None:
            evaluator.process(outputs, batch)
