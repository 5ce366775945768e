"""DiffoRA: a search for the modules that deserve a low-rank update of their own."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.progress import Progress
from ..core.sites import LINEARS, Site
from ..errors import InputError
from ..registry import ADAPTERS
from ._common.low_rank import LowRankSite


class DiffoRASite(LowRankSite):
    """delta = s (g B A + (1 - g) B' A') with the pair A', B' of the site's type; g = sigmoid(theta), later 0 or 1.

    `choice` is -1 while g is soft.
    """

    def __init__(self, site: Site, rank: int, scaling: float, dropout: float, common: LowRankSite) -> None:
        super().__init__(site, rank, scaling, dropout, "DiffoRA")
        self.theta = nn.Parameter(torch.zeros(()))
        self.register_buffer("choice", torch.tensor(-1))
        self._common = (common,)  # in a tuple, because it belongs to the adapter and is stored there once

    def gate(self) -> Tensor:
        return torch.where(self.choice < 0, self.theta.sigmoid(), self.choice.to(self.theta.dtype))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        gate, (common,) = self.gate(), self._common
        return torch.cat([gate * self.a, (1 - gate) * common.a]), torch.cat([self.b, common.b], 1), self.scaling


@ADAPTERS.register_module()
class DiffoRA(Adapter):
    """Low-rank updates of which only the better part of every layer's modules keeps an own one; the others share.

    The paper decides by a differential adaptation matrix, relaxed, made discrete again, and with weight sharing; how is
    our design, after differentiable architecture search. In the first `search` of the run each site's update is
    s (g B A + (1 - g) B' A') with g = sigmoid(theta), theta 0 at the start, and with A', B' shared by all sites of one
    role and size. Steps alternate: in one A, B, A', B' learn, in the next, on other images, theta does (first order).
    Then the ceil(`keep` * n) sites of each layer's n with the largest theta get g = 1, for which g is folded into their
    B, the others g = 0, and A, B, A', B' go on learning. All merges into the weights. rank (dim_in + dim_out) + 1
    values per site and rank (dim_in + dim_out) per role and size.

    Args:
        rank: inner width of own and shared updates.
        alpha: numerator of the scaling s = alpha / rank; equal to the rank where None.
        keep: share of a layer's sites that keep an own update.
        search: share of the run before that is decided.
        gate_lr_mult: learning rate of theta over that of the factors.
        dropout: on the input of the update, in training.
        targets: roles of linears.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("all-linear",)
    roles = LINEARS
    paper = "DiffoRA (2025)"
    mergeable = True

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        keep: float = 0.5,
        search: float = 0.5,
        gate_lr_mult: float = 10.0,
        dropout: float = 0.0,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(rank=rank)
        self.require_strength(alpha=alpha)
        self.require_rate(dropout=dropout)
        for name, share in (("keep", keep), ("search", search)):
            if not 0 < share < 1:
                raise InputError(f"DiffoRA: {name} is a share between 0 and 1, got {share}")
        self.rank, self.alpha, self.keep, self.search = rank, alpha, keep, search
        self.gate_lr_mult, self.dropout = gate_lr_mult, dropout

    @staticmethod
    def _type(site: Site) -> str:
        return f"{site.role}_{site.dim_out}x{site.dim_in}"

    def shared(self, sites: list[Site], backbone) -> nn.ModuleDict:
        one_each = {self._type(site): site for site in reversed(sites)}
        return nn.ModuleDict({t: LowRankSite(one_each[t], self.rank, owner="DiffoRA") for t in sorted(one_each)})

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> DiffoRASite:
        scaling = (self.rank if self.alpha is None else self.alpha) / self.rank
        return DiffoRASite(site, self.rank, scaling, self.dropout, shared[self._type(site)])

    def lr_mult(self, name: str) -> float:
        return self.gate_lr_mult if name.endswith(".theta") else 1.0

    def chosen(self) -> dict[str, bool] | None:
        """Whether a site has an update of its own, by site key; None while that is open."""
        choices = torch.stack([p.choice for p in self.pieces.values()]).tolist()
        return None if -1 in choices else {key: bool(choice) for key, choice in zip(self.pieces, choices)}

    def on_step(self, progress: Progress) -> None:
        if progress.step >= self.search * progress.total:
            self.finalize()

    def on_gradients(self, progress: Progress) -> None:
        """Leave out what does not learn in this step; optimizers leave parameters without a gradient alone."""
        gates_learn = progress.step % 2 == 1 and self.chosen() is None
        for name, parameter in self.named_parameters():
            if name.endswith(".theta") != gates_learn:
                parameter.grad = None

    @torch.no_grad()
    def finalize(self) -> None:
        """Decide, where it is not decided yet."""
        if self.chosen() is not None:
            return
        by_layer: dict[tuple[str, int], list[DiffoRASite]] = {}
        for piece in self.pieces.values():
            by_layer.setdefault((piece.site.part, piece.site.layer), []).append(piece)
        for pieces in by_layer.values():
            best = sorted(pieces, key=lambda p: -p.theta.item())[: ceil(self.keep * len(pieces))]
            for piece in pieces:
                piece.b *= piece.gate()
                piece.choice.fill_(int(piece in best))
