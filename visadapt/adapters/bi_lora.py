"""Low-rank adaptation with factors of few bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.kinds import Delta
from ..core.sites import LINEARS, Site
from ..registry import ADAPTERS
from ._common.low_rank import require_rank
from ._common.quantised import QuantisedPair, require_bits


class BiLoRASite(QuantisedPair, Delta):
    """delta = s U D with quantised D = down (rank, dim_in) and U = up (dim_out, rank)."""

    def by_forward(self) -> bool:
        return self.training and self.dropout > 0

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.down(), self.up(), self.strength

    def forward(self, x: Tensor) -> Tensor:
        down, up, strength = self.factors()
        return F.linear(F.dropout(F.linear(x, down), self.dropout, self.training), up) * strength


@ADAPTERS.register_module()
class BiLoRA(Adapter):
    """W' = W + s U D with factors of 1, 2, 4 or 8 bits per entry, quantised in every pass of the training.

    Each factor is s' q((L - m) / (s' + 1e-5)) + m of a latent L that is trained, with mean m and standard deviation s'
    of L and the levels q that have the smallest mean absolute error on N(0, 1). rank (dim_in + dim_out) latents per
    site; a file holds as many entries of `bits` bits and m and s' of each factor: ViT-B, rank 32, q and v, 1 bit: 144
    KiB. What is merged are the quantised factors. A fresh adapter changes the output a little.

    Args:
        rank: inner width.
        bits: per entry.
        scale: strength s. The paper chooses one of 0.01, 0.1, 1, 10 and 100 per task.
        dropout: between the two factors, in training.
        targets: roles of linears.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("q", "v")
    roles = LINEARS
    paper = "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy (ICCV 2023)"
    mergeable = True
    identity_at_init = False

    def __init__(
        self,
        rank: int = 32,
        bits: int = 1,
        scale: float = 1.0,
        dropout: float = 0.1,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(rank=rank)
        self.require_strength(scale=scale)
        require_bits("BiLoRA", bits)
        self.require_rate(dropout=dropout)
        self.rank, self.bits, self.scale, self.dropout = rank, bits, scale, dropout

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> BiLoRASite:
        require_rank("BiLoRA", self.rank, site, (site.dim_out, site.dim_in))
        return BiLoRASite(site, self.rank, self.bits, self.scale, self.dropout)
