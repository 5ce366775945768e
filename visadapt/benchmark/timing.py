"""Fair timing on a shared machine: candidates take turns, and medians of ratios within a round are compared."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from ..memory import keep_freed


def _clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(candidates: dict[str, Callable[[], None]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds per call of every candidate, all of them once per round, after one unmeasured round.

    The order turns around from round to round, so that a drift of the machine favours nobody. Freed memory is kept, as
    in training.
    """
    keep_freed()
    for call in candidates.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(rounds):
        names = list(candidates)
        for name in names if i % 2 == 0 else reversed(names):
            start = _clock(device)
            candidates[name]()
            times[name].append(_clock(device) - start)
    return times


def ratio(times: dict[str, list[float]], name: str, baseline: str) -> float:
    """Median over rounds of this candidate's time against the baseline's in the same round."""
    return median(a / b for a, b in zip(times[name], times[baseline]))


def spread(times: dict[str, list[float]], first: str, second: str) -> float:
    """How far two equal candidates seem apart: the noise below which a ratio says nothing."""
    return abs(ratio(times, first, second) - 1)
