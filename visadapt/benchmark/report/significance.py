"""Is a method better than another beyond chance? Paired over tasks and seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from .tables import Row, Table

FEWEST = 6
"""Pairs that differ, below which no p-value is given: of five, 2 / 2^5 is the smallest and never below 0.05."""


@dataclass(frozen=True)
class Comparison:
    """A method against the reference.

    Attributes:
        difference: mean of method minus reference, as a fraction.
        tasks: that both have, of those that may be averaged.
        pairs: equal (task, seed, version) that both have.
        better, worse: pairs in which the method is so.
        p: of the two-sided Wilcoxon signed-rank test, corrected by Holm for all methods of the table; None where too
            few pairs differ.
    """

    label: str
    difference: float
    tasks: int
    pairs: int
    better: int
    worse: int
    p: float | None


def reference(table: Table) -> Row:
    """LoRA as its recipe says, else any LoRA, else the first row."""
    named = [row for row in table.rows if row.label == "LoRA"]
    return (named or [row for row in table.rows if row.label.startswith("LoRA (")] or table.rows)[0]


def compare(table: Table) -> list[Comparison]:
    """All other rows of the table that share a pair with the reference, in the order of the table."""
    tasks = table.alike
    against = _values(reference(table), tasks)
    found = []
    for row in table.rows:
        values = _values(row, tasks)
        # rounded, so that differences that are equal but for the last bit rank as equal
        shared = sorted(values.keys() & against.keys())
        differences = [round(values[key] - against[key], 9) for key in shared]
        if shared and row is not reference(table):
            found.append((row.label, len({task for task, *_ in shared}), differences, _p_value(differences)))
    corrected = iter(holm([p for *_, p in found if p is not None]))
    return [
        Comparison(
            label,
            fmean(differences),
            number,
            len(differences),
            sum(d > 0 for d in differences),
            sum(d < 0 for d in differences),
            None if p is None else next(corrected),
        )
        for label, number, differences, p in found
    ]


def _values(row: Row, tasks: Sequence[str]) -> dict[tuple[str, int, str], float]:
    return {
        (task, seed, score["version"]): value
        for task, score in row.scores.items()
        for seed, value in score.by_seed.items()
        if task in tasks and math.isfinite(value)
    }


def _p_value(differences: Sequence[float]) -> float | None:
    """Of the two-sided Wilcoxon signed-rank test; None where fewer than `FEWEST` pairs differ.

    A rank test, since differences on easy and on hard tasks are not of one normal distribution, as the t-test has it.
    """
    from scipy.stats import wilcoxon

    differing = [d for d in differences if d]
    return float(wilcoxon(differing).pvalue) if len(differing) >= FEWEST else None


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, 1979): the k-th smallest of n times n - k + 1, never decreasing."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
