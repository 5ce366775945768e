"""Methods x tasks of a suite: rows, means and what ranks them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ...errors import counted
from .stored import Score, Stat, settings

GROUPED = {"vtab", "fewshot"}
"""Suites whose published figures are means of groups of tasks."""
APART = {"fewshot"}
"""Of these, suites whose groups are trained on unlike numbers of images: there is no mean over them."""


@dataclass(frozen=True)
class Mean:
    """A mean over tasks.

    Attributes:
        name: as a heading.
        weights: of each task; their sum is 1.
    """

    name: str
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """A method with one choice of hyperparameters, or with one chosen per task."""

    label: str
    scores: Mapping[str, Score]

    def stat(self, over: Mapping[str, float]) -> Stat | None:
        """Weighted mean over tasks, and the deviation of that mean over the seeds that all of them have.

        None where a task has no finite score, or where the tasks were run by different versions.
        """
        scores = [self.scores.get(task) for task in over]
        if any(s is None or s.stat is None for s in scores) or len({s["version"] for s in scores}) != 1:
            return None
        mean = sum(weight * score.stat.mean for weight, score in zip(over.values(), scores))
        seeds = set.intersection(*(set(score.by_seed) for score in scores))
        per_seed = [sum(w * score.by_seed[seed] for w, score in zip(over.values(), scores)) for seed in sorted(seeds)]
        return Stat(mean, Stat.of(per_seed).std if per_seed else None)

    def cost(self, key: str, tasks: Iterable[str]) -> float | None:
        """Mean of a count, a size or a ratio over tasks.

        None where a task has none: a mean over the others is not to be compared with those of other rows.
        """
        found = [self.scores[task].cost(key) if task in self.scores else None for task in tasks]
        return None if None in found else fmean(found)


@dataclass(frozen=True)
class Table:
    """A suite.

    Attributes:
        tasks: their names in the order of the columns.
        rows: best first by `headline`, those without one last.
        means: means over tasks with one metric; none where there is a single task.
        headline: what ranks the rows: the first mean that half of them have, or the task that most have.
    """

    suite: str
    tasks: list[str]
    rows: list[Row]
    means: list[Mean]
    headline: Mean

    @property
    def scores(self) -> list[Score]:
        return [score for row in self.rows for score in row.scores.values()]

    @property
    def alike(self) -> list[str]:
        """Tasks whose differences may be averaged: of the headline's metric, and its group where groups are apart."""

        def kind(task: str) -> tuple[str, str]:
            score = self.score_of(task)
            return score["metric"], score["group"] if self.suite in APART else ""

        return [task for task in self.tasks if kind(task) == kind(next(iter(self.headline.weights)))]

    def score_of(self, task: str) -> Score:
        """A score of the task, for what all of its scores share."""
        return next(row.scores[task] for row in self.rows if task in row.scores)


def build(suite: str, scores: Iterable[Score]) -> Table:
    """The table of a suite."""
    rows = _rows(scores)
    first = {task: score for row in rows for task, score in row.scores.items()}
    count = {task: sum(task in row.scores for row in rows) for task in first}
    if suite in GROUPED:
        tasks = sorted(first, key=lambda t: (_natural(first[t]["group"]), t))
    else:
        tasks = sorted(first, key=lambda t: (-count[t], t))
    means = _means(suite, {task: first[task] for task in tasks})
    widest = max(tasks, key=lambda t: count[t])  # the first of these
    common = (mean for mean in means if 2 * sum(row.stat(mean.weights) is not None for row in rows) >= len(rows))
    headline = next(common, Mean(widest, {widest: 1.0}))

    def rank(row: Row) -> tuple:
        stat = row.stat(headline.weights)
        return (stat is None, -stat.mean if stat else 0, row.label)

    return Table(suite, tasks, sorted(rows, key=rank), means, headline)


def _natural(text: str) -> list[str | int]:
    """Sorts names by the numbers in them: 2-shot before 16-shot."""
    return [int(part) if n % 2 else part for n, part in enumerate(re.split(r"(\d+)", text))]


def _rows(scores: Iterable[Score]) -> list[Row]:
    """Scores by method and hyperparameters.

    Where a method has exactly one choice of hyperparameters per task they share a row, whether the choices differ or
    not. With several choices for a task each choice is a row of its own: picking among them here would select on the
    test images.
    """
    methods: dict[str, list[Score]] = {}
    for score in scores:
        methods.setdefault(score["method"], []).append(score)
    rows = []
    for method, found in methods.items():
        default = [s for s in found if not s["hyperparameters"]]
        chosen = [s for s in found if s["hyperparameters"]]
        if default:
            rows.append(Row(method, {s["task"]: s for s in default}))
        choices: dict[str, list[Score]] = {}
        for score in chosen:
            choices.setdefault(settings(score["hyperparameters"]), []).append(score)
        if len(choices) > 1 and len({s["task"] for s in chosen}) == len(chosen):
            rows.append(Row(f"{method} (chosen per task)", {s["task"]: s for s in chosen}))
        else:
            rows += [
                Row(f"{method} ({said(c[0]['hyperparameters'])})", {s["task"]: s for s in c}) for c in choices.values()
            ]
    return rows


def _means(suite: str, tasks: Mapping[str, Score]) -> list[Mean]:
    """Means over the tasks of a suite that have one metric, the one that ranks first.

    Args:
        tasks: a score of each.
    """
    if len(tasks) < 2:
        return []
    means = [Mean(f"mean of {len(tasks)} tasks", dict.fromkeys(tasks, 1 / len(tasks)))]
    if suite in GROUPED:
        members: dict[str, list[str]] = {}
        for task, score in tasks.items():
            members.setdefault(score["group"], []).append(task)
        each = [Mean(f"{g} ({len(found)})", dict.fromkeys(found, 1 / len(found))) for g, found in members.items()]
        balanced = {task: 1 / len(members) / len(found) for found in members.values() for task in found}
        over = [Mean(f"mean of {counted(len(members), 'group mean')}", balanced), *means]
        means = each if suite in APART else over + each
    return [mean for mean in means if len({tasks[task]["metric"] for task in mean.weights}) == 1]


def said(values: Mapping[str, Any]) -> str:
    """Settings for a person: "lr 0.001, weight_decay 0.05"."""
    return ", ".join(f"{key} {value}" for key, value in sorted(values.items())) or "as in the recipe"
