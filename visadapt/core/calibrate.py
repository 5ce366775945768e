"""Gradients of the task at the untouched base, for methods whose start depends on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError
from .probe import evaluating
from .sites import Site

if TYPE_CHECKING:
    from .adapted import Adapted

STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gradient": lambda weight, gradient: gradient,
    "absolute gradient": lambda weight, gradient: gradient.abs(),
    "saliency": lambda weight, gradient: (weight * gradient).abs(),
}
"""What can be averaged over batches, of the base weight and the gradient with respect to it."""


def weight_gradients(
    adapted: Adapted, sites: Sequence[Site], losses: Iterable[Callable[[], Tensor]], statistic: str
) -> dict[str, Tensor]:
    """Mean over batches of the gradient with respect to the base weights, all adapters off and no dropout in the base.

    Args:
        adapted: backbone with the adapters; modes, switches and `requires_grad` are as before afterwards.
        sites: linears and convolutions.
        losses: one function per batch that runs the model and gives its scalar loss.
        statistic: one of `STATISTICS`.

    Returns:
        By site key (dim_out, weights per output) in float32; averaged over the processes of a distributed run.

    Raises:
        InputError: no batches.
    """
    weights = {s.path: adapted.backbone.body.get_submodule(s.path).weight for s in sites}
    before = {path: weight.requires_grad for path, weight in weights.items()}
    totals = {path: torch.zeros_like(weight, dtype=torch.float32) for path, weight in weights.items()}
    count = 0
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        with evaluating(adapted), adapted.only(), torch.enable_grad():
            for loss in losses:
                gradients = torch.autograd.grad(loss(), list(weights.values()))
                for total, weight, gradient in zip(totals.values(), weights.values(), gradients):
                    total += STATISTICS[statistic](weight.detach(), gradient)
                count += 1
    finally:
        for path, weight in weights.items():
            weight.requires_grad_(before[path])
    if not count:
        raise InputError("a start from gradients needs at least one batch of training data")
    means = {path: mean_over_processes(total / count) for path, total in totals.items()}
    return {s.key: means[s.path][slice(*(s.rows or (None,)))].flatten(1) for s in sites}


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of a tensor over the processes of a distributed run, in place; as it is where there is one process."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value
