"""AdaptFormer: a bottleneck beside the MLP."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.context import Context
from ..core.kinds import Tokens
from ..core.sites import Site
from ..registry import ADAPTERS
from ._common.bottleneck import Bottleneck


class ParallelBottleneck(Tokens):
    """y' = y + s bottleneck(x), x (..., D) being the residual stream before the norm and y the branch."""

    position = "parallel"

    def __init__(self, site: Site, width: int, strength: float, dropout: float) -> None:
        super().__init__(site)
        self.bottleneck, self.strength = Bottleneck(site.dim_in, width, nn.ReLU(), dropout), strength

    def forward(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        return y + self.strength * self.bottleneck(x)


@ADAPTERS.register_module()
class AdaptFormer(Adapter):
    """A bottleneck in parallel to the MLP: x + MLP(LN(x)) + s up(dropout(ReLU(down(x)))).

    It reads the residual stream before the norm and is added behind LayerScale and DropPath, so neither weakens it.
    Parameters per block: 2 D r + D + r.

    Args:
        width: inner width r.
        scale: strength s.
        dropout: between the two projections, in training.
        targets: roles of residual branches.
        layers: block indices.
    """

    kinds = ("tokens",)
    targets = ("mlp_res",)
    roles = ("attn_res", "mlp_res")
    paper = "AdaptFormer (Chen et al., 2022), arXiv 2205.13535"

    def __init__(
        self,
        width: int = 64,
        scale: float = 0.1,
        dropout: float = 0.1,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(width=width)
        self.require_strength(scale=scale)
        self.require_rate(dropout=dropout)
        self.width, self.scale, self.dropout = width, scale, dropout

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> ParallelBottleneck:
        return ParallelBottleneck(site, self.width, self.scale, self.dropout)
