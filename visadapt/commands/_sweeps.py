"""`visadapt bench offline | vtab | fgvc | fewshot`: many methods on many tasks under many seeds."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import InputError, counted
from ._arguments import positive

SUITES = ("offline", "vtab", "fgvc", "fewshot")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suites = ", ".join(SUITES)
    group = parser.add_argument_group(f"comparisons ({suites})")
    group.add_argument("--adapters", nargs="+", default=[], metavar="NAME", help="methods; all by default")
    group.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="tasks; all of the suite by default")
    group.add_argument("--weights", help="of the backbone: a file, 'timm', or dinov2_vits14_focus")
    group.add_argument("--epochs", type=positive, help="of training; the suite's own by default")
    group.add_argument("--workers", type=positive, default=1, help="runs at a time")
    group.add_argument(
        "--threads", type=positive, default=1, help="of each run; sums, and with them figures, depend on it"
    )
    group.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster: its address, 'auto', or 'local'")


def run(args: argparse.Namespace) -> int:
    from ..benchmark.cells import Cell
    from ..benchmark.recipes import methods, recipe
    from ..benchmark.report import write_report
    from ..benchmark.results import RESULTS
    from ..benchmark.suites import suite
    from ..benchmark.sweep import Store, sweep
    from ..benchmark.watch import Watch

    chosen = suite(
        args.what, model=args.model, weights=args.weights, size=args.size, epochs=args.epochs, batch=args.batch
    )
    names = list(dict.fromkeys(args.adapters or methods()))
    for name in names:
        recipe(name)
    tasks = _on_disk(chosen, chosen.chosen(args.tasks))
    cells = [Cell(chosen, task, name, seed) for seed in args.seeds for task in tasks for name in names]
    failed = sweep(cells, _pool(args), Store(RESULTS / f"{args.what}.jsonl"), Path(args.work_dir) / args.what, Watch())
    for cell, why in failed:
        print(f"failed: {cell.name}: {why}", file=sys.stderr)
    for path in write_report():
        print(f"wrote {path}")
    return 1 if failed else 0


def _pool(args: argparse.Namespace):
    """Where cells run."""
    if args.ray is not None:
        from ..benchmark.ray_pool import RayPool

        return RayPool(args.ray, args.workers, args.threads)
    from ..benchmark.local_pool import LocalPool

    return LocalPool(args.workers, args.threads)


def _on_disk(chosen, tasks: list) -> list:
    """The tasks whose images are there; says of the others what is missing.

    Raises:
        InputError: there are none.
    """
    from ..registry import DATASETS

    found, missing = [], []
    for task in tasks:
        try:
            for split in ("trainval", "test"):
                DATASETS.build(task.data[split])
            found.append(task)
        except InputError as error:
            missing.append(f"{task.name}: {error}")
    if not found:
        more = "" if len(missing) == 1 else f" (and {len(missing) - 1} more tasks are missing)"
        raise InputError(f"no task of {chosen.name} is on disk; see {chosen.about}; {missing[0]}{more}")
    if missing:
        print(f"{counted(len(missing), 'task')} of {len(tasks)} left out, see {chosen.about}:", file=sys.stderr)
        for line in missing:
            print(f"  {line}", file=sys.stderr)
    return found
