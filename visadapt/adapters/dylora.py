"""DyLoRA: one training, every rank up to the largest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.progress import Progress
from ..core.sites import LINEARS, Site
from ..errors import InputError
from ..registry import ADAPTERS
from ._common.low_rank import LowRankSite


class DyLoRASite(LowRankSite):
    """delta = alpha / n B[:, :n] A[:n] with n the drawn rank in training and the chosen one otherwise.

    The ranks beyond n are masked, so that shapes stay and a compiled model need not be compiled again.
    """

    def __init__(self, site: Site, rank: int, alpha: float, dropout: float, frozen: bool) -> None:
        super().__init__(site, rank, alpha, dropout, "DyLoRA")
        self.frozen = frozen
        self.register_buffer("rank", torch.tensor(rank))
        self.register_buffer("drawn", torch.tensor(rank))
        self.register_buffer("number", torch.arange(1, rank + 1), persistent=False)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        n = self.drawn if self.training else self.rank
        a, b = self.a, self.b
        if self.frozen and self.training:
            newest = self.number == n
            a, b = torch.where(newest[:, None], a, a.detach()), torch.where(newest, b, b.detach())
        share = ((self.number <= n) / n).to(a.dtype)
        return a * share[:, None], b, self.scaling

    def stored(self) -> dict[str, Tensor]:
        """Without the rank of the last training step."""
        return {k: v for k, v in self.state_dict().items() if k != "drawn"}


@ADAPTERS.register_module()
class DyLoRA(Adapter):
    """Low-rank update whose first n ranks are a good update of rank n, for every n up to `rank`.

    For A (rank, dim_in), B (dim_out, rank) and n ranks in use, W + alpha / n B[:, :n] A[:n]; rank (dim_in + dim_out)
    values per site. Before every optimizer step one n is drawn uniformly from 1 to `rank` for the whole model, the
    same on all processes. After training `use_rank` chooses the rank that is evaluated, saved and merged; it is `rank`
    before.

    Args:
        rank: the largest rank.
        alpha: numerator of the scaling alpha / n; equal to the rank where None.
        dropout: on the input of the update, in training.
        frozen: only the n-th rank learns in a step with n ranks; all n of them where False.
        targets: roles of linears.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("q", "v")
    roles = LINEARS
    paper = "DyLoRA (Valipour et al., 2023)"
    mergeable = True

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        frozen: bool = False,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(rank=rank)
        self.require_strength(alpha=alpha)
        self.require_rate(dropout=dropout)
        self.rank, self.alpha, self.dropout, self.frozen = rank, alpha, dropout, frozen

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> DyLoRASite:
        alpha = self.rank if self.alpha is None else self.alpha
        return DyLoRASite(site, self.rank, alpha, self.dropout, self.frozen)

    def on_step(self, progress: Progress) -> None:
        n = 1 + torch.randint(self.rank, (), generator=progress.generator).item()
        for piece in self.pieces.values():
            piece.drawn.fill_(n)

    def use_rank(self, rank: int) -> None:
        """Let the first `rank` ranks make up the update outside training.

        Raises:
            InputError: no rank from 1 to the largest.
        """
        if rank not in range(1, self.rank + 1):
            raise InputError(f"DyLoRA: it was trained for the ranks 1 to {self.rank}, got {rank!r}")
        for piece in self.pieces.values():
            piece.rank.fill_(rank)
        self.finalize()

    def finalize(self) -> None:
        """Forget the last draw, so that the chosen rank counts in every mode until the next step."""
        for piece in self.pieces.values():
            piece.drawn.copy_(piece.rank)
