"""Attention whose heads look into other frames of a clip, by shifting keys and values in time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.context import Context
from ...core.kinds import AttnCore
from ...core.sites import Site
from ...errors import InputError

Offsets = tuple[tuple[int, int], ...]


def checked_offsets(owner: str, offsets: Sequence[Sequence[int]]) -> Offsets:
    """Pairs (offset, heads) as tuples.

    Raises:
        InputError: a pair of another form, an offset 0, or no heads.
    """
    for pair in offsets:
        if not isinstance(pair, Sequence) or len(pair) != 2 or pair[0] == 0 or pair[1] < 1:
            raise InputError(f"{owner}: offsets are pairs (shift not 0, heads from 1 on), got {pair!r}")
    return tuple(tuple(pair) for pair in offsets)


def shift_frames(x: Tensor, offset: int) -> Tensor:
    """x (clips, frames, ...) with frame t replaced by frame t - offset; frames without a source keep their own."""
    if offset > 0:
        return torch.cat([x[:, :offset], x[:, :-offset]], 1)
    return torch.cat([x[:, -offset:], x[:, offset:]], 1)


class ShiftedAttention(AttnCore):
    """Softmax attention whose leading heads see keys and values of other frames.

    Args:
        site: an attention.
        offsets: pairs (offset d, number of heads), laid out from the first head on.
        heads: of the attention.
        owner: the method, for messages.

    Raises:
        InputError: more heads are asked for than there are.
    """

    def __init__(self, site: Site, offsets: Offsets, heads: int, owner: str) -> None:
        super().__init__(site)
        if (wanted := sum(count for _, count in offsets)) > heads:
            raise InputError(f"{owner}: offsets take {wanted} heads, {site.path} has {heads}; give fewer")
        self.offsets, self.method = offsets, owner

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, ctx: Context) -> Tensor:
        if ctx.num_frames > 1 and self.offsets:
            k, v = self._shift(k, ctx), self._shift(v, ctx)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def _shift(self, x: Tensor, ctx: Context) -> Tensor:
        """(B, heads, L, head_dim) shifted; windows of an image stand together, so B may be images * windows."""
        clips, frames = ctx.clips(self.method), ctx.num_frames
        reach = max(abs(offset) for offset, _ in self.offsets)
        if reach >= frames:
            raise InputError(f"{self.method}: offset {reach} needs clips of more than {reach} frames, got {frames}")
        x = x.reshape(clips, frames, -1, *x.shape[1:])  # (clips, frames, windows, heads, L, head_dim)
        widths = [heads for _, heads in self.offsets]
        *moved, rest = x.split([*widths, x.shape[3] - sum(widths)], dim=3)
        moved = [shift_frames(part, offset) for part, (offset, _) in zip(moved, self.offsets)]
        return torch.cat([*moved, rest], 3).flatten(0, 2)
