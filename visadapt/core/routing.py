"""Mixed batches: every image passes through the weights of its own adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kinds import Delta, SiteModule

if TYPE_CHECKING:
    from .inject import WeightForward


def routed_forward(forward: WeightForward, x: Tensor, ids: list[str | None]) -> Tensor:
    """Output of one module where image i uses the pieces of adapter ids[i]; None is the base.

    Windows of one image stand together (image-major), so its id is repeated for them.
    """
    if not forward.pieces:
        return forward.apply(x, [])
    batch_dim = forward.pieces[0].site.batch_dim
    if batch_dim:
        return _batch_first(forward, x.movedim(batch_dim, 0), ids).movedim(0, batch_dim)
    return _batch_first(forward, x, ids)


def _batch_first(forward: WeightForward, x: Tensor, ids: list[str | None]) -> Tensor:
    repeats = x.shape[0] // len(ids)
    if repeats > 1:
        ids = [i for i in ids for _ in range(repeats)]
    by_owner: dict[str, list[SiteModule]] = {}
    for piece in forward.pieces:
        by_owner.setdefault(piece.owner, []).append(piece)
    used = {i for i in ids if i in by_owner}
    pieces = [p for name in used for p in by_owner[name]]
    if not used:
        return forward.apply(x, [])
    if isinstance(forward.module, nn.Linear) and all(
        isinstance(p, Delta) and not p.by_forward() and p.factors() is not None for p in pieces
    ):
        return _low_rank(forward, x, ids, by_owner)
    return _by_groups(forward, x, ids, by_owner)


def _by_groups(
    forward: WeightForward, x: Tensor, ids: list[str | None], by_owner: dict[str, list[SiteModule]]
) -> Tensor:
    """One pass per adapter over its own images: works for every weight adapter."""
    outputs: list[Tensor | None] = [None] * len(ids)
    for name in dict.fromkeys(ids):
        index = [i for i, other in enumerate(ids) if other == name]
        pieces = sorted(by_owner.get(name, []), key=lambda p: isinstance(p, Delta))
        for i, y in zip(index, forward.apply(x[index], pieces)):
            outputs[i] = y
    return torch.stack(outputs)


def _low_rank(
    forward: WeightForward, x: Tensor, ids: list[str | None], by_owner: dict[str, list[SiteModule]]
) -> Tensor:
    """The base product for all images together, then two thin batched products per slice of rows."""
    y = F.linear(x, forward.module.weight, forward.module.bias)
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    out = y.view(y.shape[0], -1, y.shape[-1])
    slices = dict.fromkeys(p.site.rows for pieces in by_owner.values() for p in pieces)
    for rows in slices:
        found = [next((p for p in by_owner.get(i, ()) if p.site.rows == rows), None) for i in ids]
        stacked = _stack(found, x)
        if stacked is None:
            continue
        down, up = stacked  # (B, i, r), (B, r, o)
        start, stop = rows or (0, y.shape[-1])
        thin = torch.bmm(flat, down.to(y.dtype))
        if torch.is_grad_enabled():
            out = out + F.pad(torch.bmm(thin, up.to(y.dtype)), (start, y.shape[-1] - stop))
        else:
            out[..., start:stop].baddbmm_(thin, up.to(y.dtype))
    return out.view_as(y)


def _stack(found: list[Delta | None], x: Tensor) -> tuple[Tensor, Tensor] | None:
    """A.T (B, i, r) and s B.T (B, r, o) of every image's piece, padded with zeros to the largest rank."""
    factors = {id(p): p.factors() for p in found if p is not None}
    if not factors:
        return None
    rank = max(a.shape[0] for a, _, _ in factors.values())
    a0, b0, _ = next(iter(factors.values()))
    zero = a0.new_zeros(rank, a0.shape[1]), b0.new_zeros(b0.shape[0], rank)
    ready = {None: zero}
    for piece in {id(p): p for p in found if p is not None}.values():
        a, b, scale = factors[id(piece)]
        gap = rank - a.shape[0]
        ready[id(piece)] = (F.pad(a, (0, 0, 0, gap)), F.pad(b * (scale * piece.scale), (0, gap)))
    pairs = [ready[None if p is None else id(p)] for p in found]
    return torch.stack([a for a, _ in pairs]).mT, torch.stack([b for _, b in pairs]).mT
