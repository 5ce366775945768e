"""Time of one attention with another core, against the softmax that it rewrites written out."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..core.adapted import Adapted
from ..core.kinds import AttnCore
from .setup import Setup
from .timing import interleaved, ratio

ROUNDS = 30
"""Rounds of one attention per round of a training step, which takes far longer: few are mostly noise."""


def attention_ratio(setup: Setup, adapted: Adapted) -> dict[str, float]:
    """Forward and backward of the first attention that has another core, over timm's own with softmax written out.

    It is given as it is, and with torch's products on both sides: those around our cores are faster on some CPUs.

    Args:
        setup: what is measured.
        adapted: backbone with the method, in training mode; nothing is given back for one without attention cores.
    """
    core = next((p for p in adapted.pieces() if isinstance(p, AttnCore)), None)
    if core is None:
        return {}
    path = core.site.path
    candidates = {"ours": step(setup, adapted, path), "explicit": step(setup, explicit(setup, path), path)}
    candidates["ours by torch"] = by_torch(candidates["ours"])
    times = interleaved(candidates, ROUNDS * setup.rounds, setup.device)
    found = {"attention_over_explicit": "ours", "attention_by_torch_over_explicit": "ours by torch"}
    return {key: ratio(times, name, "explicit") for key, name in found.items()}


def explicit(setup: Setup, path: str) -> Adapted:
    """The bare backbone, with softmax written out in one attention."""
    plain = Adapted(setup.backbone())
    plain.backbone.body.get_submodule(path).fused_attn = False
    return plain


def by_torch(run: Callable[[], None]) -> Callable[[], None]:
    """The same without oneDNN."""

    def switched() -> None:
        given, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
        try:
            run()
        finally:
            torch.backends.mkldnn.enabled = given

    return switched


def step(setup: Setup, adapted: Adapted, path: str) -> Callable[[], None]:
    """Forward pass of one attention, and its backward pass to the input and to what trains."""
    backbone, images = adapted.backbone, setup.images(setup.batch)
    attention, grid = backbone.body.get_submodule(path), backbone.grid(images)
    count = backbone.prefix + grid[0] * grid[1]
    x = torch.randn(len(images), count, backbone.embed_dims[-1], device=setup.device, requires_grad=True)

    def run() -> None:
        adapted.ctx.begin(images, grid, backbone.prefix)
        attention(x).square().mean().backward()
        x.grad = None
        adapted.zero_grad()

    return run
