"""Check a config without training: every argument, the model, the datasets."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a config file")
    parser.add_argument("overrides", nargs="*", default=[], help="a.b.c=value, for keys that the config has")


def run(args: argparse.Namespace) -> int:
    from mmengine.optim import build_optim_wrapper
    from mmengine.runner import Runner

    from ..config import load
    from ..engine import check_classes
    from ..errors import refusals
    from ..registry import TASKS

    cfg = load(args.config, args.overrides)
    datasets = {}
    for part in (f"{name}_dataloader" for name in ("train", "val", "test")):
        if cfg.get(part) is not None:
            with refusals(part):
                datasets[part] = Runner.build_dataloader(cfg[part], seed=0).dataset
            print(f"{part.partition('_')[0]:<6}{len(datasets[part]):>9,} samples", flush=True)
    task = TASKS.build(cfg.model)
    for part, dataset in datasets.items():
        check_classes(task, dataset, part)
    print(task.adapted.trainable_report(task.heads))
    if cfg.get("optim_wrapper") is not None:
        with refusals("optim_wrapper"):
            build_optim_wrapper(task, cfg.optim_wrapper)
    print(f"OK    {args.config}")
    return 0
