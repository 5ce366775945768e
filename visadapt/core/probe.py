"""A probe: what an adapted backbone answers to a fixed input. Stored with an adapter, compared when it is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import InputError

if TYPE_CHECKING:
    from .adapted import Adapted

TOLERANCE = 1e-2
"""Relative to max(1, |y|): other machines and precisions differ by less, a wrong base or adapter by more."""


@torch.no_grad()
def run_probe(adapted: Adapted, names: Sequence[str], num_frames: int | None = None) -> Tensor:
    """(D,) pooled vector of a seeded image of task 0, with exactly these adapters; everything stays as it was.

    Of clips it is that of the first frame; they have `num_frames`, or as many as `adapted.ctx` says.
    """
    backbone = adapted.backbone
    reference = next(backbone.parameters())
    side = 2 * backbone.patch
    generator = torch.Generator().manual_seed(0)
    before = adapted.ctx.num_frames
    frames = adapted.ctx.num_frames = num_frames or before
    image = torch.randn(frames, backbone.in_chans, side, side + backbone.patch, generator=generator)
    tasks = adapted.ctx.tasks
    adapted.ctx.tasks = torch.zeros(frames, dtype=torch.int64, device=reference.device)
    try:
        with evaluating(adapted), adapted.only(*names), torch.autocast(reference.device.type, enabled=False):
            return adapted(image.to(reference)).native[0].float().cpu()
    finally:
        adapted.ctx.tasks, adapted.ctx.num_frames = tasks, before


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """All parts in eval mode inside the block, each in its own mode again behind it."""
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def check_probe(
    adapted: Adapted, names: Sequence[str], stored: Tensor, path: str | os.PathLike, num_frames: int = 1
) -> float:
    """Largest difference from the stored answer, which is of clips of so many frames, relative to max(1, |y|).

    Raises:
        InputError: it exceeds the tolerance.
    """
    here = run_probe(adapted, names, num_frames)
    if here.shape != stored.shape:
        raise InputError(f"{path}: its probe has {stored.numel()} values, this backbone gives {here.numel()}")
    error = ((here - stored).abs() / stored.abs().clamp(min=1)).max().item()
    if not error <= TOLERANCE:
        raise InputError(f"{path}: the loaded adapter misses its stored probe by {error:.1e} (allowed {TOLERANCE:.0e})")
    return error
