"""Losses on two random passes of the same images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from ..errors import InputError
from ..registry import LOSSES


def symmetric_kl(first: Tensor, second: Tensor) -> Tensor:
    """Half of KL(sg p2 || p1) + KL(sg p1 || p2), summed over classes, mean over the batch, in float32.

    Args:
        first: logits (B, K) of p1.
        second: logits (B, K) of p2; no gradient passes through the distribution that is the target (sg).

    Returns:
        A scalar.
    """
    log_p1, log_p2 = log_softmax(first.float(), 1), log_softmax(second.float(), 1)
    terms = [(log_p1, log_p2), (log_p2, log_p1)]
    return sum(kl_div(p, target.detach(), reduction="batchmean", log_target=True) for p, target in terms) / 2


@LOSSES.register_module()
class Consistency(nn.Module):
    """loss(first) + second loss(second) + weight symmetric KL(first, second) of two passes of the same images.

    For adapters that are random in training (drawn experts, dropout): both passes run together as one batch, each with
    draws of its own. The defaults are those of the official training of MoSA (arXiv 2312.02923).

    Args:
        loss: config of the loss on class scores; cross-entropy where None.
        weight: of the divergence.
        second: weight of the loss of the second pass, which 0 leaves out.

    Raises:
        InputError: a negative weight, or a loss that takes two passes itself.
    """

    views = 2

    def __init__(self, loss: dict[str, Any] | None = None, weight: float = 1.0, second: float = 0.0) -> None:
        super().__init__()
        for name, value in (("weight", weight), ("second", second)):
            if not value >= 0:
                raise InputError(f"Consistency: {name} must be 0 or more, got {value}")
        self.loss = LOSSES.build(loss or {"type": "CrossEntropy"})
        if hasattr(self.loss, "views"):
            raise InputError(f"Consistency: loss is that of one pass, got {type(self.loss).__name__}; take another")
        self.weight, self.second = weight, second

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """logits (2B, K), the second pass behind the first, target (B,) int64 or (B, K) shares, to a scalar."""
        if len(logits) != 2 * len(target):
            raise InputError(f"Consistency: {len(target)} images need twice as many logits, got {len(logits)}")
        first, second = logits.chunk(2)
        total = self.loss(first, target) + self.weight * symmetric_kl(first, second)
        return total + self.second * self.loss(second, target) if self.second else total
