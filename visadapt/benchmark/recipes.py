"""How the benchmark trains each method: its adapter with its defaults, and its learning rate.

All cells share optimizer (AdamW unless the method is an optimizer), cosine schedule, batch, epochs and the head's rate
of 1e-3. What differs is below: rates and decays that a method's paper or authors' code has, and arguments that count
training steps, which have to fit a short run. Nothing here was searched on the benchmark's tasks.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError, hint
from ..registry import ADAPTERS
from .methods import config

HEAD_LR = 1e-3
"""Of every head, whatever the rate of the adapter."""


@dataclass(frozen=True)
class Recipe:
    """One method.

    Attributes:
        adapter: name of its class.
        arguments: of the adapter, where its defaults do not fit.
        lr: learning rate of what the adapter trains.
        weight_decay: of everything.
        decay_vectors: whether biases, norms and scales decay.
        optimizer: class, and its arguments beyond lr and weight_decay.
        groups: further options of TrainableGroups.
        loss: of the task; cross-entropy where None.
    """

    adapter: str
    arguments: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-3
    weight_decay: float = 0.05
    decay_vectors: bool = True
    optimizer: dict[str, Any] = field(default_factory=lambda: {"type": "AdamW"})
    groups: dict[str, Any] = field(default_factory=dict)
    loss: str | None = None

    @property
    def scale_argument(self) -> str | None:
        """The argument of the adapter that multiplies its update, None where there is none."""
        taken = inspect.signature(ADAPTERS.get(self.adapter).__init__).parameters
        return next((name for name in ("scale", "alpha") if name in taken), None)


def _gains(**arguments: Any) -> dict[str, Any]:
    """Of methods that train factors of singular values, which must not decay to nothing."""
    return {"decay_vectors": False, **arguments}


CHANGED: dict[str, dict[str, Any]] = {
    "BiAdaptFormer": dict(weight_decay=1e-4),
    "BiLoRA": dict(weight_decay=1e-4),
    "CloudAdapter": dict(lr=1e-4),
    "ConvLoRA": dict(lr=5e-4),
    "DiffuseKronA": dict(lr=5e-3),
    "EarthAdapter": dict(lr=1e-4),
    "FullFineTune": dict(lr=5e-5),
    "Hydra": dict(weight_decay=1e-4),
    "IncreLoRA": dict(arguments=dict(top=4, warmup=20, interval=5)),
    "LinearProbe": dict(lr=HEAD_LR, weight_decay=0.0),
    "LoCA": dict(lr=2e-3, arguments=dict(search=0.5)),
    "LoLDU": _gains(lr=2e-2),
    "LoRAGA": dict(lr=1e-4, weight_decay=0.0),
    "LoRAXS": dict(lr=2e-3),
    "MapSAMDoRA": dict(weight_decay=0.1),
    "MoSA": dict(lr=2e-3, weight_decay=0.01, loss="Consistency"),
    "PaCA": dict(lr=3e-4, weight_decay=0.0),
    "QWHA": dict(weight_decay=0.0, arguments=dict(alpha=200.0)),
    "RandLoRA": dict(weight_decay=0.1),
    "Rein": dict(lr=1e-4),
    "SALT": _gains(lr=2e-4, weight_decay=0.01),
    "SHiRA": dict(weight_decay=0.0),
    "SNELL": dict(weight_decay=4e-4),
    "SNELLA": dict(weight_decay=4e-4),
    "SoKA": dict(weight_decay=0.0),
    "SSAM": _gains(lr=5e-3, weight_decay=0.01),
    "SVFit": _gains(lr=5e-3),
    "TLoRA": dict(weight_decay=0.0),
}

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "ALLoRA": dict(adapter="LoRA", optimizer={"type": "ALLoRA", "eta": 2.0}),
    "GaLore": dict(
        adapter="FullFineTune", lr=5e-5, optimizer={"type": "GaLore", "rank": 8, "scale": 4.0, "update_proj_gap": 50}
    ),
    "LoRA+": dict(adapter="LoRA", lr=2e-4, groups=dict(loraplus_lr_ratio=16.0)),
    "LoRA-Pro": dict(adapter="LoRA", lr=1e-4, optimizer={"type": "LoRAPro"}, weight_decay=0.0),
    "SST": dict(
        adapter="FullFineTune", lr=1e-4, optimizer={"type": "SST", "update_gap": 10, "warmup": 2}, weight_decay=0.0
    ),
}
"""Methods that are optimizers for an adapter that has a name of its own."""

PARTS: dict[str, dict[str, Any]] = {
    "Partial-1": dict(adapter="FullFineTune", arguments=dict(layers=[-1]), lr=1e-4),
}
"""Methods that are an adapter in late blocks alone; what the frozen blocks before these give is computed once."""

ELSEWHERE = {
    "PEFT": "it is one adapter for many tuners",
    "Poly": "it shares skills between tasks",
    "TemporalShift": "it is for clips",
    "ZeroI2V": "it is for clips",
}
"""Adapters that the benchmark leaves out, and why."""


def methods() -> list[str]:
    """Names of all methods that can be compared on single images."""
    return sorted({*ADAPTERS.names(), *OPTIMIZERS, *PARTS} - set(ELSEWHERE), key=str.lower)


def recipe(method: str) -> Recipe:
    """How a method is trained.

    Raises:
        InputError: an unknown method, or one that the benchmark leaves out.
    """
    if method in ELSEWHERE:
        raise InputError(f"the benchmark has no '{method}': {ELSEWHERE[method]}")
    if method not in methods():
        raise InputError(f"unknown method '{method}'{hint(method, methods())}")
    named = {**CHANGED, **OPTIMIZERS, **PARTS}
    return Recipe(**{"adapter": method, **named.get(method, {})})


def adapter_config(recipe: Recipe) -> dict[str, Any]:
    """The adapter; weight methods on all linears, so that they can be compared."""
    return config(recipe.adapter) | recipe.arguments
