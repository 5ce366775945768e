"""Low-rank updates of whole convolution kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.kinds import Delta
from ..core.sites import CONVS, LINEARS, Site
from ..errors import InputError
from ..registry import ADAPTERS
from ._common.low_rank import factor_pair, require_rank


class ConvLoRASite(Delta):
    """delta = s B A, cut row by row into (o, i, k, k), with a (r k, i k) random and b (o k, r k) zero at the start."""

    def __init__(self, site: Site, rank: int, kernel: int, scaling: float) -> None:
        super().__init__(site)
        self.a, self.b = factor_pair(rank * kernel, site.dim_in * kernel, site.dim_out * kernel)
        self.kernel, self.scaling = kernel, scaling

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        return (self.a, self.b, self.scaling) if self.kernel == 1 else None

    def delta(self) -> Tensor:
        return self.scaling * (self.b @ self.a).view(self.site.dim_out, -1)


@ADAPTERS.register_module()
class ConvLoRA(Adapter):
    """W' = W + s reshape(B A), s = alpha / r, for convolutions with a kernel of k x k.

    W is (o, i, k, k), A (r k, i k) and B (o k, r k). The product (o k, i k) is cut in row-major order: its entry (p, q)
    is number p i k + q of W, so that output channel n takes the rows n k to n k + k - 1. As a matrix (o, i k^2) the
    update has rank up to r k^2. Parameters per site: r k^2 (o + i). Linears and convolutions of 1 x 1 are the case
    k = 1, the usual W + s B A.

    The authors' network (the backbone DSCF) has rank 2 in its blocks and rank 8 behind them: here two adapters beside
    each other, targets ["block_*.c*"] and ["conv_2*", "upsampler.0"]. Their layer trains the bias of the convolution
    too; here it stays frozen, and BitFit beside it trains it.

    Args:
        rank: r; at most the smaller number of channels.
        alpha: numerator of the scaling s; twice the rank where None, as in the authors' configuration.
        targets: roles of convolutions without groups, and of linears.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("conv",)
    roles = (*LINEARS, *CONVS)
    paper = "the ConvLoRA of DSCLoRA, NTIRE 2025 Efficient Super-Resolution (Yaozzz666/DSCF-SR)"
    mergeable = True

    def __init__(
        self,
        rank: int = 2,
        alpha: float | None = None,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(rank=rank)
        self.require_strength(alpha=alpha)
        self.rank, self.alpha = rank, alpha

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> ConvLoRASite:
        module = backbone.body.get_submodule(site.path)
        rows, cols = getattr(module, "kernel_size", (1, 1))
        if rows != cols:
            raise InputError(f"ConvLoRA: {site.path} has a kernel of {rows} x {cols}; it takes square ones")
        if getattr(module, "groups", 1) != 1:
            raise InputError(f"ConvLoRA: {site.path} has {module.groups} groups; it takes none, choose other targets")
        require_rank("ConvLoRA", self.rank, site, (site.dim_out, site.dim_in))
        return ConvLoRASite(site, self.rank, rows, 2.0 if self.alpha is None else self.alpha / self.rank)
