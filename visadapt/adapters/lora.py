"""Low-rank adaptation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from ..core.adapter import Adapter
from ..core.sites import LINEARS, Site
from ..errors import InputError
from ..registry import ADAPTERS
from ._common.low_rank import LowRankSite


class LoRASite(LowRankSite):
    """delta = s B A with A (rank, dim_in) random and B (dim_out, rank) zero at the start."""

    pair = ("a", "b")


@ADAPTERS.register_module()
class LoRA(Adapter):
    """Low-rank update of linear weights: W + s B A, s = alpha / rank.

    Args:
        rank: inner width r.
        alpha: numerator of the scaling s; equal to the rank where None.
        dropout: on the input of the update, in training.
        scaling: "rank" for s = alpha / r, "sqrt" for s = alpha / sqrt(r) (rsLoRA; CLIP-LoRA uses it with alpha 1).
        targets: roles of linears.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("q", "v")
    roles = LINEARS
    paper = "LoRA (Hu et al., 2021), arXiv 2106.09685; scaling 'sqrt': rsLoRA (Kalajdzievski, 2023), arXiv 2312.03732"
    mergeable = True

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        scaling: str = "rank",
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(rank=rank)
        self.require_strength(alpha=alpha)
        if scaling not in ("rank", "sqrt"):
            raise InputError(f"LoRA: scaling is 'rank' or 'sqrt', got '{scaling}'")
        self.require_rate(dropout=dropout)
        self.rank, self.alpha, self.dropout, self.scaling = rank, alpha, dropout, scaling

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> LoRASite:
        alpha = self.rank if self.alpha is None else self.alpha
        return LoRASite(
            site, self.rank, alpha / (self.rank if self.scaling == "rank" else math.sqrt(self.rank)), self.dropout
        )
