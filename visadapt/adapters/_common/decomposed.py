"""Methods that start from a decomposition of every weight."""

from __future__ import annotations

from torch import Tensor, nn

from ...core.adapter import Adapter
from ...core.decompose import Rank, one_core_each, svd
from ...core.sites import Site


class Decomposed(Adapter):
    """Decomposes the weights of all sites before the first piece is made, on as many cores as torch uses.

    Attributes:
        factors: what `decompose` gave, by site key; `make` takes it out.
    """

    def components(self, site: Site, shape: tuple[int, int]) -> Rank:
        """How many components the site needs, all where None; refuses what a weight of this shape cannot give."""
        raise NotImplementedError

    def decompose(self, weight: Tensor, components: Rank) -> tuple[Tensor, ...]:
        return svd(weight, components)

    def shared(self, sites: list[Site], backbone) -> nn.ModuleDict:
        needed = [self.components(site, tuple(self.weight(site, backbone).shape)) for site in sites]
        found = one_core_each(lambda s, n: self.decompose(self.weight(s, backbone), n), sites, needed)
        self.factors = dict(zip((site.key for site in sites), found))
        return super().shared(sites, backbone)
