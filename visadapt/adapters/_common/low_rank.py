"""The pair of factors that low-rank methods put their masks and gates between."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.kinds import Delta
from ...core.sites import Site
from ...errors import InputError


def require_rank(owner: str, rank: int, site: Site, shape: tuple[int, int]) -> None:
    """Refuse a rank above the smaller side of the weight (outputs, weights per output)."""
    if rank > min(shape):
        raise InputError(f"{owner}: rank {rank} exceeds the site {site.key} of {shape[0]} x {shape[1]}; lower it")


def orthogonality(parts: Iterable[Tensor]) -> Tensor:
    """Mean of the Frobenius norms ||P P' - I|| over factors P (n, d): how far their rows are from orthonormal."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for part in parts:
        by_shape.setdefault(part.shape, []).append(part)
    norms = []
    for same in map(torch.stack, by_shape.values()):
        unit = torch.eye(same.shape[1], dtype=same.dtype, device=same.device)
        norms.append(torch.linalg.vector_norm(same @ same.mT - unit, dim=(1, 2)))
    return torch.cat(norms).mean()


def factor_pair(rank: int, dim_in: int, dim_out: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A (rank, dim_in) Kaiming-uniform and B (dim_out, rank) zero: the usual start of a low-rank update."""
    a = nn.Parameter(torch.empty(rank, dim_in))
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a, nn.Parameter(torch.zeros(dim_out, rank))


class LowRankSite(Delta):
    """delta = s B A with A (rank, dim_in) Kaiming-uniform and B (dim_out, rank) zero at the start.

    Args:
        site: a linear; a convolution with `dim_in` as its weights per output.
        rank: inner width r.
        scaling: s.
        dropout: on the input of the update, in training; linears only.
        owner: the method's name, for messages.
        dim_in: width of A, that of the site where None.

    Raises:
        InputError: a rank above the size of the site.
    """

    def __init__(
        self,
        site: Site,
        rank: int,
        scaling: float = 1.0,
        dropout: float = 0.0,
        owner: str = "LoRA",
        dim_in: int | None = None,
    ) -> None:
        super().__init__(site)
        dim_in = site.dim_in if dim_in is None else dim_in
        require_rank(owner, rank, site, (site.dim_out, dim_in))
        self.a, self.b = factor_pair(rank, dim_in, site.dim_out)
        self.scaling, self.dropout = scaling, dropout

    def by_forward(self) -> bool:
        return self.training and self.dropout > 0

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.a, self.b, self.scaling

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, self.dropout, self.training))
