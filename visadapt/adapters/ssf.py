"""Scaling and shifting of features."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.kinds import WeightMap
from ..core.sites import NORMS, WEIGHTS, Site
from ..registry import ADAPTERS


class ScaleShift(WeightMap):
    """y' = gamma * y + beta per channel with gamma and beta (dim_out,).

    Folded into the module: w' = gamma[:, None] * w, b' = gamma * b + beta.
    """

    random = False

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.gamma = nn.Parameter(torch.empty(site.dim_out).normal_(1, 0.02))
        self.beta = nn.Parameter(torch.empty(site.dim_out).normal_(0, 0.02))
        self.shape = (-1, 1, 1) if site.layout == "NCHW" else (-1,)
        self.dense = site.role not in NORMS

    def by_forward(self) -> bool:
        # Through the folded weight, the gradient of gamma would go through a gradient of the size of the weight.
        return self.dense and torch.is_grad_enabled() and self.gamma.requires_grad

    def map(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
        new_b = self.beta if b is None else self.gamma * b + self.beta
        return self.gamma.view(-1, *[1] * (w.ndim - 1)) * w, new_b

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        y = base(x)
        return y * self.gamma.view(self.shape).to(y.dtype) + self.beta.view(self.shape).to(y.dtype)


@ADAPTERS.register_module()
class SSF(Adapter):
    """Every linear, norm and patch convolution is followed by y' = gamma * y + beta per channel.

    As in the authors' code gamma is drawn from N(1, 0.02²) and beta from N(0, 0.02²), so a fresh adapter is near the
    base and not equal to it. Where k is a linear of its own, the gradient of its beta is zero as that of a key bias.

    Args:
        targets: roles of linears, norms and convolutions.
        layers: block indices; None takes in what is outside the blocks.
    """

    kinds = ("weight",)
    targets = ("all-weights",)
    roles = WEIGHTS
    paper = "Scaling & Shifting Your Features (Lian et al., 2022), arXiv 2210.08823"
    mergeable = True
    identity_at_init = False
    zero_grad = ("k", "xk")

    def __init__(self, targets: Sequence[str] | None = None, layers: Sequence[int] | None = None) -> None:
        super().__init__(targets, layers)

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> ScaleShift:
        return ScaleShift(site)
