"""Statistics of the task's data at the untouched base, for methods whose start depends on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

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

INPUT_MOMENTS = "input moments"
"""The other statistic: it needs the inputs of the sites and no gradient."""


def measured(
    adapted: Adapted, sites: Sequence[Site], losses: Iterable[Callable[[], Tensor]], statistic: str
) -> dict[str, Tensor]:
    """`input_moments` or `weight_gradients`, as `statistic` says."""
    if statistic == INPUT_MOMENTS:
        return input_moments(adapted, sites, losses)
    return weight_gradients(adapted, sites, losses, statistic)


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


class _Moments:
    """Pre-hook of a linear or convolution: sums x.T x over what the weight is multiplied with."""

    def __init__(self) -> None:
        self.total, self.count = 0, 0

    def __call__(self, module: nn.Module, args: tuple) -> None:
        x = args[0].float()
        if isinstance(module, nn.Conv2d):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = F.pad(x, module._reversed_padding_repeated_twice, mode)
            x = F.unfold(x, module.kernel_size, module.dilation, 0, module.stride).transpose(1, 2)
        x = x.reshape(-1, x.shape[-1])
        self.total, self.count = self.total + x.T @ x, self.count + len(x)


@torch.no_grad()
def input_moments(adapted: Adapted, sites: Sequence[Site], losses: Iterable[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Mean of x.T x over all positions x of the inputs of linears and convolutions, all adapters off.

    Args:
        adapted: backbone with the adapters; modes and switches are as before afterwards.
        sites: linears and convolutions.
        losses: one function per batch that runs the model.

    Returns:
        By site key (weights per output, weights per output) in float32; slices of one weight share one tensor. Averaged
        over the processes of a distributed run.

    Raises:
        InputError: no batches.
    """
    body, moments = adapted.backbone.body, {site.path: _Moments() for site in sites}
    hooks = [body.get_submodule(path).register_forward_pre_hook(found) for path, found in moments.items()]
    try:
        with evaluating(adapted), adapted.only():
            for loss in losses:
                loss()
    finally:
        for hook in hooks:
            hook.remove()
    if unseen := [path for path, found in moments.items() if not found.count]:
        raise InputError(f"a start from the inputs of layers needs a batch of training data that reaches {unseen[0]}")
    means = {path: mean_over_processes(found.total / found.count) for path, found in moments.items()}
    return {site.key: means[site.path] for site in sites}


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of a tensor over the processes of a distributed run, in place; as it is where there is one process."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value
