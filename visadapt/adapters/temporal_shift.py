"""Attention across the frames of a clip, by shifting keys and values in time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..core.adapter import Adapter
from ..core.sites import Site
from ..errors import InputError
from ..registry import ADAPTERS
from ._common.shifted_attention import ShiftedAttention, checked_offsets


@ADAPTERS.register_module()
class TemporalShift(Adapter):
    """Spatial attention becomes spatio-temporal at no cost: some heads read the keys and values of other frames.

    For a head with offset d, frame t attends to K and V of frame t - d, queries staying its own; a frame without a
    source keeps its own K and V. Images of a batch are frame-major, index b * T + t with T = `ctx.num_frames`; with
    T = 1 nothing changes. It has no parameters and is meant to stand beside an adapter that has; with linear adapters
    it is `ZeroI2V`.

    Args:
        offsets: pairs (offset d, number of heads), laid out from the first head on; the other heads stay spatial.
        layers: block indices.
    """

    kinds = ("attention",)
    targets = ("attn",)
    roles = ("attn",)
    needs = frozenset({"attention", "tokens"})
    paper = "the STDHA of ZeroI2V (Li et al., 2023), arXiv 2310.01324"
    identity_at_init = False

    def __init__(
        self, offsets: Sequence[tuple[int, int]] = ((1, 1), (-1, 1)), layers: Sequence[int] | None = None
    ) -> None:
        super().__init__(layers=layers)
        if not offsets:
            raise InputError("TemporalShift: offsets are empty; give pairs (shift, heads), e.g. [[1, 1], [-1, 1]]")
        self.offsets = checked_offsets("TemporalShift", offsets)

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> ShiftedAttention:
        heads = backbone.attention(site.path).module.num_heads
        return ShiftedAttention(site, self.offsets, heads, "TemporalShift")
