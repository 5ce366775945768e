"""ALLoRA: every row of B has a learning rate that falls as the row grows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from mmengine.registry import OPTIMIZERS
from torch import Tensor

from ..errors import InputError, hint
from ._adamw import AdamWBase

MODES = ("step", "grad")


@OPTIMIZERS.register_module()
class ALLoRA(AdamWBase):
    """Adaptive learning rates for LoRA without dropout and scaling (ALLoRA, 2024).

    Row n of B (o, r) is given the factor 1 / sqrt(|B_n| + 1 / eta^2), that is eta for a row of zeros. A and all other
    parameters train by plain AdamW. The paper's LoRA has no dropout and s = 1: `dict(type=LoRA, rank=8)`.

    The paper scales gradients. Adam does not see a constant factor on those, so that our design scales the step; there
    is no official code to compare with, and the formula is as far as it is known second-hand.

    Args:
        params: groups with pairs, from `TrainableGroups`.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times the learning rate.
        eta: the factor of a row of zeros.
        mode: "step" gives row n the learning rate lr times its factor; "grad" scales its gradient before AdamW.

    Raises:
        InputError: an unknown mode, a number out of range, or no pairs.
    """

    own = "pairs"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        eta: float = 2.0,
        mode: str = "step",
    ) -> None:
        if mode not in MODES:
            raise InputError(f"ALLoRA: unknown mode '{mode}'{hint(mode, MODES)}")
        if not eta > 0:
            raise InputError(f"ALLoRA: eta must be above 0, got {eta}")
        super().__init__(params, lr, betas, eps, weight_decay, {"eta": eta, "mode": mode})

    def update(self, group: dict[str, Any]) -> None:
        lower, upper = ([p for p in group["params"][n::2] if p.grad is not None] for n in (0, 1))
        factors = [row_factors(b, group["eta"]) for b in upper]
        if group["mode"] == "grad":
            self.adamw(group, [(a, a.grad) for a in lower] + [(b, f * b.grad) for b, f in zip(upper, factors)])
            return
        before = [b.clone() for b in upper]
        self.adamw(group, [(p, p.grad) for p in (*lower, *upper)])
        for b, old, factor in zip(upper, before, factors):
            b.copy_(torch.lerp(old, b, factor))


def row_factors(b: Tensor, eta: float) -> Tensor:
    """1 / sqrt(|b_n| + 1 / eta^2) for the rows of b (o, r): (o, 1)."""
    return (b.norm(dim=1, keepdim=True) + eta**-2).rsqrt()
