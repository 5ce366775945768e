"""Many cells of a table: what is stored is not run again, what fails is reported, what is interrupted goes on."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from .. import __version__, config
from ..errors import InputError
from .cells import Cell
from .results import RESULTS, read_lines
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


class Store:
    """The result lines of a suite, written by one sweep at a time.

    Args:
        path: a file of JSON lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other sweeps on this machine away.

        Raises:
            InputError: another one is at work.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(f"another sweep writes {self.path}; wait for it, or stop it") from error
            yield

    def finished(self) -> set[str]:
        """Identities of the cells that this version has run.

        Raises:
            InputError: a line is no result.
        """
        lines = (line for _, line in read_lines(self.path, ("config_hash", "version")))
        return {line["config_hash"] for line in lines if line["version"] == __version__}

    def append(self, line: dict[str, Any]) -> None:
        """Add a line; a file that a crash left without its last line end is mended first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


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
        waiting = [cell for cell in cells if cell.key not in done]
        watch.begin(cells, waiting, pool.workers)
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
                store.append({**outcome.line, "config": keep_config(cell, results)})
                watch.finished(cell, outcome.line)
            elif outcome.killed and attempt < ATTEMPTS:
                watch.again(cell, outcome.error)
                queue.insert(0, (cell, attempt + 1))
            else:
                watch.failed(cell, outcome.error)
                yield cell, outcome.error
        watch.tick()


def keep_config(cell: Cell, results: Path) -> str:
    """Write the config of a method on a task, with seed 0, into the folder of results, and say where it is."""
    kept = results / cell.config_file
    kept.parent.mkdir(parents=True, exist_ok=True)
    config.dump(replace(cell, seed=0).config, kept)
    return str(kept)
