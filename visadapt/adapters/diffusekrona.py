"""Kronecker products as updates of attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.sites import LINEARS, Site
from ..errors import InputError, hint
from ..registry import ADAPTERS
from ._common.kronecker import KroneckerSite, require_divisor

ORDERS = ("official", "kron")


class DiffuseKronASite(KroneckerSite):
    """delta = kron(down.T, up) with down (a2, a1) random and up (b1, b2) zero, outputs ordered as `order` says."""

    def __init__(self, site: Site, a1: int, a2: int, order: str) -> None:
        b1, b2 = site.dim_out // a1, site.dim_in // a2
        super().__init__(site, (1, a1, a2), (1, b1, b2), swapped=order == "official")
        self.down, self.up = nn.Parameter(torch.randn(a2, a1) / a1), nn.Parameter(torch.zeros(b1, b2))

    def terms(self) -> tuple[Tensor, Tensor]:
        return self.down.T[None], self.up[None]


@ADAPTERS.register_module()
class DiffuseKronA(Adapter):
    """W' = W + delta, where delta is the Kronecker product of two small matrices, A (a2, a1) and B (b1, b2).

    With a1 b1 = o outputs and a2 b2 = i inputs, delta[p a1 + q, u b2 + v] = B[p, v] A[u, q] in the order of the
    official code. The textbook's kron(A.T, B) has the same rows at q b1 + p; its singular values are the same. Per
    site a1 a2 + (o / a1) (i / a2) values are trained. The rank is that of A times that of B, up to 96 at 768 x 768. A
    starts from N(0, 1 / a1^2), B at zero; there is no scaling, as published.

    Where that is cheaper, training applies delta to an input seen as (a2, b2) without forming it. In a fused qkv the
    targets q, k and v have factors of their own; target qkv shares A among them.

    Args:
        a1: outputs' share of A; the publication takes 64.
        a2: inputs' share of A; the publication takes 8.
        order: of the outputs, "official" or "kron".
        targets: roles of linears; the authors advise against those of the MLP.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("q", "k", "v", "proj")
    roles = LINEARS
    paper = "DiffuseKronA: fine-tuning of diffusion models by Kronecker products (IBM/DiffuseKronA)"
    mergeable = True

    def __init__(
        self,
        a1: int = 64,
        a2: int = 8,
        order: str = "official",
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(a1=a1, a2=a2)
        if order not in ORDERS:
            raise InputError(f"DiffuseKronA: unknown order '{order}'{hint(order, ORDERS)}")
        self.a1, self.a2, self.order = a1, a2, order

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> DiffuseKronASite:
        require_divisor("DiffuseKronA", "a1", self.a1, site.dim_out, f"outputs of {site.key}")
        require_divisor("DiffuseKronA", "a2", self.a2, site.dim_in, f"inputs of {site.key}")
        return DiffuseKronASite(site, self.a1, self.a2, self.order)
