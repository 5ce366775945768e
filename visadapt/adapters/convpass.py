"""Convolutional bypasses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.context import Context
from ..core.kinds import Tokens
from ..core.sites import Site
from ..registry import ADAPTERS


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class ConvBypass(Tokens):
    """y' = y + s up(dropout(act(conv(act(down(x)))))), x (B, L, D) being the normalised input of the sub-layer.

    `conv` is 3 x 3 on the patch grid with r channels. Class, register and prompt tokens are images of one pixel to it:
    with zero padding only its centre sees them. `down` starts Xavier-uniform, `conv` as the identity, `up` at zero.
    """

    position = "parallel"

    def __init__(self, site: Site, width: int, strength: float, dropout: float) -> None:
        super().__init__(site)
        self.down, self.up = nn.Linear(site.dim_in, width), nn.Linear(width, site.dim_out)
        self.conv, self.dropout = nn.Conv2d(width, width, 3, padding=1), nn.Dropout(dropout)
        self.strength = strength
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.dirac_(self.conv.weight)
        for zero in (self.down.bias, self.conv.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        lead, patches = ctx.split(quick_gelu(self.down(x)))  # (B, n, r), (B, h*w, r)
        lead = F.linear(lead, self.conv.weight[:, :, 1, 1], self.conv.bias)
        patches = self.conv(patches.mT.unflatten(2, ctx.grid)).flatten(2).mT
        mixed = quick_gelu(torch.cat([lead, patches], 1))
        return y + self.strength * self.up(self.dropout(mixed))


@ADAPTERS.register_module()
class Convpass(Adapter):
    """A convolutional bottleneck in parallel to attention and MLP, fed with their normalised input.

    x + Attn(LN(x)) + s bypass(LN(x)), and the same around the MLP. The bypass joins the branch before LayerScale:
    where a network scales its branches by small numbers, as a randomly initialised DINOv2 does with 1e-5, the bypass
    is scaled with them. Parameters per place: 2 D r + D + r + 9 r² + r.

    Args:
        width: inner width r.
        scale: strength s; the authors choose it per task among 0.01, 0.1, 1, 10, 100.
        dropout: before the last projection, in training.
        targets: roles of sub-layers.
        layers: block indices.
    """

    kinds = ("tokens",)
    targets = ("attn", "mlp")
    roles = ("attn", "mlp")
    needs = frozenset({"tokens"})
    paper = "Convolutional Bypasses Are Better Vision Transformer Adapters (Jie and Deng, 2022), arXiv 2207.07039"

    def __init__(
        self,
        width: int = 8,
        scale: float = 1.0,
        dropout: float = 0.1,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(width=width)
        self.require_strength(scale=scale)
        self.require_rate(dropout=dropout)
        self.width, self.scale, self.dropout = width, scale, dropout

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> ConvBypass:
        return ConvBypass(site, self.width, self.scale, self.dropout)
