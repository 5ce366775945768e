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
        counts = [count for _, count in offsets]
        self.counts = [*counts, heads - sum(counts)] if sum(counts) < heads else counts

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, ctx: Context) -> Tensor:
        if ctx.num_frames == 1 or not self.offsets:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        clips, frames = ctx.clips(self.method), ctx.num_frames
        if (reach := max(abs(offset) for offset, _ in self.offsets)) >= frames:
            raise InputError(f"{self.method}: offset {reach} needs clips of more than {reach} frames, got {frames}")
        # Heads of one offset at a time: the others, most of them, are read where they lie.
        parts = zip(*(x.split(self.counts, 1) for x in (q, k, v)), self._split(bias))
        found = []
        for (q, *kv, bias), (offset, _) in zip(parts, [*self.offsets, (0, 0)]):
            if offset:  # windows of an image stand together
                kv = (_from_frames(x.unflatten(0, (clips, frames, -1)), offset).flatten(0, 2) for x in kv)
            found.append(F.scaled_dot_product_attention(q, *kv, attn_mask=bias).transpose(1, 2))
        return torch.cat(found, 2).transpose(1, 2)

    def _split(self, bias: Tensor | None) -> Sequence[Tensor | None]:
        """(..., L, S) for the heads of each part."""
        if bias is None or bias.dim() < 3 or bias.shape[-3] == 1:
            return [bias] * len(self.counts)
        return bias.split(self.counts, -3)


def _from_frames(x: Tensor, offset: int) -> Tensor:
    """(clips, frames, ...) with frame t replaced by frame t - offset; frames without a source keep their own."""
    if offset > 0:
        return torch.cat((x[:, :offset], x[:, :-offset]), 1)
    return torch.cat((x[:, -offset:], x[:, offset:]), 1)
