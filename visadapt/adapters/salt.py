"""Singular value adaptation: leading singular values scaled and shifted, the others changed at low rank."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.kinds import Delta
from ..core.sites import CONVS, LINEARS, Site
from ..errors import InputError, hint
from ..registry import ADAPTERS
from ._common.decomposed import Decomposed
from ._common.low_rank import require_rank

RELU = ("all", "scaled")


class SALTSite(Delta):
    """delta = U (relu(M) - diag S) Vt with M = [diag(gain S_k + shift), 0; 0, diag(S_rest) + X Y].

    Shapes, with m = min(o, i): gain, shift (k,), x (m - k, r), y (r, m - k), and frozen u (o, m), s (m,), vt (m, i).
    """

    rebases = True

    def __init__(self, site: Site, factors: tuple[Tensor, Tensor, Tensor], count: int, rank: int, relu: str) -> None:
        super().__init__(site)
        for name, value in zip(("u", "s", "vt"), factors):
            self.register_buffer(name, value, persistent=False)
        rest = len(self.s) - count
        self.gain, self.shift = nn.Parameter(torch.ones(count)), nn.Parameter(torch.zeros(count))
        self.x, self.y = nn.Parameter(torch.empty(rest, rank)), nn.Parameter(torch.zeros(rank, rest))
        nn.init.kaiming_uniform_(self.x, nonlinearity="relu")
        self.relu = relu

    def factors(self) -> tuple[Tensor, Tensor, float]:
        k = len(self.gain)
        u, s, vt = self.u, self.s, self.vt
        head = ((self.gain * s[:k] + self.shift).relu() - s[:k])[:, None]
        if self.relu == "scaled":
            return torch.cat([head * vt[:k], self.y @ vt[k:]]), torch.cat([u[:, :k], u[:, k:] @ self.x], 1), 1.0
        base = s[k:].diag()
        rest = (base + self.x @ self.y).relu() - base
        if u.shape[0] < vt.shape[1]:  # the middle goes to the shorter side
            return vt, torch.cat([u[:, :k] * head.T, u[:, k:] @ rest], 1), 1.0
        return torch.cat([head * vt[:k], rest @ vt[k:]]), u, 1.0

    def penalty(self) -> Tensor:
        """|gain S_k + shift - S_k| + |X Y|, Frobenius norms."""
        s = self.s[: len(self.gain)]
        return (self.gain * s + self.shift - s).norm() + (self.x @ self.y).norm()


@ADAPTERS.register_module()
class SALT(Decomposed):
    """Of the singular values of a weight, the leading ones are scaled and shifted, the rest is changed at low rank.

    W = U diag(S) Vt becomes W' = U relu(M) Vt, where M is diag(gain S_k + shift) for the k leading values and
    diag(S_rest) + X Y for the rest, with zeros between the two. As in the official code the ReLU acts on all of M, and
    so clips the negative entries of X Y off the diagonal: such a middle has no low rank, and every training step forms
    W' by dense products. Convolutions are taken as (o, i kh kw). Trained values per site: 2 k + 2 r (min(o, i) - k).

    The start is that of the official layer for SAM2 (X Kaiming-uniform, Y zero), which changes nothing; the one for SAM
    draws X and Y from N(0, 0.01^2), which does. The official code adapts the fused qkv as one weight; targets q, k and
    v have decompositions of their own. U and Vt are made anew from the base weight, with signs that depend on nothing
    else, and are not stored; in memory they take 1.25 times a weight of 4 to 1, and twice a square one.

    Args:
        scaled: leading singular values k, as a number, or as a share of all below 1 (rounded down, at least one).
        rank: r of the change of the others; the published SAM2 setting is 256.
        relu: what the ReLU acts on: "all" of M as in the official code, or only the "scaled" singular values. The
            second is our variant: a change of rank k + r, at the cost of a LoRA of that rank.
        penalty: factor on |gain S_k + shift - S_k| + |X Y|, summed over sites, in the loss; 0 as published.
        targets: roles of linears and convolutions.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("all-linear",)
    roles = (*LINEARS, *CONVS)
    paper = "SALT: Singular Value Adaptation with Low-Rank Transformation (BioMedIA-MBZUAI/SALT)"
    mergeable = True

    def __init__(
        self,
        scaled: float = 0.1,
        rank: int = 4,
        relu: str = "all",
        penalty: float = 0.0,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(rank=rank)
        if not ((isinstance(scaled, int) and scaled >= 1) or 0 < scaled < 1):
            raise InputError(f"SALT: scaled is a whole number of at least 1 or a share between 0 and 1, got {scaled!r}")
        if relu not in RELU:
            raise InputError(f"SALT: unknown relu '{relu}'{hint(relu, RELU)}")
        self.scaled, self.rank, self.relu, self.penalty = scaled, rank, relu, penalty

    def _count(self, smaller: int) -> int:
        return self.scaled if self.scaled >= 1 else max(1, math.floor(smaller * self.scaled))

    def components(self, site: Site, shape: tuple[int, int]) -> None:
        require_rank("SALT", self.rank, site, shape)
        if (count := self._count(min(shape))) >= min(shape):
            raise InputError(
                f"SALT: scaled {count} leaves none of the {min(shape)} singular values of {site.key} to X Y; lower it, "
                "or use SSAM to scale all"
            )

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> SALTSite:
        factors = self.factors.pop(site.key)
        return SALTSite(site, factors, self._count(len(factors[1])), self.rank, self.relu)

    def losses(self) -> dict[str, Tensor]:
        if not self.penalty:
            return {}
        return {"penalty": self.penalty * sum(piece.penalty() for piece in self.pieces.values())}
