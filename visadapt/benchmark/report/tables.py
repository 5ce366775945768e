"""Methods x tasks of a suite: rows, means and what ranks them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ...errors import counted
from .stored import Score, Stat, settings

GROUPED = {"vtab"}
"""Suites whose published figure is the mean of the means of their groups."""


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
        """Mean of a count, a size or a ratio over tasks, or over the row's own tasks where it has none of these."""
        scores = [self.scores[t] for t in tasks if t in self.scores] or self.scores.values()
        found = [value for score in scores if (value := score.cost(key)) is not None]
        return fmean(found) if found else None


@dataclass(frozen=True)
class Table:
    """A suite.

    Attributes:
        tasks: their names in the order of the columns.
        rows: best first by `headline`, those without one last.
        means: means over tasks; none of a single task.
        headline: what ranks the rows: a mean, or the task that most rows have where few rows have all.
    """

    suite: str
    tasks: list[str]
    rows: list[Row]
    means: list[Mean]
    headline: Mean

    @property
    def scores(self) -> list[Score]:
        return [score for row in self.rows for score in row.scores.values()]

    def score_of(self, task: str) -> Score:
        """A score of the task, for what all of its scores share."""
        return next(row.scores[task] for row in self.rows if task in row.scores)


def build(suite: str, scores: Iterable[Score]) -> Table:
    """The table of a suite."""
    rows = _rows(scores)
    first = {task: score for row in rows for task, score in row.scores.items()}
    count = {task: sum(task in row.scores for row in rows) for task in first}
    if suite in GROUPED:
        tasks = sorted(first, key=lambda t: (first[t]["group"], t))
    else:
        tasks = sorted(first, key=lambda t: (-count[t], t))
    means = _means(suite, {task: first[task]["group"] for task in tasks})
    widest = max(tasks, key=lambda t: count[t])  # the first of these
    headline = Mean(widest, {widest: 1.0})
    if means and 2 * sum(row.stat(means[0].weights) is not None for row in rows) >= len(rows):
        headline = means[0]

    def rank(row: Row) -> tuple:
        stat = row.stat(headline.weights)
        return (stat is None, -stat.mean if stat else 0, row.label)

    return Table(suite, tasks, sorted(rows, key=rank), means, headline)


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


def _means(suite: str, groups: Mapping[str, str]) -> list[Mean]:
    """Means over the tasks of a suite, the one that ranks first.

    Args:
        groups: the group of each task.
    """
    if len(groups) < 2:
        return []
    plain = Mean(f"mean of {len(groups)} tasks", dict.fromkeys(groups, 1 / len(groups)))
    if suite not in GROUPED:
        return [plain]
    members: dict[str, list[str]] = {}
    for task, group in groups.items():
        members.setdefault(group, []).append(task)
    each = [Mean(f"{g} ({len(tasks)})", dict.fromkeys(tasks, 1 / len(tasks))) for g, tasks in members.items()]
    balanced = {task: 1 / len(members) / len(members[group]) for task, group in groups.items()}
    return [Mean(f"mean of {counted(len(members), 'group mean')}", balanced), plain, *each]


def said(values: Mapping[str, Any]) -> str:
    """Settings for a person: "lr 0.001, weight_decay 0.05"."""
    return ", ".join(f"{key} {value}" for key, value in sorted(values.items())) or "as in the recipe"
