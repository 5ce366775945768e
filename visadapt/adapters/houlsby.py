"""The original adapter: bottlenecks behind both sub-layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..core.adapter import Adapter
from ..core.sites import Site
from ..registry import ADAPTERS
from ._common.bottleneck import SerialBottleneck


@ADAPTERS.register_module()
class Houlsby(Adapter):
    """A bottleneck behind attention and MLP, before the residual sum: y' = y + up(GELU(down(y))).

    At both places y is the sub-layer's output before LayerScale: where a network scales its branches by small numbers,
    as a randomly initialised DINOv2 does with 1e-5, the change is scaled with them. The paper starts all weights near
    zero; here `up` starts at zero, for an exact identity. Parameters per block: 2 (2 D r + D + r).

    Args:
        width: inner width r.
        targets: roles of sub-layers.
        layers: block indices.
    """

    kinds = ("tokens",)
    targets = ("attn", "mlp")
    roles = ("attn", "mlp", "xattn")
    paper = "Parameter-Efficient Transfer Learning for NLP (Houlsby et al., 2019), arXiv 1902.00751"

    def __init__(
        self, width: int = 64, targets: Sequence[str] | None = None, layers: Sequence[int] | None = None
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(width=width)
        self.width = width

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> SerialBottleneck:
        return SerialBottleneck(site, self.width, nn.GELU())
