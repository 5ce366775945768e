"""A small square matrix between frozen factors of the first full step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.decompose import one_core_each, svd
from ..core.kinds import Delta
from ..core.sites import CONVS, LINEARS, Site
from ..registry import ADAPTERS
from ._common.low_rank import require_rank


class LoRASBSite(Delta):
    """delta = B R A with r (r, r) trained, a (r, i) and b (o, r) frozen; all zero until `begin`."""

    def __init__(self, site: Site, outputs: int, inputs: int, rank: int) -> None:
        super().__init__(site)
        self.r = nn.Parameter(torch.zeros(rank, rank))
        self.register_buffer("a", torch.zeros(rank, inputs))
        self.register_buffer("b", torch.zeros(outputs, rank))

    @torch.no_grad()
    def begin(self, u: Tensor, s: Tensor, vt: Tensor) -> None:
        """Start at the product of U (o, r), diag(S) (r,) and Vt (r, i), with orthonormal outer factors."""
        self.b.copy_(u)
        self.r.copy_(s.diag())
        self.a.copy_(vt)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.r @ self.a, self.b, 1.0


@ADAPTERS.register_module()
class LoRASB(Adapter):
    """W' = W + B R A with frozen B = U_r, A = Vt_r and trained R = diag(S_r) of a step -lr sign(G) = U diag(S) Vt.

    G is the gradient of the task with respect to the base weight, averaged over the first training batches, and
    -lr sign(G) the first step that Adam would make with it. The model starts one approximated step away from the base.
    With orthonormal factors the gradient of R is the best projection of the full one, and no scaling needs to be tuned
    (s = 1). r^2 values per site; A and B come from data and are stored with them.

    The decomposition is exact: the randomised one of the official code is inexact on the flat spectra of sign matrices,
    and it rounds the factors to bfloat16. Linears as published; convolutions are taken as (o, i kh kw), which is ours.
    The gradient is that of the head as it is; a head that was trained before gives a better start than a random one.

    Args:
        rank: r.
        first_lr: lr of the first step, best that of the optimizer.
        calibration_batches: training batches that G is averaged over; the official code takes 50 to 170 samples.
        targets: roles of linears and convolutions.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("all-linear",)
    roles = (*LINEARS, *CONVS)
    paper = "LoRA-SB: initialization using update approximation (RaghavSinghal10/lora-sb)"
    mergeable = True
    identity_at_init = False
    calibration = "gradient"

    def __init__(
        self,
        rank: int = 32,
        first_lr: float = 1e-3,
        calibration_batches: int = 8,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(rank=rank, calibration_batches=calibration_batches)
        self.require_strength(first_lr=first_lr)
        self.rank, self.first_lr, self.calibration_batches = rank, first_lr, calibration_batches

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> LoRASBSite:
        o, i = self.weight(site, backbone).shape
        require_rank("LoRASB", self.rank, site, (o, i))
        return LoRASBSite(site, o, i, self.rank)

    def calibrate(self, statistic: dict[str, Tensor]) -> None:
        def approximate(key: str) -> tuple[Tensor, Tensor, Tensor]:
            return svd(-self.first_lr * statistic[key].sign(), self.rank, keep=False)

        for piece, factors in zip(self.pieces.values(), one_core_each(approximate, self.pieces)):
            piece.begin(*factors)

    def has_start(self) -> bool:
        return all(piece.b.any() for piece in self.pieces.values())
