"""Attention across the frames of a clip, by shifting keys and values in time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.context import Context
from ..core.kinds import AttnCore
from ..core.sites import Site
from ..errors import InputError
from ..registry import ADAPTERS


def shift_frames(x: Tensor, offset: int) -> Tensor:
    """x (clips, frames, ...) with frame t replaced by frame t - offset; frames without a source keep their own."""
    if offset > 0:
        return torch.cat([x[:, :offset], x[:, :-offset]], 1)
    return torch.cat([x[:, -offset:], x[:, offset:]], 1)


class ShiftedAttention(AttnCore):
    """Softmax attention whose leading heads see keys and values of other frames."""

    def __init__(self, site: Site, offsets: tuple[tuple[int, int], ...]) -> None:
        super().__init__(site)
        self.offsets = offsets

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, ctx: Context) -> Tensor:
        if ctx.num_frames > 1:
            k, v = self._shift(k, ctx), self._shift(v, ctx)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def _shift(self, x: Tensor, ctx: Context) -> Tensor:
        """(B, heads, L, head_dim) shifted; windows of an image stand together, so B may be images * windows."""
        images, frames = ctx.image.shape[0], ctx.num_frames
        if images % frames:
            raise InputError(f"TemporalShift: {images} images are no whole number of clips of {frames} frames")
        reach = max(abs(offset) for offset, _ in self.offsets)
        if reach >= frames:
            raise InputError(f"TemporalShift: offset {reach} needs clips of more than {reach} frames, got {frames}")
        x = x.reshape(images // frames, frames, -1, *x.shape[1:])  # (clips, frames, windows, heads, L, head_dim)
        widths = [heads for _, heads in self.offsets]
        *moved, rest = x.split([*widths, x.shape[3] - sum(widths)], dim=3)
        moved = [shift_frames(part, offset) for part, (offset, _) in zip(moved, self.offsets)]
        return torch.cat([*moved, rest], 3).flatten(0, 2)


@ADAPTERS.register_module()
class TemporalShift(Adapter):
    """Spatial attention becomes spatio-temporal at no cost: some heads read the keys and values of other frames.

    For a head with offset d, frame t attends to K and V of frame t - d, queries staying its own; a frame without a
    source keeps its own K and V. Images of a batch are frame-major, index b * T + t with T = `ctx.num_frames`; with
    T = 1 nothing changes. It has no parameters and is meant to stand beside an adapter that has.

    Args:
        offsets: pairs (offset d, number of heads), laid out from the first head on; the other heads stay spatial.
        layers: block indices.
    """

    kinds = ("attention",)
    targets = ("attn",)
    roles = ("attn",)
    needs = frozenset({"attention"})
    paper = "the STDHA of ZeroI2V (Li et al., 2023), arXiv 2310.01324"
    identity_at_init = False

    def __init__(
        self, offsets: Sequence[tuple[int, int]] = ((1, 1), (-1, 1)), layers: Sequence[int] | None = None
    ) -> None:
        super().__init__(layers=layers)
        if not offsets:
            raise InputError("TemporalShift: offsets are empty; give pairs (shift, heads), e.g. [[1, 1], [-1, 1]]")
        for pair in offsets:
            if not isinstance(pair, Sequence) or len(pair) != 2 or pair[0] == 0 or pair[1] < 1:
                raise InputError(f"TemporalShift: offsets are pairs (shift not 0, heads from 1 on), got {pair!r}")
        self.offsets = tuple(tuple(pair) for pair in offsets)

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> ShiftedAttention:
        wanted = sum(heads for _, heads in self.offsets)
        if wanted > (heads := backbone.attention(site.path).module.num_heads):
            raise InputError(f"TemporalShift: offsets take {wanted} heads, {site.path} has {heads}; give fewer")
        return ShiftedAttention(site, self.offsets)
