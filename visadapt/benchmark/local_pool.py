"""Cells in processes of this machine, one process each."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import redirect_stdout, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import atomic
from .cells import Cell, run_cell
from .sweep import Outcome

LINE, SAID = "result.json", "sweep.log"
"""What a worker leaves in the folder of its cell: the result, and all that was printed."""

SPAWN = multiprocessing.get_context("spawn")


class LocalPool:
    """Processes that each run one cell; whatever one does, the others and the sweep go on.

    Args:
        workers: cells at a time.
        threads: of each of them. The sums of a run depend on it in the last digit, and with them its figures.
    """

    def __init__(self, workers: int, threads: int) -> None:
        self.workers, self.threads = workers, threads
        self.running: list[tuple[Cell, Path, SPAWN.Process]] = []

    def submit(self, cell: Cell, folder: Path) -> None:
        """Begin with a cell."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LINE).unlink(missing_ok=True)
        process = SPAWN.Process(target=work, args=(cell, folder, self.threads, os.getpid()))
        process.start()
        self.running.append((cell, folder, process))

    def wait(self, seconds: float) -> list[tuple[Cell, Outcome]]:
        """Cells that have ended."""
        wait([process.sentinel for *_, process in self.running], seconds)
        ended = [entry for entry in self.running if not entry[2].is_alive()]
        self.running = [entry for entry in self.running if entry not in ended]
        return [(cell, outcome(folder, process.exitcode)) for cell, folder, process in ended]

    def close(self) -> None:
        """Stop what runs."""
        for *_, process in self.running:
            process.terminate()
        for *_, process in self.running:
            process.join()
        self.running = []


def work(cell: Cell, folder: Path, threads: int, parent: int) -> None:
    """The whole life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the sweep, which stops its workers
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    line = attempt(cell, folder, threads)
    with atomic(folder / LINE) as temporary:
        temporary.write_text(json.dumps(line))


def attempt(cell: Cell, folder: Path, threads: int) -> dict[str, Any]:
    """Run a cell in this process, which is for it alone: what it prints from now on goes into the cell's folder.

    Returns:
        the result, or {"error": why there is none}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / SAID, "w", buffering=1) as log, redirect_stdout(log):
        os.dup2(log.fileno(), sys.stderr.fileno())
        try:
            return run_cell(cell, folder, threads)
        except Exception as error:
            traceback.print_exc()
            return {"error": reason(error)}


def reason(error: BaseException) -> str:
    """An exception in one line, with its class unless it is written for people."""
    kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split()) or 'no message'}"


def told(line: dict[str, Any], folder: Path) -> Outcome:
    """How a cell ended, by what `attempt` gave."""
    return Outcome(error=f"{line['error']} (see {folder / SAID})") if "error" in line else Outcome(line)


def _die_with(parent: int) -> None:
    """End this process when the sweep is gone: nobody would store what it finds, and the next sweep runs it again."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def outcome(folder: Path, code: int | None) -> Outcome:
    """What a worker that has ended left."""
    with suppress(OSError, ValueError):
        return told(json.loads((folder / LINE).read_text()), folder)
    how = f"by {signal.Signals(-code).name}" if code and code < 0 else f"with exit code {code}"
    return Outcome(error=f"its worker ended {how} (see {folder / SAID})", killed=True)
