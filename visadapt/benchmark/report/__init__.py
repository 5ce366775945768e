"""`visadapt bench report`: a page, a CSV file and the model zoo, made of the stored lines and nothing else."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import InputError
from ...files import atomic
from ..results import RESULTS
from .page import page
from .stored import SUITES, Aside, Score, digest, join, read_suite, settings
from .tables import Table, build
from .zoo import zoo_text


def write_report(folder: Path = RESULTS) -> list[Path]:
    """Write report.html and report.csv into the folder of the results, and model_zoo.md beside it.

    Equal lines give equal files. Without lines of a suite there is the zoo alone.

    Returns:
        the files.

    Raises:
        InputError: there are no results, or a line is none.
    """
    tables = _tables(folder)
    texts = _texts(folder, tables)
    if not texts:
        raise InputError(f"no results in {folder}/ here; run visadapt bench train first, or change to their folder")
    if tables:
        texts[folder / "report.html"] = page(tables, folder, digest(folder))
    for path, text in texts.items():
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return list(texts)


def stale(folder: Path = RESULTS) -> list[str]:
    """Names of the files of a report that are missing or were not made of the stored lines.

    model_zoo.md and report.csv are compared whole; the page by the digest of the lines in it, as its pictures differ
    between versions of matplotlib.

    Raises:
        InputError: a line is no result.
    """
    tables = _tables(folder)
    found = [path.name for path, text in _texts(folder, tables).items() if _read(path) != text]
    if tables:
        marked = re.search(r'<meta name="results" content="(\w+)">', _read(folder / "report.html"))
        if marked is None or marked[1] != digest(folder):
            found.append("report.html")
    return found


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _tables(folder: Path) -> list[tuple[Table, Aside]]:
    """Of the suites that have results."""
    tables = []
    for suite in SUITES:
        scores, aside = join(read_suite(folder, suite))
        if scores:
            tables.append((build(suite, scores), aside))
    return tables


def _texts(folder: Path, tables: Sequence[tuple[Table, Aside]]) -> dict[Path, str]:
    """Contents of the files that are compared whole."""
    offline = next((table for table, _ in tables if table.suite == "offline"), None)
    texts = {folder.parent / "model_zoo.md": zoo_text(folder, offline)}
    if tables:
        texts[folder / "report.csv"] = _csv([score for table, _ in tables for score in table.scores])
    return {path: text for path, text in texts.items() if text}


def _csv(scores: Sequence[Score]) -> str:
    """One line per (suite, task, method, hyperparameters)."""
    held = io.StringIO()
    writer = csv.DictWriter(held, list(_record(scores[0])), lineterminator="\n")
    writer.writeheader()
    order = {suite: n for n, suite in enumerate(SUITES)}
    writer.writerows(
        sorted(map(_record, scores), key=lambda r: (order[r["suite"]], r["task"], r["method"], r["hyperparameters"]))
    )
    return held.getvalue()


def _record(score: Score) -> Mapping[str, object]:
    def rounded(value: float | None, digits: int) -> object:
        return "" if value is None else round(value, digits or None)

    stat = score.stat
    return {
        **{key: score[key] for key in ("suite", "task", "group", "method")},
        "hyperparameters": settings(score["hyperparameters"]),
        "metric": score["metric"],
        "mean": "nan" if stat is None else rounded(stat.mean, 6),
        "std": "" if stat is None else rounded(stat.std, 6),
        "n": len(score.runs),
        "seeds": " ".join(map(str, score.by_seed)),
        **{key: score[key] for key in ("trainable_params", "head_params")},
        "stored_bytes": rounded(score.cost("stored_bytes"), 0),
        **{key: rounded(score.cost(key), 4) for key in ("step_time_ratio", "memory_ratio")},
        "seconds": rounded(score.cost("seconds"), 1),
        **{key: score[key] for key in ("train_images", "test_images", "backbone", "version", "config")},
    }
