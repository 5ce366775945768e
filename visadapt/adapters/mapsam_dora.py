"""Weight-decomposed low-rank adaptation in the form of MapSAM: one magnitude per input."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.kinds import WeightMap
from ..core.sites import LINEARS, Site
from ..registry import ADAPTERS
from ._common.low_rank import require_rank


class MapSAMDoRASite(WeightMap):
    """W' = V diag(m / n) with V = W + A B and n (dim_in,) the norms of the columns of V.

    A (dim_out, rank) starts normal with variance 1 / rank, B (rank, dim_in) at zero, m (dim_in,) at the norms of the
    columns of W. What m has changed is added to the norms of the weight at hand, which gives m itself and makes a fresh
    piece the identity to the last bit, in every precision and behind other weight maps.
    """

    def __init__(self, site: Site, weight: Tensor, rank: int) -> None:
        super().__init__(site)
        norms = weight.norm(dim=0)
        self.a = nn.Parameter(torch.randn(site.dim_out, rank) / math.sqrt(rank))
        self.b = nn.Parameter(torch.zeros(rank, site.dim_in))
        self.m = nn.Parameter(norms.clone())
        self.register_buffer("start", norms, persistent=False)

    def map(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        v = w + self.a @ self.b
        m = w.norm(dim=0) + (self.m - self.start)
        return v * (m / v.norm(dim=0).clamp(min=torch.finfo(v.dtype).tiny)), b  # a column of zeros stays one


@ADAPTERS.register_module()
class MapSAMDoRA(Adapter):
    """W' = m V / ||V||, V = W + A B, the norm over the outputs: one magnitude per input, not per output as in DoRA.

    The gradient flows through the norm; DoRA and HF PEFT (`PEFT(tuner="DoRA")`) hold it constant. There is no factor
    alpha / rank. rank (dim_in + dim_out) + dim_in trained values per site. A product with the whole weight is what a
    training step costs beyond LoRA, for the gradient of W'.

    The paper adapts q and v of a SAM image encoder, with rank 4.

    Args:
        rank: inner width of A B.
        targets: roles of linears.
        layers: block indices.
    """

    kinds = ("weight",)
    targets = ("q", "v")
    roles = LINEARS
    paper = "MapSAM, arXiv 2411.06971 (Xue-Xia/MapSAM)"
    mergeable = True

    def __init__(
        self, rank: int = 4, targets: Sequence[str] | None = None, layers: Sequence[int] | None = None
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(rank=rank)
        self.rank = rank

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> MapSAMDoRASite:
        weight = self.weight(site, backbone)
        require_rank("MapSAMDoRA", self.rank, site, tuple(weight.shape))
        return MapSAMDoRASite(site, weight, self.rank)
