"""Hooks that act on every training step."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import Hook
from torch import Tensor, nn

from ..checkpoint import unwrap
from ..errors import InputError


class StepSeed(Hook):
    """Draws of a step depend on (seed, step, rank) alone, so that a resumed run repeats them exactly."""

    priority = "VERY_HIGH"

    def before_train_iter(self, runner, batch_idx: int, data_batch: Any = None) -> None:
        torch.manual_seed((runner.seed or 0) * 1_000_003 + runner.iter * 1009 + runner.rank)


class TrainableEMA(Hook):
    """Moving average of what trains. It is in the model from a validation to the next training step, and at the end.

    Args:
        momentum: weight of the newest values.
    """

    priority = "VERY_HIGH"

    def __init__(self, momentum: float = 0.001) -> None:
        if not 0 < momentum <= 1:
            raise InputError(f"TrainableEMA: momentum must be in (0, 1], got {momentum}")
        self.momentum = momentum
        self.average: dict[str, Tensor] = {}
        self.inside = False

    def before_train(self, runner) -> None:
        if not self.average:
            self.average = {n: p.detach().clone() for n, p in self._trainable(runner)}

    def before_train_iter(self, runner, batch_idx: int, data_batch: Any = None) -> None:
        self._put(runner, inside=False)

    def after_train_iter(self, runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        for name, parameter in self._trainable(runner):
            self.average[name].lerp_(parameter.detach(), self.momentum)

    def before_val_epoch(self, runner) -> None:
        self._put(runner, inside=True)

    def after_train(self, runner) -> None:
        self._put(runner, inside=True)

    def _put(self, runner, inside: bool) -> None:
        if self.average and self.inside != inside:
            self._swap(runner)
            self.inside = inside

    @torch.no_grad()
    def _swap(self, runner) -> None:
        for name, parameter in self._trainable(runner):
            kept = parameter.clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(kept)

    @staticmethod
    def _trainable(runner) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in unwrap(runner.model).named_parameters() if p.requires_grad]

    def state_dict(self) -> dict[str, Any]:
        """`average` holds the raw values while the averages are in the model."""
        return {"average": {n: v.cpu().clone() for n, v in self.average.items()}, "inside": self.inside}

    def load_state_dict(self, state: dict[str, Any], runner) -> None:
        device = next(unwrap(runner.model).parameters()).device
        self.average = {n: v.to(device) for n, v in state["average"].items()}
        self.inside = state["inside"]


class EarlyStop(Hook):
    """End training when a metric has not improved for some validations.

    Args:
        monitor: name of the metric.
        patience: validations without improvement.
        rule: "greater" or "less" is better.
        min_delta: smallest change that counts.
    """

    priority = "VERY_LOW"

    def __init__(self, monitor: str = "top1", patience: int = 5, rule: str = "greater", min_delta: float = 0.0) -> None:
        if rule not in ("greater", "less"):
            raise InputError(f"EarlyStop: rule is 'greater' or 'less', got '{rule}'")
        if patience < 1:
            raise InputError(f"EarlyStop: patience must be at least 1, got {patience}")
        self.monitor, self.patience, self.min_delta = monitor, patience, min_delta
        self.sign = 1 if rule == "greater" else -1
        self.best = float("-inf")
        self.waited = 0

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        value = self.sign * metric_value(metrics, self.monitor, "EarlyStop")
        if value > self.best + self.min_delta:  # never so for NaN
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            runner.train_loop.stop_training = True

    def before_train(self, runner) -> None:
        runner.train_loop.stop_training = self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any], runner) -> None:
        self.best, self.waited = state["best"], state["waited"]


def metric_value(metrics: dict | None, name: str, who: str) -> float:
    """One metric by name, or an error that lists those that exist."""
    if name not in (metrics or {}):
        raise InputError(f"{who}: no metric '{name}'; the evaluator gives {', '.join(metrics or {}) or 'none'}")
    return metrics[name]
