"""A small square matrix between frozen singular factors of the weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.kinds import Delta
from ..core.sites import CONVS, LINEARS, Site
from ..registry import ADAPTERS
from ._common.decomposed import Decomposed
from ._common.low_rank import require_rank

STD = 1e-5
"""Of R at the start, as published."""


class LoRAXSSite(Delta):
    """delta = s B R A with r (r, r) trained, a = diag(S_r) Vt_r (r, i) and b = U_r (o, r) frozen."""

    def __init__(self, site: Site, a: Tensor, b: Tensor, scaling: float) -> None:
        super().__init__(site)
        self.r = nn.Parameter(STD * torch.randn(len(a), len(a)))
        self.register_buffer("a", a, persistent=False)
        self.register_buffer("b", b, persistent=False)
        self.scaling = scaling

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.r @ self.a, self.b, self.scaling


@ADAPTERS.register_module()
class LoRAXS(Decomposed):
    """W' = W + s B R A, s = alpha / r, with A = diag(S_r) Vt_r and B = U_r of the truncated W = U diag(S) Vt.

    Only R (r, r) trains: r^2 values per site, whatever its width. R starts at N(0, 1e-5^2), so that a fresh adapter
    changes the output very little, but not by nothing. The base weight stays whole: no part of it is taken out. A and B
    are made anew from it, by an exact decomposition where the official code draws a randomised one, and are not stored.
    Linears as published; convolutions are taken as (o, i kh kw), which is ours.

    Args:
        rank: r.
        alpha: numerator of s; equal to the rank where None, as published.
        targets: roles of linears and convolutions.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("all-linear",)
    roles = (*LINEARS, *CONVS)
    paper = "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters (MohammadrezaBanaei/LoRA-XS)"
    mergeable = True
    identity_at_init = False

    def __init__(
        self,
        rank: int = 32,
        alpha: float | None = None,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(rank=rank)
        self.require_strength(alpha=alpha)
        self.rank, self.alpha = rank, alpha

    def components(self, site: Site, shape: tuple[int, int]) -> int:
        require_rank("LoRAXS", self.rank, site, shape)
        return self.rank

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> LoRAXSSite:
        u, s, vt = self.factors.pop(site.key)
        return LoRAXSSite(site, s[:, None] * vt, u, 1.0 if self.alpha is None else self.alpha / self.rank)
