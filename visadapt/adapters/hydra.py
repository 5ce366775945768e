"""Low-rank branches on the input and on the output of a linear."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.kinds import WeightMap
from ..core.sites import LINEARS, Site
from ..registry import ADAPTERS
from ._common.low_rank import require_rank


class Branch(nn.Module):
    """up(dropout(down(x))), without a nonlinearity between the two linears."""

    def __init__(self, dim_in: int, dim_out: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.down_proj, self.up_proj = nn.Linear(dim_in, rank), nn.Linear(rank, dim_out)
        nn.init.xavier_uniform_(self.down_proj.weight)
        for value in (self.down_proj.bias, *self.up_proj.parameters()):
            nn.init.zeros_(value)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.up_proj(F.dropout(self.down_proj(x), self.dropout, self.training))

    def constant(self) -> Tensor:
        """What comes out for x = 0, (dim_out,)."""
        return self.up_proj.weight @ self.down_proj.bias + self.up_proj.bias


class HydraSite(WeightMap):
    """y = z + s par(x) + s seq(z) with z = w x + b, by way of rank r in both branches."""

    def __init__(self, site: Site, rank: int, scaling: float, dropout: float) -> None:
        super().__init__(site)
        self.par = Branch(site.dim_in, site.dim_out, rank, dropout)
        self.seq = Branch(site.dim_out, site.dim_out, rank, dropout)
        self.scaling, self.dropout = scaling, dropout

    @property
    def random(self) -> bool:
        return self.training and self.dropout > 0

    def by_forward(self) -> bool:
        # Through the new weight, the gradients would go through one of the size of the weight.
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        return learns or self.random

    def map(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
        (a_p, b_p), (a_s, b_s) = ((f.down_proj.weight, f.up_proj.weight) for f in (self.par, self.seq))
        new_w = w + self.scaling * (b_p @ a_p + b_s @ (a_s @ w))
        constant = self.scaling * (self.par.constant() + self.seq.constant())
        return new_w, constant if b is None else b + self.scaling * (b_s @ (a_s @ b)) + constant

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        z = base(x)
        return z + self.scaling * (self.par(x) + self.seq(z))


@ADAPTERS.register_module()
class Hydra(Adapter):
    """y = z + s (B_p (A_p x + a_p) + b_p) + s (B_s (A_s z + a_s) + b_s) with z = W x + b of the frozen layer.

    The parallel branch sees the layer's input, the sequential one its output before the parallel one is added. Both are
    linear and merge exactly: W' = W + s (B_p A_p + B_s A_s W) and
    b' = b + s (B_s A_s b + B_p a_p + b_p + B_s a_s + b_s). A are (r, i) and (r, o), B (o, r); r (i + 3 o) + 2 r + 2 o
    values per site. A is Xavier-uniform, the rest starts at zero.

    This is the form of the official VTAB code, with biases in the branches and dropout between A and B. Its CLIP form
    is the same at fc2 alone with A from N(0, 0.02^2); its RoBERTa form has no biases. The official merge takes the
    weights of fc2 for those of proj, which is not repeated.

    Args:
        rank: r of each branch.
        scaling: s; the official VTAB runs take 0.1 to 4.5 by data set.
        dropout: inside the branches, in training; 0 to 0.2 there.
        targets: roles of linears.
        layers: block indices.
    """

    kinds = ("weight",)
    targets = ("proj", "fc2")
    roles = LINEARS
    paper = "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning, arXiv 2309.06922"
    mergeable = True
    zero_grad = ("k", "xk")

    def __init__(
        self,
        rank: int = 2,
        scaling: float = 1.0,
        dropout: float = 0.0,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(rank=rank)
        self.require_strength(scaling=scaling)
        self.require_rate(dropout=dropout)
        self.rank, self.scaling, self.dropout = rank, scaling, dropout

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> HydraSite:
        require_rank("Hydra", self.rank, site, (site.dim_out, site.dim_in))
        return HydraSite(site, self.rank, self.scaling, self.dropout)
