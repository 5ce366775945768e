"""Many cells of a table: what is stored is not run again, what fails is reported, what is interrupted goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from .. import config
from ..errors import counted
from .cells import Cell
from .results import RESULTS, Store
from .watch import Watch

ATTEMPTS = 2
"""Of a cell whose worker is killed; one that fails by itself would fail again."""


@dataclass(frozen=True)
class Outcome:
    """How a cell ended.

    Attributes:
        line: its result, None where there is none.
        error: why there is none.
        killed: the worker died; the cell itself may be sound.
    """

    line: dict[str, Any] | None = None
    error: str = ""
    killed: bool = False


class Pool(Protocol):
    """Runs cells, several at a time."""

    workers: int

    def submit(self, cell: Cell, folder: Path) -> None:
        """Begin with a cell in a folder of its own; at most `workers` at a time."""

    def wait(self, seconds: float) -> list[tuple[Cell, Outcome]]:
        """Cells that have ended since the last call; empty where none did within the time."""

    def close(self) -> None:
        """Stop what runs."""


def sweep(
    cells: Sequence[Cell], pool: Pool, store: Store, work_dir: Path, watch: Watch, results: Path = RESULTS
) -> list[tuple[Cell, str]]:
    """Run all cells that are not stored yet and store each as it ends.

    Args:
        cells: in the order in which they begin.
        pool: where they run.
        store: takes their lines.
        work_dir: every cell leaves its run in a folder named by its identity here.
        watch: is told what happens.
        results: folder that keeps the configs of finished cells.

    Returns:
        the cells that failed, each with the reason.
    """
    with store.locked():
        done = store.finished()
        waiting = [cell for key, cell in {cell.key: cell for cell in cells}.items() if key not in done]
        watch.begin(cells, waiting, pool.workers)
        if others := store.other_versions():
            watch.say(f"{counted(others, 'result')} of other versions in {store.path} left alone")
        try:
            return list(_run(waiting, pool, store, work_dir, watch, results))
        finally:
            pool.close()
            watch.end()


def _run(
    waiting: list[Cell], pool: Pool, store: Store, work_dir: Path, watch: Watch, results: Path
) -> Iterator[tuple[Cell, str]]:
    """Cells that fail."""
    running: dict[str, int] = {}  # identity -> attempt
    queue = [(cell, 1) for cell in waiting]
    while queue or running:
        while queue and len(running) < pool.workers:
            cell, attempt = queue.pop(0)
            running[cell.key] = attempt
            watch.started(cell)
            pool.submit(cell, work_dir / cell.key)
        for cell, outcome in pool.wait(1.0):
            attempt = running.pop(cell.key)
            if outcome.line is not None:
                store.append({**outcome.line, "config": str(results / cell.config_file)})
                keep_config(cell, results / cell.config_file)
                watch.finished(cell, outcome.line)
            elif outcome.killed and attempt < ATTEMPTS:
                watch.again(cell, outcome.error)
                queue.insert(0, (cell, attempt + 1))
            else:
                watch.failed(cell, outcome.error)
                yield cell, outcome.error
        watch.tick()


def keep_config(cell: Cell, path: Path) -> None:
    """Write the config of a method on a task, with seed 0, into the folder of results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    config.dump(replace(cell, seed=0).config, path)
