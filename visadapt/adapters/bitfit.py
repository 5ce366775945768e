"""Bias tuning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.kinds import WeightMap
from ..core.sites import WEIGHTS, Site
from ..registry import ADAPTERS


class BiasOffset(WeightMap):
    """b' = b + db with db (dim_out,) zero at the start; the weight is handed on untouched, so it costs no gradient."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.db = nn.Parameter(torch.zeros(site.dim_out))

    def map(self, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return w, b + self.db


@ADAPTERS.register_module()
class BitFit(Adapter):
    """An offset for every bias: b' = b + db.

    Linears, norms and convolutions without a bias are left out, and so are biases that a network keeps outside of them
    (the q and v biases of EVA). Where k is a linear of its own, its offset has no gradient: a constant added to every
    key cancels in the softmax over keys, unless keys are normalised or rotated behind the projection.

    Args:
        targets: roles of linears, norms and convolutions.
        layers: block indices; None takes in the biases outside the blocks.
    """

    kinds = ("weight",)
    targets = ("all-weights",)
    roles = WEIGHTS
    paper = "BitFit (Ben Zaken et al., 2021), arXiv 2106.10199"
    mergeable = True
    zero_grad = ("k", "xk")

    def __init__(self, targets: Sequence[str] | None = None, layers: Sequence[int] | None = None) -> None:
        super().__init__(targets, layers)

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> BiasOffset | None:
        return None if backbone.body.get_submodule(site.path).bias is None else BiasOffset(site)
