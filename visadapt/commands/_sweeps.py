"""`visadapt bench offline | vtab | fgvc | fewshot`: many methods on many tasks under many seeds.

With --search the learning rate, the weight decay and the scale of every method are chosen per task on validation
images first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
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
    group.add_argument(
        "--search", type=positive, metavar="N", help="choose lr, decay and scale of each method per task by N trials"
    )


def run(args: argparse.Namespace) -> int:
    from ..benchmark.cells import Cell, cell_config
    from ..benchmark.recipes import methods, recipe
    from ..benchmark.report import write_report
    from ..benchmark.results import RESULTS
    from ..benchmark.search import share
    from ..benchmark.suites import SPLITS, suite
    from ..benchmark.sweep import Store, sweep
    from ..benchmark.watch import Watch
    from ..registry import BACKBONES

    chosen = suite(
        args.what, model=args.model, weights=args.weights, size=args.size, epochs=args.epochs, batch=args.batch
    )
    names = list(dict.fromkeys(args.adapters or methods()))
    for name in names:
        recipe(name)
    tasks = _on_disk(chosen, chosen.chosen(args.tasks), SPLITS if args.search else ("trainval", "test"))
    BACKBONES.build(cell_config(Cell(chosen, tasks[0], names[0], 0))["model"]["backbone"])  # or all cells would fail
    pool, store, work_dir = _pool(args), Store(RESULTS / f"{args.what}.jsonl"), Path(args.work_dir) / args.what
    places = [(task, name) for task in tasks for name in names]
    values = _searched(args, chosen, places, pool) if args.search else [{}] * len(places)
    rows = [(place, found) for place, found in zip(places, values) if found is not None]
    cells = [Cell(chosen, *place, seed, found) for seed in args.seeds for place, found in rows]
    share(cells, store)
    failed = sweep(cells, pool, store, work_dir, Watch())
    for cell, why in failed:
        print(f"failed: {cell.name}: {why}", file=sys.stderr)
    for path in write_report():
        print(f"wrote {path}")
    return 1 if failed or None in values else 0


def _searched(args: argparse.Namespace, chosen, places: list, pool) -> list[dict | None]:
    """Hyperparameters of each (task, method), None where every trial failed."""
    from ..benchmark.results import RESULTS
    from ..benchmark.search import Study, search
    from ..benchmark.sweep import Store
    from ..benchmark.watch import Watch

    studies = [Study(chosen, task, name, args.seeds[0]) for task, name in places]
    store, work_dir = Store(RESULTS / f"{args.what}_search.jsonl"), Path(args.work_dir) / f"{args.what}_search"
    search(studies, args.search, pool, store, work_dir, Watch())
    for study in studies:
        print(study)
    print("final runs with what is chosen, on trainval and test", flush=True)
    return [study.best and study.best[0].hyperparameters for study in studies]


def _pool(args: argparse.Namespace):
    """Where cells run."""
    if args.ray is not None:
        from ..benchmark.ray_pool import RayPool

        return RayPool(args.ray, args.workers, args.threads)
    from ..benchmark.local_pool import LocalPool

    return LocalPool(args.workers, args.threads)


def _on_disk(chosen, tasks: list, splits: Sequence[str]) -> list:
    """The tasks whose images of these splits are there; says of the others what is missing.

    Raises:
        InputError: there are none.
    """
    from ..registry import DATASETS

    found, missing = [], []
    for task in tasks:
        try:
            for split in splits:
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
