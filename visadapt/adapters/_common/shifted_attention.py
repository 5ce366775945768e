"""Attention whose heads look into other frames of a clip, by shifting keys and values in time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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
        fits = isinstance(pair, Sequence) and [type(number) for number in pair] == [int, int]
        if not fits or pair[0] == 0 or pair[1] < 1:
            raise InputError(f"{owner}: offsets are pairs of integers (shift not 0, heads from 1 on), got {pair!r}")
    return tuple(tuple(pair) for pair in offsets)


class ShiftFrames(torch.autograd.Function):
    """Heads with frame t replaced by frame t - offset; frames without a source keep their own.

    The tensor and its gradient are copied once, where slices and `torch.cat` would do so four times.

    Args:
        x: (clips, frames, windows, heads, L, head_dim).
        offsets: pairs (offset, number of heads), laid out from the first head on; the other heads stay as they are.
    """

    @staticmethod
    def forward(ctx, x: Tensor, offsets: Offsets) -> Tensor:
        ctx.offsets = offsets
        y = x.clone()
        for heads, target, source in _parts(offsets):
            y[:, target, :, heads] = x[:, source, :, heads]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        by_x = grad.clone()
        for heads, target, source in _parts(ctx.offsets):
            by_x[:, target, :, heads] = 0
            by_x[:, source, :, heads] += grad[:, target, :, heads]
        return by_x, None


def _parts(offsets: Offsets) -> Iterator[tuple[slice, slice, slice]]:
    """Heads of every part, the frames that get another's, and whose they get."""
    first = 0
    for offset, count in offsets:
        later, earlier = slice(abs(offset), None), slice(-abs(offset))
        yield slice(first, first + count), *((later, earlier) if offset > 0 else (earlier, later))
        first += count


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
            clips, frames = ctx.clips(self.method), ctx.num_frames
            if (reach := max(abs(offset) for offset, _ in self.offsets)) >= frames:
                raise InputError(f"{self.method}: offset {reach} needs clips of more than {reach} frames, got {frames}")
            # Windows of an image stand together: (clips, frames, windows, heads, L, head_dim).
            k, v = (ShiftFrames.apply(x.unflatten(0, (clips, frames, -1)), self.offsets).flatten(0, 2) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
