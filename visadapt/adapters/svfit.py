"""Training of the leading singular values."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.decompose import svd
from ..core.kinds import Delta
from ..core.sites import CONVS, LINEARS, Site
from ..errors import InputError
from ..registry import ADAPTERS


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
class SVFit(Adapter):
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

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> SVFitSite:
        weight = self.weight(site, backbone)
        if self.rank is not None:
            if self.rank > min(weight.shape):
                shape = "{} x {}".format(*weight.shape)
                raise InputError(f"SVFit: rank {self.rank} exceeds the site {site.key} of {shape}; lower it")
            return SVFitSite(site, svd(weight, self.rank))
        u, s, vt = svd(weight)
        held = s.double().square().cumsum(0)
        rank = min(len(s), 1 + int((held <= self.energy * held[-1]).sum()))
        return SVFitSite(site, (u[:, :rank].contiguous(), s[:rank].clone(), vt[:rank].clone()))
