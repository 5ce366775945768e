"""What a person sees of a sweep: a table on a terminal, one line per event elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from statistics import mean
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ..errors import counted
from .cells import Cell


def spoken(seconds: float) -> str:
    """A duration as people say it: 45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Watch:
    """Counts cells and says how long the rest will take, by the mean time of those that have ended.

    Args:
        later: cells that will run after those of which `begin` is told; they take time too.
    """

    def __init__(self, later: int = 0) -> None:
        self.later = later
        self.console = Console(file=sys.stdout, highlight=False)
        self.live: Live | None = None

    def begin(self, cells: Sequence[Cell], waiting: Sequence[Cell], workers: int) -> None:
        """Of all cells these are waiting; the others are stored already."""
        self.total, self.left, self.workers = len(waiting), list(waiting), workers
        self.tasks = list(dict.fromkeys(c.task.name for c in cells))
        self.methods = list(dict.fromkeys(c.method for c in cells))
        self.counts = Counter((c.method, c.task.name) for c in cells)
        self.done = self.counts - Counter((c.method, c.task.name) for c in waiting)
        self.failures: Counter[tuple[str, str]] = Counter()
        self.running: dict[str, tuple[Cell, float]] = {}
        self.seconds: list[float] = []
        stored = len(cells) - len(waiting)
        self.say(f"{counted(len(cells), 'cell')}, {stored} stored already, {len(waiting)} to run, {workers} at a time")
        if self.console.is_terminal and waiting:
            self.live = Live(self._table(), console=self.console, auto_refresh=False)
            self.live.start()

    def started(self, cell: Cell) -> None:
        self.running[cell.key] = (cell, time.monotonic())

    def finished(self, cell: Cell, line: dict[str, Any]) -> None:
        self._ended(cell)
        self.done[cell.method, cell.task.name] += 1
        self.seconds.append(line["seconds"])
        shown = f"{line['metric']} {100 * line['value']:.1f} %, {spoken(line['seconds'])}"
        self.say(f"[{self.total - len(self.left)}/{self.total}] {cell.name}: {shown}; {self.rest()}")

    def again(self, cell: Cell, why: str) -> None:
        del self.running[cell.key]
        self.say(f"{cell.name}: {why}; it is run once more")

    def failed(self, cell: Cell, why: str) -> None:
        self._ended(cell)
        self.failures[cell.method, cell.task.name] += 1
        self.say(f"[{self.total - len(self.left)}/{self.total}] {cell.name} FAILED: {why}; {self.rest()}")

    def tick(self) -> None:
        """Time has passed."""
        if self.live is not None:
            self.live.update(self._table(), refresh=True)

    def end(self) -> None:
        if self.live is not None:
            self.live.stop()

    def rest(self) -> str:
        """How long what is left will take."""
        left = len(self.left) + self.later
        if not left:
            return "nothing left"
        if not self.seconds:
            return "time left is not known yet"
        now = time.monotonic()
        each = mean(self.seconds)
        begun = sum(min(now - start, each) for _, start in self.running.values())
        return f"{spoken((each * left - begun) / self.workers)} left"

    def _ended(self, cell: Cell) -> None:
        del self.running[cell.key]
        self.left.remove(cell)

    def say(self, line: str) -> None:
        """Print a line above the table."""
        self.console.print(line, markup=False, soft_wrap=True)

    def _table(self) -> Table:
        """Finished of all cells by method and task; "!" marks failures, "…" what runs."""
        table = Table(title=f"{self.total - len(self.left)} of {self.total} ended, {self.rest()}", title_justify="left")
        for column in ("method", *self.tasks):
            table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
        now = {(c.method, c.task.name) for c, _ in self.running.values()}
        for method in self.methods:
            table.add_row(method, *(self._mark((method, task), now) for task in self.tasks))
        return table

    def _mark(self, place: tuple[str, str], now: set[tuple[str, str]]) -> str:
        if not self.counts[place]:
            return ""
        marks = "!" * self.failures[place] + "…" * (place in now)
        return f"{marks} {self.done[place]}/{self.counts[place]}".strip()
