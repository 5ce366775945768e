"""Training of the diagonal of a lower-diagonal-upper factorisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.kinds import Delta
from ..core.sites import CONVS, LINEARS, Site
from ..registry import ADAPTERS
from ._common.decomposed import Decomposed
from ._common.low_rank import require_rank


def lower_diagonal_upper(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight = L diag(d) U with partial pivoting, the permutation of the rows inside L.

    It is computed in float64, where another library or another number of threads finds the same pivots. A pivot below
    the resolution of float32 stays in U, and d is 1 there: dividing by it would blow up U.

    Returns:
        L (o, m), the rows of a unit lower triangle in the order of the weight's, d (m,), U (m, i), m = min(o, i).
    """
    permutation, lower, upper = torch.linalg.lu(weight.double().cpu())
    d = upper.diagonal()
    d = torch.where(d.abs() > torch.finfo(torch.float32).eps * d.abs().max(), d, 1.0)
    factors = lower[permutation.argmax(1)], d, upper / d[:, None]
    return tuple(f.float().to(weight.device) for f in factors)


class LoLDUSite(Delta):
    """delta = s L_r diag(z - d) U_r with z (r,) trained, lower (o, r), d (r,) and upper (r, i) frozen."""

    rebases = True

    def __init__(self, site: Site, factors: tuple[Tensor, Tensor, Tensor], scaling: float) -> None:
        super().__init__(site)
        for name, value in zip(("lower", "d", "upper"), factors):
            self.register_buffer(name, value, persistent=False)
        self.z, self.scaling = nn.Parameter(self.d.clone()), scaling

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return (self.z - self.d)[:, None] * self.upper, self.lower, self.scaling


@ADAPTERS.register_module()
class LoLDU(Decomposed):
    """W = P L D U; trained is the diagonal of the first r pivots: W' = W + s P L_r diag(z - D_r) U_r, s = alpha / r.

    That is the publication's W_res + s P L_r diag(z) U_r with W_res = W - s P L_r diag(D_r) U_r; z starts at D_r, so
    that nothing changes. r values per site. P is kept as the order of the rows of L instead of a dense (o, o) matrix.
    All frozen factors are made anew from the base weight and are not stored. Linears as published; convolutions are
    taken as (o, i kh kw), which is ours.

    The official starts 'uniform', 'normal' and 'constant' of z move W_res along and so train the same W' from another
    origin of z, which only weight decay sees; they are left out, as are the starts that are not at the base
    ('s_uniform', 's_normal', 'ones', 'zeros'). Weight decay would pull z to 0 instead of D: leave vectors out of it.

    Args:
        rank: pivots r; all min(o, i) where None. The official default 768 is all of a ViT-B.
        alpha: numerator of s; it multiplies the effect of a step of z.
        targets: roles of linears and convolutions.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("all-linear",)
    roles = (*LINEARS, *CONVS)
    paper = "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition (SKDDJ/LoLDU)"
    mergeable = True

    def __init__(
        self,
        rank: int | None = None,
        alpha: float = 1.0,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        if rank is not None:
            self.require_positive(rank=rank)
        self.require_strength(alpha=alpha)
        self.rank, self.alpha = rank, alpha

    def components(self, site: Site, shape: tuple[int, int]) -> int | None:
        if self.rank is not None:
            require_rank("LoLDU", self.rank, site, shape)
        return self.rank

    def decompose(self, weight: Tensor, components: int | None) -> tuple[Tensor, Tensor, Tensor]:
        lower, d, upper = lower_diagonal_upper(weight)
        return lower[:, :components].contiguous(), d[:components].clone(), upper[:components].clone()

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> LoLDUSite:
        factors = self.factors.pop(site.key)
        return LoLDUSite(site, factors, self.alpha / len(factors[1]))
