"""Sparse tuning with kernelised low-rank updates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.sites import LINEARS, Site
from ..errors import InputError, hint
from ..registry import ADAPTERS
from ._common.kernel import KernelSite, compete, smallest

VARIANTS = ("paper", "official")


class SNELLSite(KernelSite):
    """delta = D max(|D| - t, 0), or D |D| where |D| > t, with the kernel matrix D and its sparsity's quantile t."""

    def __init__(self, site: Site, rank: int, sparsity: float, variant: str, dropout: float, drop_path: float) -> None:
        super().__init__(site, rank, dropout, drop_path, "SNELL")
        self.sparsity, self.variant = sparsity, variant

    def delta(self) -> Tensor:
        d = self.kernel()
        size, n = d.detach().abs(), d.numel()
        if self.variant == "paper":
            place = math.ceil(self.sparsity * n)
            return d * (size - smallest(size, place)).clamp(min=0) if place else d * size
        # Above the interpolated quantile lies just what lies above the lower of the two values it is between.
        return compete(d, smallest(size, math.floor(self.sparsity * (n - 1)) + 1)) if self.sparsity else d


@ADAPTERS.register_module()
class SNELL(Adapter):
    """W' = W + S with S = D max(|D| - t, 0), D[o, i] = 0.1 |q1_o - p1_i| - 0.1 |q2_o - p2_i| and t the threshold below
    which the share `sparsity` of |D| lies.

    p1, p2 (dim_in, rank / 2) and q1, q2 (dim_out, rank / 2) are trained: rank (dim_in + dim_out) values per site. The
    rank of D is not limited by theirs. The factor max(|D| - t, 0) is a constant in the backward pass, in which S is
    computed once more, so that no matrix of the size of a weight is kept per site. A fresh adapter changes the output a
    little.

    The paper's coefficients may be learnt; they are +-0.1 here as in the official code. That differs from the paper in
    the factor too: variant "official" gives S = D |D| where |D| is above the (interpolated) quantile and 0 elsewhere,
    and for sparsity 0 the dense S = D (KLoRA). q, k and v draw their dropout each for itself; the official code shares
    one draw.

    Args:
        rank: length of the vectors, even ("low_rank_dim").
        sparsity: share of the weight that stays as it is.
        variant: "paper" or "official".
        dropout: on the input of the update, in training; not at `proj`. The official scripts take 0.1.
        drop_path: probability to leave the update out for an image, in training. The official scripts take 0.1.
        targets: roles of linears.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("all-linear",)
    roles = LINEARS
    paper = "Expanding Sparse Tuning for Low Memory Usage (SNELL, NeurIPS 2024), arXiv 2411.01800"
    mergeable = True
    identity_at_init = False

    def __init__(
        self,
        rank: int = 8,
        sparsity: float = 0.5,
        variant: str = "paper",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(rank=rank)
        self.require_rate(sparsity=sparsity, dropout=dropout, drop_path=drop_path)
        if variant not in VARIANTS:
            raise InputError(f"SNELL: unknown variant '{variant}'{hint(variant, VARIANTS)}")
        self.rank, self.sparsity, self.variant = rank, sparsity, variant
        self.dropout, self.drop_path = dropout, drop_path

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> SNELLSite:
        dropout = 0.0 if site.role == "proj" else self.dropout
        return SNELLSite(site, self.rank, self.sparsity, self.variant, dropout, self.drop_path)
