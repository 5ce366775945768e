"""`visadapt test config.py adapter.safetensors`: metrics of an adapter file on the config's test set."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..errors import InputError, counted, refusals


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="the config whose data are used")
    parser.add_argument("adapter", help="adapter file of a run")
    parser.add_argument("overrides", nargs="*", default=[], help="a.b.c=value, for keys that the config has")
    parser.add_argument("--cfg-options", nargs="+", default=[], help="the same as positional overrides")
    parser.add_argument("--out", help="folder for report.json, confusion.png and predictions.png, of class maps .html")
    parser.add_argument("--device", help="cpu or cuda; what there is by default")
    parser.add_argument("--json", action="store_true", help="print the metrics as one JSON object")


def run(args: argparse.Namespace) -> int:
    from mmengine.evaluator import Evaluator
    from mmengine.runner import Runner

    from .. import config
    from ..checks import check_data, check_names, names_of
    from ..core.io import read_manifest
    from ..predict.from_file import available
    from ..registry import TASKS
    from ..run_report import evaluate, evaluation_files

    device = available(args.device)
    cfg = config.load(args.config, [*args.overrides, *args.cfg_options])
    part = "test" if cfg.get("test_dataloader") is not None else "val"
    if cfg.get(f"{part}_dataloader") is None:
        raise InputError(f"{args.config} has neither test_dataloader nor val_dataloader")
    task = TASKS.build({k: v for k, v in cfg.model.items() if k != "adapters"})  # the file brings its own
    trained_on = read_manifest(args.adapter)
    made, here = (told.get("task", {}).get("type") for told in (trained_on, task.card()))
    if made not in (None, here):
        raise InputError(f"{args.adapter} is of a {made}, {args.config} builds a {here}; take the config of its run")
    report = task.adapted.load(args.adapter, heads=task.heads)
    with refusals(f"{part}_dataloader"):
        loader = Runner.build_dataloader(cfg[f"{part}_dataloader"], seed=0)
    check_data(task, loader.dataset, f"{part}_dataloader")
    check_names(trained_on, args.adapter, names_of(loader.dataset), f"{part}_dataloader", fewer_classes=True)
    task.to(device)
    evaluator = Evaluator(cfg[f"{part}_evaluator"])
    evaluator.dataset_meta = loader.dataset.metainfo
    metrics = evaluate(task, loader, evaluator)
    unreadable = getattr(evaluator.metrics[0], "report", {}).get("invalid", 0)
    images = len(loader.dataset) - unreadable
    if args.json:
        print(json.dumps({"images": images, "unreadable": unreadable, **metrics}))
    else:
        print(report)
        unit = getattr(loader.dataset, "unit", "image")
        print("  ".join(f"{k} {v:.4f}" for k, v in metrics.items()), f" on {counted(images, unit)} ({part} set)")
        if unreadable:
            print(f"{unreadable} unreadable {unit}s were left out")
    if args.out:
        for path in evaluation_files(task, evaluator.metrics[0], loader.dataset, Path(args.out)):
            print(f"wrote {path}")
    return 0
