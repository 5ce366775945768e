"""Low-rank adaptation that starts along the gradient of the task."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.decompose import one_core_each, svd
from ..core.kinds import Delta
from ..core.sites import CONVS, LINEARS, Site
from ..errors import InputError, hint
from ..registry import ADAPTERS

DIRECTIONS = {
    "ArB2r": lambda r: (slice(0, r), slice(r, 2 * r)),
    "A2rBr": lambda r: (slice(r, 2 * r), slice(0, r)),
    "ArBr": lambda r: (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
}
"""Which right singular vectors become rows of A and which left ones columns of B."""

SCALES = {
    "stable": lambda outputs, gamma, scaling: outputs**0.25 / math.sqrt(gamma),
    "unit": lambda outputs, gamma, scaling: 1.0,
    "gd": lambda outputs, gamma, scaling: 1 / scaling,
}
"""The factor on both A and B."""


class LoRAGASite(Delta):
    """delta = s (B A - B0 A0) with A (rank, i) and B (o, rank) trained, A0 and B0 what they were at the start.

    It is computed as s ((B - B0) A + B0 (A - A0)): exactly zero at the start, and small terms while it is small.
    """

    pair = ("a", "b")

    def __init__(self, site: Site, shape: tuple[int, int], rank: int, scaling: float) -> None:
        super().__init__(site)
        o, i = shape
        self.a, self.b = nn.Parameter(torch.zeros(rank, i)), nn.Parameter(torch.zeros(o, rank))
        self.register_buffer("a0", torch.zeros(rank, i))
        self.register_buffer("b0", torch.zeros(o, rank))
        self.scaling = scaling

    @torch.no_grad()
    def begin(self, a: Tensor, b: Tensor) -> None:
        """Start at these factors."""
        for mine, value in ((self.a, a), (self.a0, a), (self.b, b), (self.b0, b)):
            mine.copy_(value)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return torch.cat([self.a, self.a - self.a0]), torch.cat([self.b - self.b0, self.b0], 1), self.scaling


@ADAPTERS.register_module()
class LoRAGA(Adapter):
    """W' = W + s (B A - B0 A0) with a start A0, B0 from singular vectors of the gradient G = U diag(S) Vt.

    G is the gradient of the task with respect to the base weight, averaged over the first training batches. With the
    direction "ArB2r" A0 takes the first r rows of Vt and B0 the next r columns of U, so that the first step changes the
    weight along the best approximation of G that rank 2 r allows. Both are multiplied by o^(1/4) / sqrt(gamma)
    ("stable"; o outputs), which keeps outputs and gradients of equal size whatever the width. The singular values do
    not enter; HF PEFT 0.21 multiplies B0 by them and scales B0 alone, which is another start.

    The official code subtracts s B0 A0 from the base; here the base stays as it is, and an adapter file holds A0 and B0
    next to A and B. rank (dim_in + dim_out) trained values per site. Weight decay draws A and B to zero as there, so
    the model to W - s B0 A0 and not to the base.

    The official scale "weightS", its random direction and the clipping of the start's norm are not offered.

    The decomposition is exact; the official one is randomised. Linears as published; convolutions are taken as
    (o, i kh kw), which is ours.

    Args:
        rank: r.
        alpha: numerator of s.
        scaling: "sqrt" for s = alpha / sqrt(r), "rank" for s = alpha / r.
        direction: "ArB2r", "A2rBr" (the other way round) or "ArBr" (A0 the even, B0 the odd ones of the first 2 r).
        start: size of the start: "stable", "unit" (singular vectors as they are) or "gd" (divided by s).
        gamma: of "stable".
        calibration_batches: training batches that G is averaged over.
        targets: roles of linears and convolutions.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("all-linear",)
    roles = (*LINEARS, *CONVS)
    paper = "LoRA-GA: Low-Rank Adaptation with Gradient Approximation (Outsider565/LoRA-GA)"
    mergeable = True
    calibration = "gradient"

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        scaling: str = "sqrt",
        direction: str = "ArB2r",
        start: str = "stable",
        gamma: float = 16.0,
        calibration_batches: int = 8,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(rank=rank, calibration_batches=calibration_batches)
        if scaling not in ("rank", "sqrt"):
            raise InputError(f"LoRAGA: scaling is 'rank' or 'sqrt', got '{scaling}'")
        for name, value, known in (("direction", direction, DIRECTIONS), ("start", start, SCALES)):
            if value not in known:
                raise InputError(f"LoRAGA: unknown {name} '{value}'{hint(value, known)}")
        self.require_strength(alpha=alpha, gamma=gamma)
        self.rank, self.alpha, self.scaling, self.direction = rank, alpha, scaling, direction
        self.start, self.gamma, self.calibration_batches = start, gamma, calibration_batches

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> LoRAGASite:
        o, i = self.weight(site, backbone).shape
        if 2 * self.rank > min(o, i):
            raise InputError(
                f"LoRAGA: rank {self.rank} needs {2 * self.rank} singular vectors and the site {site.key} of {o} x {i} "
                f"has {min(o, i)}; the rank may be at most {min(o, i) // 2}"
            )
        s = self.alpha / (self.rank if self.scaling == "rank" else math.sqrt(self.rank))
        return LoRAGASite(site, (o, i), self.rank, s)

    def calibrate(self, statistic: dict[str, Tensor]) -> None:
        rows, columns = DIRECTIONS[self.direction](self.rank)

        def vectors(key: str) -> tuple[Tensor, Tensor]:
            u, _, vt = svd(statistic[key], 2 * self.rank, keep=False)
            return vt[rows], u[:, columns]

        for piece, (a, b) in zip(self.pieces.values(), one_core_each(vectors, self.pieces)):
            size = SCALES[self.start](len(b), self.gamma, piece.scaling)
            piece.begin(size * a, size * b)

    def has_start(self) -> bool:
        return all(piece.b0.any() for piece in self.pieces.values())
