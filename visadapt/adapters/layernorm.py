"""Tuning of the norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.kinds import WeightMap
from ..core.sites import NORMS, Site
from ..registry import ADAPTERS


class NormOffset(WeightMap):
    """w' = w + dw, b' = b + db with dw and db (dim_out,) zero at the start; a norm without a bias gets no db."""

    def __init__(self, site: Site, bias: bool) -> None:
        super().__init__(site)
        self.dw = nn.Parameter(torch.zeros(site.dim_out))
        self.db = nn.Parameter(torch.zeros(site.dim_out)) if bias else None

    def map(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w + self.dw, b if self.db is None else b + self.db


@ADAPTERS.register_module()
class LayerNormTuning(Adapter):
    """Offsets for the gain and the bias of every LayerNorm: y = (w + dw) * normalised(x) + b + db.

    Args:
        targets: roles of norms.
        layers: block indices; None takes in the norm after the last block.
    """

    kinds = ("weight",)
    targets = ("all-norm",)
    roles = NORMS
    paper = "LN-Tune (Basu et al., 2023), arXiv 2304.01917"
    mergeable = True

    def __init__(self, targets: Sequence[str] | None = None, layers: Sequence[int] | None = None) -> None:
        super().__init__(targets, layers)

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> NormOffset:
        return NormOffset(site, bias=backbone.body.get_submodule(site.path).bias is not None)
