"""Training of the leading Kronecker products of a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.decompose import svd
from ..core.sites import CONVS, LINEARS, Site
from ..errors import InputError
from ..registry import ADAPTERS
from ._common.decomposed import Decomposed
from ._common.kronecker import KroneckerSite, require_divisor

STRAIGHT = 1e-6
"""Depth below its chord, relative to the first singular value, up to which a curve has no elbow."""


@dataclass(frozen=True)
class Leading:
    """How many components stay: the fewest that hold the energy, those before the elbow, no more than the limit."""

    energy: float
    limit: int | None

    def __str__(self) -> str:
        return f"energy{self.energy}_elbow_limit{self.limit}"

    def __call__(self, s: Tensor) -> int:
        s = s.double().cpu()
        held = s.square().cumsum(0)
        enough = min(len(s), 1 + int((held < self.energy * held[-1]).sum()))
        depth = s[0] + (s[-1] - s[0]) * torch.linspace(0, 1, len(s), dtype=s.dtype) - s
        elbow = int(depth.argmax()) if depth.max() > STRAIGHT * s[0] else len(s)
        return min(enough, elbow, self.limit or len(s))


def middle_divisor(size: int) -> int:
    """The largest divisor up to the square root."""
    return next(d for d in range(math.isqrt(size), 0, -1) if size % d == 0)


def rearranged(weight: Tensor, m: int, n: int) -> Tensor:
    """The blocks (p, q) of weight (m p, n q) as rows: (m n, p q), where sums of Kronecker products have low rank."""
    o, i = weight.shape
    return weight.view(m, o // m, n, i // n).transpose(1, 2).reshape(m * n, -1)


class SoKASite(KroneckerSite):
    """delta = sum_k kron(outer_k, inner_k) - kron(outer0_k, inner0_k), with the start frozen."""

    rebases = True

    def __init__(self, site: Site, outer: Tensor, inner: Tensor) -> None:
        twice = 2 * len(outer)
        super().__init__(site, (twice, *outer.shape[1:]), (twice, *inner.shape[1:]))
        for name, value in dict(outer=outer, inner=inner).items():
            self.register_buffer(f"{name}0", value, persistent=False)
            setattr(self, name, nn.Parameter(value.clone()))

    def terms(self) -> tuple[Tensor, Tensor]:
        """The difference in a form that is exactly zero at the start and does not cancel later."""
        left, right = [self.outer - self.outer0, self.outer0], [self.inner, self.inner - self.inner0]
        return torch.cat(left), torch.cat(right)


@ADAPTERS.register_module()
class SoKA(Decomposed):
    """W' = W_res + sum_k kron(U_k, V_k), started at the r leading Kronecker products of the weight; W_res is frozen.

    For U_k (m, n) and V_k (p, q) with m p = o and n q = i, they come from the singular value decomposition of the
    matrix (m n, p q) whose rows are the blocks of W (Van Loan and Pitsianis). U and V are trained, r (m n + p q) values
    per site; W_res = W - sum_k kron(U0_k, V0_k) is implied, and nothing changes at the start. Convolutions are taken as
    (o, i kh kw). U0 and V0 are made anew from the base weight and are not stored.

    Of the `rank` leading products only the fewest that hold `energy` stay, and only those before the elbow, the point
    at which the curve of all singular values is farthest below the chord from the first to the last. Our design where
    the publication is silent: U_k and V_k take sqrt(sigma_k) each; the elbow's definition; the factors' default shapes.
    The weights of vision transformers have flat curves (at 0.9 a third of all products would stay), so that `rank`
    mostly decides.

    More than a few products cost less as a whole weight than one after the other, and are trained so. Weight decay
    pulls U and V to 0 instead of the start.

    Args:
        rank: most products r; None for no limit.
        energy: share of |W|^2 that suffices.
        outer: m and n of U_k; where None the largest divisor of o up to its root and the smallest of i from its root.
            With (o, 1) the products are those of the singular value decomposition of W.
        targets: roles of linears and convolutions.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("all-linear",)
    roles = (*LINEARS, *CONVS)
    paper = "SoKA: SVD on Kronecker adaptation of large language models"
    mergeable = True

    def __init__(
        self,
        rank: int | None = 8,
        energy: float = 0.9,
        outer: Sequence[int] | None = None,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        if rank is not None:
            self.require_positive(rank=rank)
        self.require_rate(energy=energy)
        if outer is not None:
            if len(outer) != 2:
                raise InputError(f"SoKA: outer is a pair (m, n), got {len(outer)} numbers")
            self.require_positive(m=outer[0], n=outer[1])
        self.rank, self.energy = rank, energy
        self.outer = None if outer is None else tuple(outer)

    def _shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        return self.outer or (middle_divisor(shape[0]), shape[1] // middle_divisor(shape[1]))

    def components(self, site: Site, shape: tuple[int, int]) -> Leading:
        m, n = self._shape(shape)
        require_divisor("SoKA", "m", m, shape[0], f"outputs of {site.key}")
        require_divisor("SoKA", "n", n, shape[1], f"weights per output of {site.key}")
        if (self.rank or 0) > (most := min(m * n, shape[0] * shape[1] // (m * n))):
            raise InputError(f"SoKA: rank {self.rank} exceeds the {most} products of {site.key}; lower it")
        return Leading(self.energy, self.rank)

    def decompose(self, weight: Tensor, components: Leading) -> tuple[Tensor, Tensor]:
        m, n = self._shape(weight.shape)
        u, s, vt = svd(rearranged(weight, m, n), components)
        p, q = weight.shape[0] // m, weight.shape[1] // n
        return (u * s.sqrt()).T.contiguous().view(-1, m, n), (s.sqrt()[:, None] * vt).view(-1, p, q)

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> SoKASite:
        return SoKASite(site, *self.factors.pop(site.key))
