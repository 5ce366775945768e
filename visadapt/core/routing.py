"""Mixed batches: every image passes through the weights of its own adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kinds import Delta, SiteModule
from .products import linear

if TYPE_CHECKING:
    from .inject import WeightForward


def routed_forward(forward: WeightForward, x: Tensor, ids: list[str | None]) -> Tensor:
    """Output of one module where image i uses the pieces of adapter ids[i]; None is the base.

    Windows of one image stand together (image-major), so its id is repeated for them.
    """
    if not forward.pieces:
        return forward.base(x)
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
        return forward.base(x)
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
    """The base product for all images together, then two thin batched products; slices of rows share the first."""
    y = linear(x, forward.module.weight, forward.module.bias)
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    out = y.view(y.shape[0], -1, y.shape[-1])
    slices = list(dict.fromkeys(p.site.rows for pieces in by_owner.values() for p in pieces))
    stacked = {rows: s for rows in slices if (s := _stack(_pieces_at(rows, ids, by_owner))) is not None}
    down = torch.cat([a for a, _ in stacked.values()], 1) if len(stacked) > 1 else next(iter(stacked.values()))[0]
    thin = torch.bmm(flat, down.mT.to(y.dtype)).split([a.shape[1] for a, _ in stacked.values()], 2)
    for (rows, (_, up)), part in zip(stacked.items(), thin):
        start, stop = rows or (0, y.shape[-1])
        up = up.mT.to(y.dtype)
        if torch.is_grad_enabled():
            out = out + F.pad(torch.bmm(part, up), (start, y.shape[-1] - stop))
        else:
            out[..., start:stop].baddbmm_(part, up)
    return out.view_as(y)


def _pieces_at(
    rows: tuple[int, int] | None, ids: list[str | None], by_owner: dict[str, list[SiteModule]]
) -> list[Delta | None]:
    """Every image's piece at one slice of rows."""
    at = {name: p for name, pieces in by_owner.items() for p in pieces if p.site.rows == rows}
    return [at.get(i) for i in ids]


def _stack(found: list[Delta | None]) -> tuple[Tensor, Tensor] | None:
    """A (B, r, i) and s B (B, o, r) of every image's piece, padded with zeros to the largest rank."""
    factors = {p: p.factors() for p in dict.fromkeys(found) if p is not None}
    if not factors:
        return None
    rank = max(a.shape[0] for a, _, _ in factors.values())
    first_a, first_b, _ = next(iter(factors.values()))
    ready = {None: (first_a.new_zeros(rank, first_a.shape[1]), first_b.new_zeros(first_b.shape[0], rank), 0.0)}
    for piece, (a, b, scale) in factors.items():
        if gap := rank - a.shape[0]:
            a, b = F.pad(a, (0, 0, 0, gap)), F.pad(b, (0, gap))
        ready[piece] = (a, b, scale * piece.scale)
    chosen = [ready[p] for p in found]
    scales = torch.tensor([s for _, _, s in chosen], device=first_b.device, dtype=first_b.dtype).view(-1, 1, 1)
    return torch.stack([a for a, _, _ in chosen]), torch.stack([b for _, b, _ in chosen]) * scales
