"""CoLoRA: low-rank updates with ranks by how much each layer contributes to the task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.sites import CONVS, LINEARS, Site
from ..errors import InputError
from ..registry import ADAPTERS
from ._common.low_rank import LowRankSite


class CoLoRASite(LowRankSite):
    """delta = B[:, :rank] A[:rank], by a mask, so that shapes do not depend on data."""

    def __init__(self, site: Site, dim_in: int, rank: int, max_rank: int) -> None:
        super().__init__(site, max_rank, owner="CoLoRA", dim_in=dim_in)
        self.register_buffer("rank", torch.tensor(rank))
        self.register_buffer("number", torch.arange(max_rank), persistent=False)

    @property
    def weights(self) -> int:
        return self.a.shape[1] * self.b.shape[0]

    @property
    def weights_per_rank(self) -> int:
        return self.a.shape[1] + self.b.shape[0]

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.a * (self.number < self.rank)[:, None], self.b, self.scaling


@ADAPTERS.register_module()
class CoLoRA(Adapter):
    """Low-rank update of linears and convolutions, W + B A, with a rank per site that fits its contribution.

    The paper gives layers capacity by filter attribution: gradients integrated on the way from pretrained to fully
    fine-tuned weights. Nothing is published beyond that, and a frozen base has no fine-tuned twin, so the rest is our
    design: the way is an infinitesimal step of steepest descent. Then the attribution of filter j, a row of the weight,
    is |(theta' - theta)_j . dL/dtheta_j| = step * ||G_j||^2, with G the mean gradient over `calibration_batches`
    training batches. The contribution delta_i of a site is the share of its filters among the first `top` of all
    filters of all sites; its rank is alpha * min(dim_out, dim_in) * (`floor` + delta_i / mean delta), rounded, at least
    1, with the largest alpha for which all ranks together stay within `budget`.

    Ranks are set once, before training; until then, and without training data, they are those of an even split. To
    keep shapes independent of data each site holds the factors of its `max_rank`, of which the ranks beyond its own are
    masked: max_rank (dim_in + dim_out) values, about 2 * budget of its weights. For convolutions dim_in counts weights
    per output: A is a convolution to `rank` channels and B a 1 x 1 convolution behind it.

    Args:
        budget: weights of the factors in use over those of the adapted modules; the paper tunes about 7 %.
        floor: capacity of a site without contribution, in units of the mean contribution's (the paper's beta).
        top: share of filters that count as contributing.
        max_rank: largest rank of a site; twice that of an even split where None.
        targets: roles of linears and convolutions.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("all-linear",)
    roles = LINEARS + CONVS
    paper = "CoLoRA (Park et al., 2024), with FAIG (Xie et al., 2021)"
    mergeable = True
    calibration = "gradient"

    def __init__(
        self,
        budget: float = 0.07,
        floor: float = 0.5,
        top: float = 0.1,
        max_rank: int | None = None,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        if max_rank is not None:
            self.require_positive(max_rank=max_rank)
        for name, share in (("budget", budget), ("top", top)):
            if not 0 < share < 1:
                raise InputError(f"CoLoRA: {name} is a share between 0 and 1, got {share}")
        if not floor >= 0:
            raise InputError(f"CoLoRA: floor must be at least 0, got {floor}")
        self.budget, self.floor, self.top, self.max_rank = budget, floor, top, max_rank

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> CoLoRASite:
        dim_out, dim_in = self.weight(site, backbone).shape
        even = self.budget * dim_out * dim_in / (dim_out + dim_in)
        limit = min(max(1, round(2 * even)), dim_out, dim_in) if self.max_rank is None else self.max_rank
        return CoLoRASite(site, dim_in, min(max(1, int(even)), limit), limit)

    def build(self, backbone) -> None:
        super().build(backbone)
        pieces = self.pieces.values()
        least, allowed = sum(p.weights_per_rank for p in pieces), self.budget * sum(p.weights for p in pieces)
        if least > allowed:
            share = least / sum(p.weights for p in pieces)
            raise InputError(f"CoLoRA: rank 1 everywhere takes {share:.1%} of the weights, above budget={self.budget}")

    def calibrate(self, statistic: dict[str, Tensor]) -> None:
        attribution = {key: statistic[key].norm(dim=1) for key in self.pieces}  # ordered as its square is
        every = torch.cat(list(attribution.values()))
        threshold = every.topk(max(1, round(self.top * len(every)))).values[-1]
        shares = torch.stack([(values >= threshold).double().mean() for values in attribution.values()])
        weights = (self.floor + shares / shares.mean()).tolist()
        for piece, rank in zip(self.pieces.values(), self._within_budget(weights)):
            piece.rank.fill_(rank)

    def _within_budget(self, weights: list[float]) -> list[int]:
        """The ranks of the largest alpha that the budget allows, by bisection."""
        pieces = list(self.pieces.values())
        allowed = self.budget * sum(p.weights for p in pieces)

        def ranks(alpha: float) -> list[int]:
            wanted = [round(alpha * min(p.a.shape[1], len(p.b)) * w) for p, w in zip(pieces, weights)]
            return [min(max(1, rank), len(p.a)) for rank, p in zip(wanted, pieces)]

        low, high = 0.0, 1.0 / min(w for w in weights if w > 0)  # every site with a weight is full at the upper end
        for _ in range(50):
            middle = (low + high) / 2
            fits = sum(r * p.weights_per_rank for r, p in zip(ranks(middle), pieces)) <= allowed
            low, high = (middle, high) if fits else (low, middle)
        return ranks(low)

    def ranks(self) -> dict[str, int]:
        """Ranks in use, by site key."""
        return dict(zip(self.pieces, torch.stack([p.rank for p in self.pieces.values()]).tolist()))
