"""A bottleneck beside the MLP with weights of few bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.context import Context
from ..core.kinds import Tokens
from ..core.sites import Site
from ..registry import ADAPTERS
from ._common.quantised import QuantisedPair, require_bits


class BiAdaptFormerSite(QuantisedPair, Tokens):
    """y' = y + s up(dropout(ReLU(down(x)))), x (..., D) being the residual stream before the norm and y the branch."""

    position = "parallel"

    def forward(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        hidden = F.dropout(F.linear(x, self.down()).relu(), self.dropout, self.training)
        return y + self.strength * F.linear(hidden, self.up())


@ADAPTERS.register_module()
class BiAdaptFormer(Adapter):
    """x + MLP(LN(x)) + s up(dropout(ReLU(down(x)))) with weights of 1, 2, 4 or 8 bits, quantised while they train.

    Each of the two matrices is s' q((L - m) / (s' + 1e-5)) + m of a latent L that is trained, with mean m and standard
    deviation s' of L and the levels q that have the smallest mean absolute error on N(0, 1). There are no biases: 2 D
    width latents per block; a file holds as many entries of `bits` bits and m and s' of each matrix: ViT-B, width 32,
    1 bit: 72 KiB. The adapter reads the residual stream before the norm and is added behind LayerScale and DropPath. A
    fresh one changes the output a little.

    Args:
        width: inner width.
        bits: per entry.
        scale: strength s. The paper chooses one of 0.01, 0.1, 1, 10 and 100 per task.
        dropout: between the two projections, in training.
        targets: roles of residual branches.
        layers: block indices.
    """

    kinds = ("tokens",)
    targets = ("mlp_res",)
    roles = ("attn_res", "mlp_res")
    paper = "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy (ICCV 2023)"
    identity_at_init = False

    def __init__(
        self,
        width: int = 32,
        bits: int = 1,
        scale: float = 1.0,
        dropout: float = 0.1,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(width=width)
        self.require_strength(scale=scale)
        require_bits("BiAdaptFormer", bits)
        self.require_rate(dropout=dropout)
        self.width, self.bits, self.scale, self.dropout = width, bits, scale, dropout

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> BiAdaptFormerSite:
        return BiAdaptFormerSite(site, self.width, self.bits, self.scale, self.dropout)
