"""Scale and shift of the singular values of a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.kinds import Delta
from ..core.sites import CONVS, LINEARS, Site
from ..errors import InputError
from ..registry import ADAPTERS
from ._common.decomposed import Decomposed


class SSAMSite(Delta):
    """delta = U_k diag(relu(gain S_k + shift) - S_k) Vt_k with gain, shift (k,), frozen u (o, k), s (k,), vt (k, i)."""

    rebases = True

    def __init__(self, site: Site, factors: tuple[Tensor, Tensor, Tensor]) -> None:
        super().__init__(site)
        for name, value in zip(("u", "s", "vt"), factors):
            self.register_buffer(name, value, persistent=False)
        self.gain, self.shift = nn.Parameter(torch.ones_like(self.s)), nn.Parameter(torch.zeros_like(self.s))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        change = (self.gain * self.s + self.shift).relu() - self.s
        return change[:, None] * self.vt, self.u, 1.0

    def penalty(self) -> Tensor:
        """|1 - gain| + |shift|, Euclidean norms."""
        return (1 - self.gain).norm() + self.shift.norm()


@ADAPTERS.register_module()
class SSAM(Decomposed):
    """S-SAM: W' = U diag(relu(gain S + shift)) Vt for the singular values S of the frozen weight W = U diag(S) Vt.

    Trained are gain and shift of the k leading values, 2 k per site; convolutions are taken as (o, i kh kw). With
    `fraction` below 1 the other values stay as they are; the only public code (SALT's repository) adds 1 to each of
    them, which we take for a mistake. U and Vt are made anew from the base weight and are not stored. The publication
    adapts the fused qkv as one weight; targets q, k and v have decompositions of their own. Weight decay would pull the
    gains to 0 instead of 1: leave vectors out of it.

    Args:
        fraction: k as a share of the min(o, i) singular values, rounded down.
        penalty: factor on |1 - gain| + |shift|, summed over sites, in the loss; 0 as published.
        targets: roles of linears and convolutions.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("all-linear",)
    roles = (*LINEARS, *CONVS)
    paper = "S-SAM: SVD-based Fine-Tuning of Segment Anything Model, as in the repository of SALT"
    mergeable = True

    def __init__(
        self,
        fraction: float = 1.0,
        penalty: float = 0.0,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        if not 0 < fraction <= 1:
            raise InputError(f"SSAM: fraction must be above 0 and at most 1, got {fraction!r}")
        self.fraction, self.penalty = fraction, penalty

    def components(self, site: Site, shape: tuple[int, int]) -> int:
        count = math.floor(min(shape) * self.fraction)
        if not count:
            raise InputError(
                f"SSAM: fraction {self.fraction} is none of the {min(shape)} singular values of {site.key}; raise it"
            )
        return count

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> SSAMSite:
        return SSAMSite(site, self.factors.pop(site.key))

    def losses(self) -> dict[str, Tensor]:
        if not self.penalty:
            return {}
        return {"penalty": self.penalty * sum(piece.penalty() for piece in self.pieces.values())}
