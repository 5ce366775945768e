"""Check a config without training: every argument, the model, the datasets."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a config file")
    parser.add_argument("overrides", nargs="*", help="a.b.c=value, for keys that the config has")


def run(args: argparse.Namespace) -> int:
    from ..config import load
    from ..registry import DATASETS, TASKS

    cfg = load(args.config, args.overrides)
    for part in ("train", "val", "test"):
        loader = cfg.get(f"{part}_dataloader")
        if loader is not None:
            print(f"{part:<6}{len(DATASETS.build(loader['dataset'])):>9,} samples", flush=True)
    task = TASKS.build(cfg.model)
    print(task.adapted.trainable_report(task.heads))
    print(f"OK    {args.config}")
    return 0
