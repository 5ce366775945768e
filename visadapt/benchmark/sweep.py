"""Many cells of a table: what is stored is not run again, what fails is reported, what is interrupted goes on."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from .. import __version__, config
from ..errors import InputError, counted
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
        return {line["config_hash"] for line in self._lines() if line["version"] == __version__}

    def other_versions(self) -> int:
        """How many results other versions have left."""
        return sum(line["version"] != __version__ for line in self._lines())

    def _lines(self) -> Iterator[dict[str, Any]]:
        return (line for _, line in read_lines(self.path, ("config_hash", "version")))

    def append(self, line: dict[str, Any]) -> None:
        """Add a line, whole or not at all; a file without its last line end gets it first.

        Raises:
            OSError: the disk takes no more; the file is as it was.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            text = (b"" if file.read(1) in (b"", b"\n") else b"\n") + json.dumps(line).encode() + b"\n"
            try:
                if file.write(text) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise


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
