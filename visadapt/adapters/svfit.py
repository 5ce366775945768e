"""Training of the leading singular values."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..core.kinds import Delta
from ..core.sites import CONVS, LINEARS, Site
from ..registry import ADAPTERS
from ._common.decomposed import Decomposed
from ._common.low_rank import require_rank


class SVFitSite(Delta):
    """delta = U_r diag(sigma - S_r) Vt_r with sigma (r,) trained and u (o, r), s (r,), vt (r, i) frozen."""

    rebases = True

    def __init__(self, site: Site, factors: tuple[Tensor, Tensor, Tensor]) -> None:
        super().__init__(site)
        for name, value in zip(("u", "s", "vt"), factors):
            self.register_buffer(name, value, persistent=False)
        self.sigma = nn.Parameter(self.s.clone())

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return (self.sigma - self.s)[:, None] * self.vt, self.u, 1.0


@ADAPTERS.register_module()
class SVFit(Decomposed):
    """W' = U_r diag(sigma) Vt_r + W_e: trained singular values of the best rank-r part of the weight, the rest frozen.

    sigma starts at the singular values S_r, so that nothing changes; r values per site. Convolutions are taken as
    (o, i kh kw). U_r and Vt_r are made anew from the base weight and are not stored.

    Our design where the publication is silent: its rank "holds more than 99 % of the information", which we measure by
    |W_r|^2 / |W|^2, the sum of the squared singular values; and every site has a rank of its own. Weight decay would
    pull sigma to 0 instead of S: leave vectors out of it.

    Args:
        rank: leading singular values r; where None the fewest that hold more than `energy`.
        energy: share of |W|^2.
        targets: roles of linears and convolutions.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("all-linear",)
    roles = (*LINEARS, *CONVS)
    paper = "SVFit: fine-tuning with the leading singular values of the pre-trained weights"
    mergeable = True

    def __init__(
        self,
        rank: int | None = None,
        energy: float = 0.99,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        if rank is not None:
            self.require_positive(rank=rank)
        self.require_rate(energy=energy)
        self.rank, self.energy = rank, energy

    def components(self, site: Site, shape: tuple[int, int]) -> int | None:
        if self.rank is not None:
            require_rank("SVFit", self.rank, site, shape)
        return self.rank

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> SVFitSite:
        u, s, vt = self.factors.pop(site.key)
        if self.rank is None:
            held = s.double().square().cumsum(0)
            rank = min(len(s), 1 + int((held <= self.energy * held[-1]).sum()))
            u, s, vt = u[:, :rank].contiguous(), s[:rank].clone(), vt[:rank].clone()
        return SVFitSite(site, (u, s, vt))
