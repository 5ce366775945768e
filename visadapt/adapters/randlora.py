"""Full-rank updates from frozen random bases with trained scalings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.kinds import Delta
from ..core.sites import LINEARS, Site
from ..registry import ADAPTERS
from ._common.low_rank import require_rank


class Bases(nn.Module):
    """Random bases of all sites: `b` (longest side, bases, rank) and `a` (rank, longest of the shorter sides).

    Uniform, each of standard deviation 1.
    """

    def __init__(self, long: int, short: int, count: int, rank: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in dict(b=(long, count, rank), a=(rank, short)).items():
            uniform = 2 * torch.rand(shape, generator=generator) - 1
            self.register_buffer(name, uniform / uniform.std(), persistent=False)


class RandLoRASite(Delta):
    """delta = s B A for a wide output, and its transpose for a wide input.

    With L the longer and m the shorter side, n bases and rank r: B (L, n r) is the frozen basis, its column n' r + j
    being number n', j. Row j n + n' of A (n r, m) is lambda[n', j] a[j] * gamma[n'], with lambda (n, r), gamma (n, m).
    """

    def __init__(self, site: Site, bases: Bases, count: int, scaling: float) -> None:
        super().__init__(site)
        rank = len(bases.a)
        self.lambda_ = nn.Parameter(torch.full((count, rank), 1 / max(count, rank)))
        self.gamma = nn.Parameter(torch.zeros(count, min(site.dim_in, site.dim_out)))
        self.bases, self.scaling = bases, scaling

    def factors(self) -> tuple[Tensor, Tensor, float]:
        count, short = self.gamma.shape
        b = self.bases.b[: max(self.site.dim_in, self.site.dim_out), :count].flatten(1)
        a = (self.lambda_.T[:, :, None] * self.bases.a[:, None, :short] * self.gamma).flatten(0, 1)
        return (b.T, a.T, self.scaling) if self.site.dim_in > self.site.dim_out else (a, b, self.scaling)


@ADAPTERS.register_module()
class RandLoRA(Adapter):
    """W' = W + s sum_n B_n diag(lambda_n) A diag(gamma_n), s = alpha / rank, with frozen random B_n and A.

    The form of the official vision code. B_n (longer side, rank) and A (rank, shorter side) are cut from bases that the
    whole model shares; they are drawn from one seed and not stored. There are n = min(o, i) // rank + 1 of them, enough
    for a delta of full rank, and n (rank + min(o, i)) trained values per site. lambda starts at 1 / max(n, rank) and
    gamma at zero. The official code pairs column n' r + j of all B_n with row j n + n' of all A diag(gamma_n), not with
    n' r + j; with random columns that is the same distribution, and it is kept so that published values fit.

    A delta of full rank has no cheap form: a training step forms every one by a product of (o, n rank) and
    (n rank, i), and with it the gradient of the whole weight. With few `bases` the update is a LoRA of rank n rank.

    Args:
        rank: r, columns per basis.
        alpha: numerator of s.
        bases: the largest n; as many as give full rank where None.
        seed: of the bases.
        targets: roles of linears.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("all-linear",)
    roles = LINEARS
    paper = "RandLoRA: Full-rank parameter-efficient fine-tuning of large models (PaulAlbert31/RandLoRA)"
    mergeable = True

    def __init__(
        self,
        rank: int = 6,
        alpha: float = 1.0,
        bases: int | None = None,
        seed: int = 0,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(rank=rank, **({} if bases is None else {"bases": bases}))
        self.require_strength(alpha=alpha)
        self.rank, self.alpha, self.bases, self.seed = rank, alpha, bases, seed

    def _count(self, site: Site) -> int:
        full = min(site.dim_in, site.dim_out) // self.rank + 1
        return full if self.bases is None else min(full, self.bases)

    def shared(self, sites: list[Site], backbone) -> nn.ModuleDict:
        long = max(max(s.dim_in, s.dim_out) for s in sites)
        short = max(min(s.dim_in, s.dim_out) for s in sites)
        count = max(self._count(s) for s in sites)
        return nn.ModuleDict({"bases": Bases(long, short, count, self.rank, self.seed)})

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> RandLoRASite:
        require_rank("RandLoRA", self.rank, site, (site.dim_out, site.dim_in))
        return RandLoRASite(site, shared["bases"], self._count(site), self.alpha / self.rank)
