"""Updates that are sums of Kronecker products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.kinds import Delta
from ...core.sites import CONVS, Site
from ...errors import InputError


def require_divisor(owner: str, name: str, value: int, whole: int, what: str) -> None:
    """Refuse a factor size that does not divide `whole`, which `what` describes."""
    if whole % value:
        divisors = ", ".join(str(d) for d in range(1, whole + 1) if whole % d == 0)
        raise InputError(f"{owner}: {name} {value} does not divide the {whole} {what}; take one of {divisors}")


class KroneckerSite(Delta):
    """delta = sum_k kron(outer_k, inner_k) with outer (K, m, n) and inner (K, p, q): m p outputs and n q inputs.

    In training, where few terms make that cheaper than the gradient of a whole weight, delta is not formed: an input
    seen as X (n, q) gives Y (m, p) = sum_k outer_k X inner_k.T, one small product after the other.

    Args:
        site: a linear; a convolution if n q is the number of its weights per output.
        outer: K, m and n.
        inner: K, p and q.
        swapped: output a p + c, for a < m and c < p, stands at c m + a instead.
    """

    random = False

    def __init__(
        self, site: Site, outer: tuple[int, int, int], inner: tuple[int, int, int], swapped: bool = False
    ) -> None:
        super().__init__(site)
        (terms, m, n), (_, p, q) = outer, inner
        right_first, left_first = m * p * n + n * q * p, m * p * q + n * q * m  # multiplications per term and token
        self.right_first, self.swapped = right_first <= left_first, swapped
        # Three passes, as in training; the gradient of the weight is one.
        self.thin = site.role not in CONVS and 3 * terms * min(right_first, left_first) <= m * p * n * q

    def terms(self) -> tuple[Tensor, Tensor]:
        """outer (K, m, n) and inner (K, p, q)."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        outer, inner = self.terms()
        blocks = torch.einsum("kmn,kpq->pmnq" if self.swapped else "kmn,kpq->mpnq", outer, inner)
        return blocks.flatten(2).flatten(0, 1)

    def by_forward(self) -> bool:
        return self.thin and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        outer, inner = self.terms()
        x = x.unflatten(-1, (outer.shape[2], inner.shape[2]))
        y = _products(x, outer, inner) if self.right_first else _products(x.mT, inner, outer)
        return (y if self.right_first == self.swapped else y.mT).flatten(-2)


def _products(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """sum_k right_k x.T left_k.T (..., p, m) of x (..., n, q), left (K, m, n) and right (K, p, q), right ones first."""
    y = F.linear(x, right.flatten(0, 1)).unflatten(-1, right.shape[:2])  # (..., n, K, p)
    return F.linear(y.movedim(-1, -3).flatten(-2), left.permute(1, 2, 0).flatten(1))
