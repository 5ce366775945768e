"""The lean adapter: one bottleneck a block."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..core.adapter import Adapter
from ..core.sites import Site
from ..registry import ADAPTERS
from ._common.bottleneck import SerialBottleneck


@ADAPTERS.register_module()
class Pfeiffer(Adapter):
    """A bottleneck behind the MLP only, before the residual sum: y' = y + up(ReLU(down(y))).

    y is the MLP's output before LayerScale: where a network scales its branches by small numbers, as a randomly
    initialised DINOv2 does with 1e-5, the change is scaled with them. Parameters per block: 2 D r + D + r.

    Args:
        width: inner width r.
        targets: roles of sub-layers.
        layers: block indices.
    """

    kinds = ("tokens",)
    targets = ("mlp",)
    roles = ("attn", "mlp", "xattn")
    paper = "AdapterFusion (Pfeiffer et al., 2020), arXiv 2005.00247"

    def __init__(
        self, width: int = 48, targets: Sequence[str] | None = None, layers: Sequence[int] | None = None
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(width=width)
        self.width = width

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> SerialBottleneck:
        return SerialBottleneck(site, self.width, nn.ReLU())
