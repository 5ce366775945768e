"""The bottleneck MLP that several adapters put beside or behind a sub-layer."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ...core.context import Context
from ...core.kinds import Tokens
from ...core.sites import Site


class Bottleneck(nn.Module):
    """up(dropout(act(down(x)))) on (..., dim), with width r in the middle.

    The weight of `down` starts Kaiming-uniform as in an nn.Linear; everything else starts at zero, so the output does.
    """

    def __init__(self, dim: int, width: int, act: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        self.act, self.dropout = act, nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.dropout(self.act(self.down(x))))


class SerialBottleneck(Tokens):
    """y' = y + bottleneck(y), y (..., D) being the output of a sub-layer."""

    def __init__(self, site: Site, width: int, act: nn.Module) -> None:
        super().__init__(site)
        self.bottleneck = Bottleneck(site.dim_out, width, act)

    def forward(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        return y + self.bottleneck(y)
