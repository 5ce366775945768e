"""What the optimizers of this package share: AdamW for all parameters that they have no rule of their own for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..errors import InputError

OWN = {
    "pairs": ("pairs of factors", "LoRA"),
    "matrices": ("weight matrices of the backbone", "FullFineTune"),
}
"""Sorts of groups with a rule of their own: what is in them, and an adapter that trains such parameters."""


class AdamWBase(torch.optim.Optimizer):
    """AdamW, of which subclasses update the groups of one sort in their own way.

    State is kept as plain tensors and numbers, so that a checkpoint loads without running code.

    Args:
        params: parameter groups, as `TrainableGroups` makes them.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times the learning rate.
        settings: the subclass's own, by name; a group may have others.

    Attributes:
        own: "pairs" for groups with params [A1, B1, A2, B2, ...] and the key `pairs`, the scale s of each update
            s B A; "matrices" for groups of base weights, with the key `matrices`. `TrainableGroups` reads it.

    Raises:
        InputError: a number out of range, or no group of the subclass's sort.
    """

    own: ClassVar[str]

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: Sequence[float],
        eps: float,
        weight_decay: float,
        settings: dict[str, Any],
    ) -> None:
        name = type(self).__name__
        for what, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise InputError(f"{name}: {what} must be at least 0, got {value}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise InputError(f"{name}: betas are two numbers in [0, 1), got {tuple(betas)}")
        common = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, common | settings)
        if not any(self.own in group for group in self.param_groups):
            what, adapter = OWN[self.own]
            raise InputError(
                f"{name} works on {what} and none trains; use an adapter that has them, e.g. {adapter}, and "
                "optim_wrapper.constructor=TrainableGroups"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        device = self.param_groups[0]["params"][0].device.type
        with torch.autocast(device, enabled=False):  # products of factors would lose their digits
            for group in self.param_groups:
                if self.own in group:
                    self.update(group)
                else:
                    self.plain(group)
        return loss

    def update(self, group: dict[str, Any]) -> None:
        """One step of a group of the subclass's sort."""
        raise NotImplementedError

    def plain(self, group: dict[str, Any]) -> None:
        """One step of any other group."""
        self.adamw(group, [(p, p.grad) for p in group["params"] if p.grad is not None])

    def adamw(self, group: dict[str, Any], moves: list[tuple[Tensor, Tensor]]) -> None:
        """torch's AdamW for (parameter, gradient)."""
        if not moves:
            return
        states = [self.state[p] for p, _ in moves]
        for state, (p, _) in zip(states, moves):
            if not state:
                state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        beta1, beta2 = group["betas"]
        adamw(
            [p for p, _ in moves],
            [grad for _, grad in moves],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )


def moments(state: dict[str, Any], grad: Tensor, group: dict[str, Any], name: str = "") -> tuple[Tensor, Tensor]:
    """Adam's moments, kept as <name>exp_avg and <name>exp_avg_sq, after this gradient; they start at zero."""
    keys, (beta1, beta2) = (f"{name}exp_avg", f"{name}exp_avg_sq"), group["betas"]
    for key in keys:
        if key not in state:
            state[key] = torch.zeros_like(grad)
    first, second = (state[key] for key in keys)
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    return first, second


def adam_ratio(state: dict[str, Any], grad: Tensor, step: int, group: dict[str, Any], name: str = "") -> Tensor:
    """Adam's direction m / (sqrt(v) + eps) after this gradient, the moments corrected for their start at zero.

    Args:
        state: keeps the moments.
        grad: enters the moments.
        step: number of this gradient, from 1.
        group: has betas and eps.
        name: of the value that the gradient belongs to.
    """
    first, second = moments(state, grad, group, name)
    beta1, beta2 = group["betas"]
    root = second.div(1 - beta2**step).sqrt_().add_(group["eps"])
    return first.div(1 - beta1**step).div_(root)
