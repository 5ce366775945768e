"""Sizes of attention projections against the threshold of "Computational Limits of LoRA" (arXiv 2406.03136).

The paper's statement is asymptotic: below sqrt(log N) for N tokens, gradients of low-rank updates of attention have
nearly linear-time approximations, above it no algorithm is much faster than quadratic time. Here it is a diagnosis of
activations and says nothing about the speed of this package. How it is read off a batch is our design.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapted import Adapted
from ..core.inject import WeightForward, effective
from ..core.sites import Site
from ..errors import InputError


@torch.no_grad()
def attention_norms(adapted: Adapted, images: Tensor) -> list[dict[str, Any]]:
    """Largest entries of X W.T + b over q, k and v of every attention, divided by sqrt(ln N).

    Args:
        adapted: backbone with its enabled adapters.
        images: (B, C, H, W), normalised.

    Returns:
        Per layer: part, layer, tokens N, `base` without adapters, `change` what enabled weight adapters add, `adapted`
        both together, `crosses` where the adapters push a layer from below 1 to above it.

    Raises:
        InputError: the backbone has no q, k, v.
    """
    sites = [s for s in adapted.backbone.sites() if s.role in ("q", "k", "v")]
    if not sites:
        raise InputError(f"{type(adapted.backbone).__name__} has no sites q, k, v whose norms could be measured")
    inputs: dict[str, Tensor] = {}
    handles = [
        adapted.backbone.body.get_submodule(path).register_forward_pre_hook(_Keep(inputs, path))
        for path in {s.path for s in sites}
    ]
    try:
        adapted(images)
    finally:
        for handle in handles:
            handle.remove()
    layers: dict[tuple[str, int], list[Site]] = {}
    for site in sites:
        layers.setdefault((site.part, site.layer), []).append(site)
    return [_row(part, layer, found, adapted.backbone.body, inputs) for (part, layer), found in layers.items()]


class _Keep:
    def __init__(self, inputs: dict[str, Tensor], path: str) -> None:
        self.inputs, self.path = inputs, path

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self.inputs[self.path] = args[0]


def _row(part: str, layer: int, sites: list[Site], body: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    sizes = [list(_sizes(s, body.get_submodule(s.path), inputs[s.path])) for s in sites]
    x, batch_dim = inputs[sites[0].path], sites[0].batch_dim
    tokens = x[..., 0].numel() // x.shape[batch_dim]
    base, change, both = (max(values) / math.sqrt(math.log(tokens)) for values in zip(*sizes))
    return {
        "part": part,
        "layer": layer,
        "tokens": tokens,
        "base": base,
        "change": change,
        "adapted": both,
        "crosses": base <= 1 < both,
    }


def _sizes(site: Site, module: nn.Module, x: Tensor) -> Iterator[float]:
    """Largest magnitude of the projection by the base, by the change alone, and by both."""
    forward = module.__dict__.get("forward")
    pieces = forward.ordered() if isinstance(forward, WeightForward) else []
    weight, bias = effective(module.weight, module.bias, pieces)
    rows = slice(*(site.rows or (None,)))
    base = F.linear(x, module.weight, module.bias)[..., rows]
    both = F.linear(x, weight, bias)[..., rows]
    for values in (base, both - base, both):
        yield values.abs().max().item()
