"""Partial connection adaptation: some input columns of the weights."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.kinds import Delta
from ..core.sites import CONVS, LINEARS, Site
from ..core.sparse import Entries
from ..errors import InputError
from ..registry import ADAPTERS


class PaCASite(Delta):
    """The `columns` (c,) of the weight (o, i) are replaced by `part` (o, c); `start` (o, c) is what the base has there.

    `index` (o * c,) are their places in the flattened weight.
    """

    def __init__(self, site: Site, weight: Tensor, columns: Tensor) -> None:
        super().__init__(site)
        start, width = weight[:, columns], weight.shape[1]
        self.part = nn.Parameter(start.clone())
        rows = torch.arange(len(weight))[:, None]
        for name, value in dict(start=start, columns=columns, index=(rows * width + columns).flatten()).items():
            self.register_buffer(name, value, persistent=False)
        self.width = width

    def entries(self) -> Entries:
        return Entries(self.index, (self.part - self.start).flatten(), self.columns)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return F.one_hot(self.columns, self.width).to(self.part.dtype), self.part - self.start, 1.0


@ADAPTERS.register_module()
class PaCA(Adapter):
    """W'[:, idx] is trained and the rest of W is frozen, with `rank` random input columns idx per site.

    What trains are the weights themselves, o * rank of them per site, starting at those of the base: weight decay draws
    them to zero. Training keeps only x[..., idx] of a layer's input, and forms no gradient but that of these columns:
    dL/dW'[:, idx] = dL/dy.T x[..., idx]. A merge writes the columns in place, as for other sparse updates.

    Not taken from the official code: its parameter is W'[:, idx] / s with s = alpha / rank, which only multiplies the
    learning rate by s^2 under plain gradient descent, and its schedule of copying the parameter into the weight, which
    leaves every second training pass and every evaluation with the weight of the step before. Convolutions are ours:
    `rank` input channels with all their taps, o * rank * kh * kw values.

    Args:
        rank: input columns per site.
        seed: of the columns. Each site draws with this number and its own name.
        targets: roles of linears and convolutions.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("all-linear",)
    roles = (*LINEARS, *CONVS)
    paper = "PaCA: Partial Connection Adaptation for Efficient Fine-Tuning (WooSunghyeon/paca)"
    mergeable = True

    def __init__(
        self,
        rank: int = 16,
        seed: int = 0,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(rank=rank)
        self.rank, self.seed = rank, seed

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> PaCASite:
        if self.rank > site.dim_in:
            raise InputError(
                f"PaCA: rank {self.rank} exceeds the {site.dim_in} inputs of the site {site.key}; lower it"
            )
        weight = self.weight(site, backbone).cpu()
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(site.key.encode()))
        channels = torch.randperm(site.dim_in, generator=generator)[: self.rank].sort().values
        taps = weight.shape[1] // site.dim_in
        return PaCASite(site, weight, (channels[:, None] * taps + torch.arange(taps)).flatten())
