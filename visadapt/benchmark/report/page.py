"""The report as one HTML page."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from . import notes
from .plots import Point, as_bytes, pareto
from .significance import FEWEST, Comparison, compare, reference
from .stored import SUITES, Aside, Score, Stat
from .tables import Row, Table, said

FEW_TASKS = 6
"""With more of them their columns come after those of the costs, which would be out of sight."""

TEST = (
    "Differences to {reference} in percentage points, paired by task and seed. p: two-sided Wilcoxon signed-rank test, "
    "since differences on easy and on hard tasks are not of one normal distribution; corrected by Holm for all methods "
    "of this table. Fewer than {fewest} pairs that differ give none. Seeds of one task are not independent evidence "
    "about other tasks: p speaks of these tasks, {tasks}."
)


@dataclass(frozen=True)
class Shown:
    """What a cell of a table shows.

    Attributes:
        text: the figure.
        value: what it is sorted by, "" for last.
        std: its deviation.
        mark: what is amiss.
        tip, link: more about it.
        best: none of its column is better.
    """

    text: str = "–"
    value: str = ""
    std: str = ""
    mark: str = ""
    tip: str = ""
    link: str = ""
    best: bool = False


def page(tables: Sequence[tuple[Table, Aside]], folder: Path, digest: str) -> str:
    """HTML of the whole report.

    Args:
        tables: of the suites that have results, with what was set aside.
        folder: of the results, where the page will lie; paths in the lines are relative to the folder above it.
        digest: of the lines.
    """
    from jinja2 import Environment, StrictUndefined

    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(text)
    shown = [table for table, _ in tables]
    return template.render(
        digest=digest,
        summary=notes.summary(shown),
        facts=notes.facts(shown),
        suites=[_suite(table, aside, folder) for table, aside in tables],
    )


def _suite(table: Table, aside: Aside, folder: Path) -> dict[str, Any]:
    """All that the template says of a suite."""
    columns = _columns(table, folder)
    against = reference(table)
    return {
        "name": table.suite,
        "title": SUITES[table.suite],
        "protocol": notes.protocol(table),
        "notes": notes.notes(table, aside),
        "columns": [{"name": "method", "under": "", "tip": ""}, *(head for head, _ in columns)],
        "sorted_by": 1 + [head["name"] for head, _ in columns].index(table.headline.name),
        "rows": [{"label": row.label, "cells": [c[n] for _, c in columns]} for n, row in enumerate(table.rows)],
        "legend": f"Costs are those of {_over(table)}. A value leads to its config. The best of a column is bold."
        + " Other tasks are to the right." * (len(table.tasks) > FEW_TASKS),
        "plots": _plots(table),
        "reference": against.label,
        "comparisons": [_comparison(c) for c in compare(table)],
        "test": TEST.format(reference=against.label, fewest=FEWEST, tasks=notes.listed(table.alike)),
        "files": [_files(row.scores[t], row, folder) for row in table.rows for t in table.tasks if t in row.scores],
    }


def _over(table: Table) -> str:
    """What the headline is about, in a sentence."""
    name, count = table.headline.name, len(table.headline.weights)
    return name if count == 1 else f"the {count} tasks of “{name}”, for methods that have all of them"


def _columns(table: Table, folder: Path) -> list[tuple[dict[str, str], list[Shown]]]:
    """Heading and cells of each column, in order."""
    seeds, newest = notes.expected_seeds(table), notes.newest_version(table)
    tasks = []
    for task in table.tasks:
        score = table.score_of(task)
        tip = f"{score['group']}; {score['train_images']} images to train, {score['test_images']} to test"
        cells = [_score(row.scores.get(task), seeds[task], newest, folder) for row in table.rows]
        tasks.append(({"name": task, "under": score["metric"], "tip": tip}, _bold(cells)))
    tip = "only of methods that have all of these tasks"
    means = [
        ({"name": m.name, "under": "%", "tip": tip}, _bold([_percent(row.stat(m.weights)) for row in table.rows]))
        for m in table.means
    ]
    costs = [(head, [_cost(row, table, key) for row in table.rows]) for key, head in COSTS.items()]
    by_mean = table.headline in table.means
    if len(tasks) <= FEW_TASKS:
        return [*means, *tasks, *costs] if by_mean else [*tasks, *means, *costs]
    first = [] if by_mean else [tasks.pop(table.tasks.index(table.headline.name))]
    return [*first, *means, *costs, *tasks]


PEAK = "peak of a training step above what is held between steps: without weights and optimizer moments"
COSTS = {
    "trainable_params": {"name": "trainable", "under": "parameters", "tip": "with the head"},
    "stored_bytes": {"name": "stored", "under": "adapter file", "tip": "with the head"},
    "step_time_ratio": {"name": "step time", "under": "× frozen", "tip": "of a training step"},
    "memory_ratio": {"name": "memory", "under": "× frozen", "tip": PEAK},
}


def _percent(stat: Stat | None) -> Shown:
    if stat is None:
        return Shown()
    std = "" if stat.std is None else f"{100 * stat.std:.1f}"
    return Shown(f"{100 * stat.mean:.1f}", f"{stat.mean:.6f}", std)


def _score(score: Score | None, expected: int, newest: str, folder: Path) -> Shown:
    """A value with a link to its config, and marks for what is amiss."""
    if score is None:
        return Shown()
    marks = [f"{len(score.runs)} of {expected} seeds"] if len(score.runs) < expected else []
    marks += [score["version"]] if score["version"] != newest else []
    tip = f"seeds {' '.join(map(str, score.by_seed))}; {said(score['hyperparameters'])}"
    shown = Shown("not finite") if score.stat is None else _percent(score.stat)
    return replace(shown, mark=", ".join(marks), tip=tip, link=_link(score["config"], folder))


def _bold(cells: list[Shown]) -> list[Shown]:
    """Marks the best cells, as they are shown."""
    values = [float(cell.text) for cell in cells if cell.value]
    return [replace(c, best=len(values) > 1 and c.value != "" and float(c.text) == max(values)) for c in cells]


def _cost(row: Row, table: Table, key: str) -> Shown:
    value = row.cost(key, table.headline.weights)
    if value is None:
        return Shown()
    if key == "trainable_params":
        head = row.cost("head_params", table.headline.weights)
        return Shown(f"{value:,.0f}", f"{value:.1f}", tip=f"of these {head:,.0f} in the head")
    return Shown(as_bytes(value) if key == "stored_bytes" else f"{value:.2f}", f"{value:.4f}")


def _plots(table: Table) -> list[str]:
    """Headline accuracy against bytes and against the time of a step; none of a single method."""
    axes = {
        "stored_bytes": "stored bytes (adapter and head)",
        "step_time_ratio": "time of a training step, over the frozen backbone's",
    }
    headline, plots = table.headline, []
    metric = table.score_of(next(iter(headline.weights)))["metric"]
    for key, across in axes.items():
        points = []
        for row in table.rows:
            stat, cost = row.stat(headline.weights), row.cost(key, headline.weights)
            if stat is not None and cost:
                shown = as_bytes(cost) if key == "stored_bytes" else f"{cost:.2f} times"
                points.append(Point(row.label, cost, 100 * stat.mean, f"{row.label}: {100 * stat.mean:.1f} %, {shown}"))
        if len(points) > 1:
            upwards = f"{headline.name}, {metric} in %"
            plots.append(pareto(points, across, upwards, f"{table.suite}-{key}", key == "stored_bytes"))
    return plots


def _comparison(found: Comparison) -> dict[str, Any]:
    points, p = 100 * found.difference, Shown("too few pairs")
    if found.p is not None:
        p = Shown(f"{found.p:.3f}" if found.p >= 0.001 else "< 0.001", f"{found.p:.6g}")
    counts = [Shown(str(n), str(n)) for n in (found.tasks, found.pairs, found.better, found.worse)]
    difference = Shown(f"{points:+.1f}".replace("-", "−"), f"{points:.4f}")
    return {"label": found.label, "cells": [difference, *counts, p]}


def _files(score: Score, row: Row, folder: Path) -> dict[str, Any]:
    return {
        "method": row.label,
        "task": score["task"],
        "hyperparameters": said(score["hyperparameters"]),
        "config": _link(score["config"], folder),
        "config_name": posixpath.basename(score["config"]),
        "adapters": [(run["seed"], _link(run["adapter_file"], folder)) for run in score.runs],
    }


def _link(path: str, folder: Path) -> str:
    """From the page in `folder` to a path that is relative to the folder above it."""
    return quote(path if posixpath.isabs(path) else posixpath.relpath(path, folder.name))
