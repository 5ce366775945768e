"""Stored lines of a suite, checked, and joined over seeds."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from packaging.version import InvalidVersion, Version

from ...errors import InputError
from ..results import read_lines

SUITES = {"offline": "Offline suite", "vtab": "VTAB-1k", "fgvc": "FGVC", "fewshot": "Few-shot"}
"""File stems in the order of the report, and their titles."""

TEXT, NUMBER, MAYBE = str, (int, float), (int, float, type(None))
KEYS: dict[str, Any] = {
    **dict.fromkeys(("suite", "method", "task", "group", "backbone", "metric", "config", "config_hash"), TEXT),
    **dict.fromkeys(("version", "adapter_file", "machine"), TEXT),
    **dict.fromkeys(("seed", "train_images", "test_images", "threads"), int),
    **dict.fromkeys(("trainable_params", "head_params", "stored_bytes"), int),
    **dict.fromkeys(("hyperparameters", "protocol"), dict),
    **dict.fromkeys(("value", "step_time_ratio", "memory_ratio"), MAYBE),
    "seconds": NUMBER,
}
"""Keys of a line that are read here, and their types. A value or a ratio may be null or NaN: then there is none."""

RECIPE = ("lr", "weight_decay")
"""Parts of a line's protocol that are the method's own; the others are the same for all methods of a task."""


class Stat(NamedTuple):
    """Mean and, of two or more, the standard deviation of a sample."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Stat:
        found = list(values)
        return cls(fmean(found), stdev(found) if len(found) > 1 else None)


@dataclass(frozen=True)
class Score:
    """Runs of one (suite, task, method, hyperparameters) in one version: one line per seed, in their order."""

    runs: tuple[dict[str, Any], ...]

    def __getitem__(self, key: str) -> Any:
        """What all runs share: task, method, version, ..."""
        return self.runs[-1][key]

    @property
    def by_seed(self) -> dict[int, float]:
        """Value per seed; NaN where a run gave none."""
        return {run["seed"]: _number(run["value"]) for run in self.runs}

    @property
    def stat(self) -> Stat | None:
        """Mean and deviation over seeds; None where a run gave no finite value: a mean of the others would flatter."""
        values = list(self.by_seed.values())
        return Stat.of(values) if all(map(math.isfinite, values)) else None

    def cost(self, key: str) -> float | None:
        """Mean of a count, a size or a ratio over the runs that have it."""
        found = [value for run in self.runs if math.isfinite(value := _number(run[key]))]
        return fmean(found) if found else None


@dataclass
class Aside:
    """Lines that are not shown, counted by their reason."""

    versions: Counter[str] = field(default_factory=Counter)
    settings: int = 0
    repeated: int = 0


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def read_suite(folder: Path, suite: str) -> list[dict[str, Any]]:
    """All stored lines of a suite; none where it has no file.

    Raises:
        InputError: a line is no result of this suite.
    """
    lines = []
    for where, line in read_lines(folder / f"{suite}.jsonl", KEYS):
        wrong = sorted(k for k, kind in KEYS.items() if not isinstance(line[k], kind) or isinstance(line[k], bool))
        problem = f"wrong type of {', '.join(wrong)}" if wrong else _wrong(line, suite)
        if problem:
            raise InputError(f"{where}: {problem}; mend or remove the line")
        lines.append(line)
    return lines


def _wrong(line: Mapping[str, Any], suite: str) -> str:
    """What a line says that cannot be, or ""."""
    if line["suite"] != suite:
        return f"a result of suite '{line['suite']}'"
    if not 0 <= _number(line["value"]) <= 1 and math.isfinite(_number(line["value"])):
        return f"value {line['value']} is no fraction between 0 and 1"
    if "epochs" not in line["protocol"]:
        return "no epochs in its protocol"
    try:
        Version(line["version"])
    except InvalidVersion:
        return f"'{line['version']}' is no version"
    return ""


def settings(hyperparameters: Mapping[str, Any]) -> str:
    """Hyperparameters as one text, the same for equal ones."""
    return json.dumps(hyperparameters, sort_keys=True)


def join(lines: Iterable[dict[str, Any]]) -> tuple[list[Score], Aside]:
    """Lines of a suite joined over seeds, in the order of their first lines.

    Only lines made as most methods of their task are kept, see `_usual`, so that a quick trial neither displaces a
    method's runs nor stands among them. Of these, only lines of the newest version of a (task, method,
    hyperparameters) are joined that have the learning rate and the weight decay of the last one. Of two runs with one
    seed the last counts.
    """
    lines = list(lines)
    usual = _usual(lines)
    kept = [line for line in lines if _made(line) == usual[line["task"]]]
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for line in kept:
        groups.setdefault((line["task"], line["method"], settings(line["hyperparameters"])), []).append(line)
    scores, aside = [], Aside(settings=len(lines) - len(kept))
    for found in groups.values():
        newest = max(Version(line["version"]) for line in found)
        aside.versions.update(line["version"] for line in found if Version(line["version"]) != newest)
        current = [line for line in found if Version(line["version"]) == newest]
        alike = [line for line in current if settings(line["protocol"]) == settings(current[-1]["protocol"])]
        aside.settings += len(current) - len(alike)
        seeds = {line["seed"]: line for line in alike}
        aside.repeated += len(alike) - len(seeds)
        scores.append(Score(tuple(seeds[seed] for seed in sorted(seeds))))
    return scores, aside


def _usual(lines: Iterable[dict[str, Any]]) -> dict[str, tuple]:
    """How the most methods of each task were run; of equals that of the newest version, of most runs, stored first."""
    tasks: dict[str, dict[tuple, list[dict[str, Any]]]] = {}
    for line in lines:
        tasks.setdefault(line["task"], {}).setdefault(_made(line), []).append(line)

    def weight(found: list[dict[str, Any]]) -> tuple:
        return len({line["method"] for line in found}), max(Version(line["version"]) for line in found), len(found)

    return {task: max(ways, key=lambda way: weight(ways[way])) for task, ways in tasks.items()}


def _made(line: Mapping[str, Any]) -> tuple:
    """What methods of one task must share to be compared."""
    shared = {key: value for key, value in line["protocol"].items() if key not in RECIPE}
    return (settings(shared), *(line[key] for key in ("backbone", "metric", "train_images", "test_images")))


def digest(folder: Path) -> str:
    """Identity of all stored lines of the suites, as report.html carries it."""
    state = hashlib.sha256()
    for suite in SUITES:
        path = folder / f"{suite}.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            state.update(f"{suite} {line}\n".encode())
    return state.hexdigest()[:32]
