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
OPTIONS = ("adapters", "tasks", "weights", "epochs", "workers", "threads", "ray", "search")
"""Of comparisons alone."""

WORK_DIR = "work_dirs/bench"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suites = ", ".join(SUITES)
    group = parser.add_argument_group(f"comparisons ({suites})")
    group.add_argument("--adapters", nargs="+", metavar="NAME", help="methods; all by default")
    group.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks; all of the suite by default")
    group.add_argument("--weights", help="of the backbone: a file, 'timm', or dinov2_vits14_focus")
    group.add_argument("--epochs", type=positive, help="of training; the suite's own by default")
    group.add_argument("--workers", type=positive, help="runs at a time; 1 by default")
    group.add_argument(
        "--threads", type=positive, help="of each run, 1 by default; sums, and with them figures, depend on it"
    )
    group.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster: its address, 'auto', or 'local'")
    group.add_argument(
        "--search", type=positive, metavar="N", help="choose lr, decay and scale of each method per task by N trials"
    )


def seeds(args: argparse.Namespace) -> list[int]:
    """Each seed once; those of the published draws where few shots are drawn by them."""
    return list(dict.fromkeys(args.seeds or ([1, 2, 3] if args.what == "fewshot" else [0, 1, 2])))


def run(args: argparse.Namespace) -> int:
    from ..benchmark.cells import Cell, cell_config
    from ..benchmark.recipes import methods, recipe
    from ..benchmark.report import write_report
    from ..benchmark.results import RESULTS, Store
    from ..benchmark.search import share
    from ..benchmark.suites import SPLITS, suite
    from ..benchmark.sweep import sweep
    from ..benchmark.watch import Watch
    from ..registry import BACKBONES

    chosen = suite(
        args.what, model=args.model, weights=args.weights, size=args.size, epochs=args.epochs, batch=args.batch
    )
    names = list(dict.fromkeys(args.adapters or methods()))
    for name in names:
        recipe(name)
    splits = SPLITS if args.search else ("trainval", "test")
    tasks, missing = _on_disk(chosen, chosen.chosen(args.tasks or ()), splits, seeds(args))
    BACKBONES.build(cell_config(Cell(chosen, tasks[0], names[0], 0))["model"]["backbone"])  # or all cells would fail
    pool, store = _pool(args), Store(RESULTS / f"{args.what}.jsonl")
    places = [(task, name) for task in tasks for name in names]
    values = _searched(args, chosen, places, pool) if args.search else [{}] * len(places)
    rows = [(place, found) for place, found in zip(places, values) if found is not None]
    cells = [Cell(chosen, *place, seed, found) for seed in seeds(args) for place, found in rows]
    share(cells, store)
    failed = sweep(cells, pool, store, _folder(args, args.what), Watch())
    if store.finished():
        for path in write_report():
            print(f"wrote {path}", flush=True)
    lines = [f"failed: {cell.name}: {why}" for cell, why in failed]
    if args.tasks:  # those that were asked for by name
        lines += [f"not run: {line}" for line in missing]
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines or None in values else 0


def _searched(args: argparse.Namespace, chosen, places: list, pool) -> list[dict | None]:
    """Hyperparameters of each (task, method), None where every trial failed."""
    from ..benchmark.results import RESULTS, Store
    from ..benchmark.search import Study, search
    from ..benchmark.watch import Watch

    studies = [Study(chosen, task, name, seeds(args)[0]) for task, name in places]
    which = f"{args.what}_search"
    watch = Watch(later=len(places) * len(seeds(args)))
    search(studies, args.search, pool, Store(RESULTS / f"{which}.jsonl"), _folder(args, which), watch)
    for study in studies:
        print(study)
    print("final runs with what is chosen, on trainval and test", flush=True)
    return [study.best and study.best[0].hyperparameters for study in studies]


def _folder(args: argparse.Namespace, name: str) -> Path:
    return Path(args.work_dir or WORK_DIR) / name


def _pool(args: argparse.Namespace):
    """Where cells run."""
    size = (args.workers or 1, args.threads or 1)
    if args.ray is not None:
        from ..benchmark.ray_pool import RayPool

        return RayPool(args.ray, *size)
    from ..benchmark.local_pool import LocalPool

    return LocalPool(*size)


def _on_disk(chosen, tasks: list, splits: Sequence[str], draws: Sequence[int]) -> tuple[list, list[str]]:
    """The tasks whose images of these splits are there, and of the others, which is printed, what is missing.

    Args:
        chosen: the suite.
        tasks: of it.
        splits: of each task.
        draws: seeds that decide which images are used, in tasks where they do; test images are all.

    Raises:
        InputError: there are none.
    """
    from ..registry import DATASETS

    found, missing = [], []
    for task in tasks:
        try:
            for split in splits:
                drawn = task.seeded is not None and split != "test"
                for more in [{task.seeded: draw} for draw in draws] if drawn else [{}]:
                    DATASETS.build(task.data[split] | more)
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
    return found, missing
