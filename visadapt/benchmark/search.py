"""Hyperparameters of a method on a task, chosen on its validation images.

The rate of the head moves along with a chosen lr: `cells` keeps the ratio that the two have in the recipe.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from .. import __version__
from ..backbones.base import Backbone
from ..errors import InputError, counted
from ..registry import ADAPTERS, BACKBONES
from .cells import Cell
from .recipes import adapter_config, recipe
from .results import Store, read_lines
from .suites import BenchTask, Suite
from .sweep import Pool, sweep
from .watch import Watch

GENERATION = 4
"""Trials of a study that are suggested together, by the results of all before them. How many of them run at a time,
and which ends first, therefore changes nothing."""

FACTOR = 10.0
"""Rates and strengths are searched from the recipe's value over this to its value times this."""

DECAYS = (0.0, 1e-4, 1e-3, 1e-2, 0.05, 0.1)
"""Of weights; the recipe's own is one more where it is none of them."""

PROBE = 2.0**-10
"""A scale that no method has by default; a power of two, by which division is exact."""


def own_values(method: str) -> dict[str, float]:
    """What is searched of a method, with the values that its recipe has; its scale where it has one."""
    found = recipe(method)
    values = {"lr": found.lr, "weight_decay": found.weight_decay}
    if (name := found.scale_argument) is not None:
        default = inspect.signature(ADAPTERS.get(found.adapter)).parameters[name].default
        scale = adapter_config(found).get(name, default)
        values["scale"] = _meant(method) if scale is None else scale
    return values


@cache
def _meant(method: str) -> float:
    """The scale that None stands for, such as the rank: the one with which the same adapter is built.

    Where an adapter multiplies by its scale it has a number that is proportional to it. The number that None gives is
    compared with the one of PROBE, on a small backbone.

    Raises:
        InputError: there is no such number, or several that disagree.
    """
    found = recipe(method)
    backbone = BACKBONES.build({"type": "TimmViT", "name": "test_vit"})
    usual, probed = (_numbers({**adapter_config(found), found.scale_argument: v}, backbone) for v in (None, PROBE))
    scales = {PROBE * usual[key] / number for key, number in probed.items() if number != usual[key]}
    if len(scales) != 1:
        why = f"what {found.scale_argument}=None of {found.adapter} stands for is not clear"
        raise InputError(f"{method} cannot be searched: {why}; give the recipe a number")
    return scales.pop()


def _numbers(cfg: dict[str, Any], backbone: Backbone) -> dict[str, float]:
    """Plain numbers that the pieces of an adapter hold."""
    adapter = ADAPTERS.build(cfg)
    adapter.build(backbone)
    parts = adapter.pieces.named_modules()
    return {f"{path}.{key}": v for path, part in parts for key, v in vars(part).items() if type(v) in (int, float)}


class Study:
    """The trials of a method on a task: Optuna's TPE with a fixed seed, which sees results and nothing else.

    The first trial has the recipe's own values. All studies draw the same random numbers, so that methods with the
    same space are tried at the same multiples of their recipes before results tell them apart.

    Args:
        suite: whose protocol holds.
        task: what is learnt; trials train on its "train" and are measured on its "val".
        method: name of a recipe.
        seed: of every trial.

    Raises:
        InputError: Optuna is not installed.
    """

    def __init__(self, suite: Suite, task: BenchTask, method: str, seed: int) -> None:
        optuna = _optuna()
        self.task, self.method, self.own = task, method, own_values(method)
        self.plain = Cell(suite, task, method, seed, select=True)
        factors = {name: value for name, value in self.own.items() if name != "weight_decay"}
        self.space: dict[str, Any] = {
            name: optuna.distributions.FloatDistribution(value / FACTOR, value * FACTOR, log=True)
            for name, value in factors.items()
        }
        decays = sorted({*DECAYS, self.own["weight_decay"]})
        self.space["weight_decay"] = optuna.distributions.CategoricalDistribution(decays)
        sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=2 * GENERATION, constant_liar=True)
        self.study = optuna.create_study(direction="maximize", sampler=sampler)
        self.study.enqueue_trial(self.own)
        self.asked: list[tuple[Any, Cell]] = []
        self.scores: list[tuple[Cell, float | None]] = []  # None: the trial failed

    def ask(self, count: int) -> list[Cell]:
        """The next trials; what they give is told before the next ones are asked for."""
        trials = [self.study.ask(self.space) for _ in range(count)]
        self.asked = [(trial, replace(self.plain, hyperparameters=self._values(trial))) for trial in trials]
        return [cell for _, cell in self.asked]

    def tell(self, values: Mapping[str, float | None]) -> None:
        """Take in the results of the trials that were asked for last, in their order.

        Args:
            values: by the identity of a cell; one that is missing, or no finite number, is of a trial that failed.
        """
        for trial, cell in self.asked:
            value = values.get(cell.key)
            score = value if value is not None and math.isfinite(value) else None
            self.study.tell(trial, score, state=None if score is not None else _optuna().trial.TrialState.FAIL)
            self.scores.append((cell, score))
        self.asked = []

    @property
    def best(self) -> tuple[Cell, float] | None:
        """The trial with the highest value, the earlier one of equals; None where all failed."""
        found = [(cell, score) for cell, score in self.scores if score is not None]
        return max(found, key=lambda pair: pair[1], default=None)

    def __str__(self) -> str:
        """What the search has found, for a person."""
        failed = sum(score is None for _, score in self.scores)
        some = f"; {failed} of {counted(len(self.scores), 'trial')} failed" if failed else ""
        if self.best is None:
            return f"nothing is chosen for {self.method} on {self.task.name}{some}"
        cell, score = self.best
        settings = ", ".join(f"{name} {value:g}" for name, value in cell.hyperparameters.items())
        own = self.scores[0][1]
        recipes = "" if own is None else f", recipe {100 * own:.1f} %"
        return f"chosen for {self.method} on {self.task.name}: {settings} (val {100 * score:.1f} %{recipes}{some})"

    def _values(self, trial: Any) -> dict[str, float]:
        """Three digits of what is suggested; the recipe's values as they are."""
        return dict(self.own) if trial.number == 0 else {k: float(f"{v:.3g}") for k, v in trial.params.items()}


def search(studies: Sequence[Study], trials: int, pool: Pool, store: Store, work_dir: Path, watch: Watch) -> None:
    """Run trials of all studies, a generation of all of them at a time.

    Called again with the same store it runs what is missing: a generation follows from the results of those before.
    Of a trial that is stored no weights are kept.

    Args:
        studies: new ones.
        trials: of each of them.
        pool: where they run.
        store: takes their lines.
        work_dir: every trial leaves its run in a folder named by its identity here.
        watch: is told what happens; `later` counts what runs after the search.
    """
    final = watch.later
    for begin in range(0, trials, GENERATION):
        count = min(GENERATION, trials - begin)
        watch.later = final + len(studies) * (trials - begin - count)
        cells = {cell.key: cell for study in studies for cell in study.ask(count)}  # rounding may make two equal
        which = f"trials {begin + 1} to {begin + count} of {trials} of each method and task"
        print(f"search, on train and val: {which}", flush=True)
        sweep(list(cells.values()), pool, store, work_dir, watch, results=work_dir)
        lines = read_lines(store.path, ("config_hash", "version", "value"))
        values = {line["config_hash"]: line["value"] for _, line in lines if line["version"] == __version__}
        for study in studies:
            study.tell(values)
        for weights in (path for key in values.keys() & cells for path in (work_dir / key).glob("*.safetensors")):
            weights.unlink()


def share(cells: Sequence[Cell], store: Store) -> None:
    """Store a result that is there already under the hyperparameters of another cell with the same config.

    A search of a method without scale that ends at the recipe's own values ends at a run of the table without search,
    and no run is done twice. A scale that is written out makes another config.
    """
    with store.locked():
        found: dict[str, list[dict[str, Any]]] = {}
        for _, line in read_lines(store.path, ("config_hash", "version", "hyperparameters")):
            if line["version"] == __version__:
                found.setdefault(line["config_hash"], []).append(line)
        for cell in cells:
            lines, wanted = found.get(cell.key, []), dict(cell.hyperparameters)
            if lines and all(line["hyperparameters"] != wanted for line in lines):
                store.append({**lines[-1], "hyperparameters": wanted})


def _optuna() -> Any:
    """The package, which is told to be quiet.

    Raises:
        InputError: it is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise InputError("a search needs Optuna: pip install 'visadapt[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
