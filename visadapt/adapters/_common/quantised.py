"""Matrices of 1, 2, 4 or 8 bits per entry that are quantised while they train, and their packed form."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.kinds import SiteModule
from ...core.sites import Site
from ...errors import InputError

BITS = (1, 2, 4, 8)

EPS = 1e-5
"""Added to the standard deviation in the division, so that a constant matrix is no division by zero."""

ROUNDS = 500
"""Of the code book's iteration, which has not converged for 8 bits by then: the number is part of the method."""


def require_bits(owner: str, bits: int) -> None:
    """Refuse widths that do not fill a byte."""
    if bits not in BITS:
        raise InputError(f"{owner}: bits is 1, 2, 4 or 8, got {bits!r}")


@cache
def code_book(bits: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The 2^bits levels that have the smallest mean absolute error on N(0, 1), and the thresholds between their bins.

    Each round takes thresholds midway between the levels, then the median of N(0, 1) in every bin for its level. The
    thresholds are those of the last round, so midpoints of the levels before its update.
    """
    levels = torch.zeros(2**bits, dtype=torch.float64, device="cpu")
    ends = levels.new_tensor([0.0]), levels.new_tensor([1.0])
    for _ in range(ROUNDS):
        thresholds = (levels[:-1] + levels[1:]) / 2
        below = torch.cat([ends[0], torch.special.ndtr(thresholds), ends[1]])
        levels = torch.special.ndtri((below[:-1] + below[1:]) / 2)
    return tuple(levels.tolist()), tuple(thresholds.tolist())


def pack(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers below 2^bits to bytes (ceil(n bits / 8),), the first number in a byte's lowest bits."""
    each = 8 // bits
    rows = F.pad(codes.flatten(), (0, -codes.numel() % each)).view(-1, each)
    return (rows << bits * torch.arange(each, device=codes.device)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers (count,) that `pack` was given."""
    shifts = bits * torch.arange(8 // bits, device=packed.device)
    return (packed.long()[:, None] >> shifts & 2**bits - 1).flatten()[:count]


class Quantised(nn.Module):
    """Q = s q((W - m) / (s + 1e-5)) + m of a latent W, with its mean m and its unbiased standard deviation s.

    q takes the level of the bin, and its gradient is that of the identity; gradients flow through m and s as well. A
    value on a threshold counts as below it; the official code gives it the midpoint of two levels, which no file can
    hold.

    A file holds codes, m and s. They do not tell W, and a matrix of levels has another standard deviation than the W
    that they came from. `restore` therefore puts W to the levels in units of s and keeps as `origin` what mean and
    deviation were to be and what they are then; from there on they count relative to it. Q is the same, bit for bit,
    and training goes on from it without a jump.

    Args:
        latent: W (rows, columns).
        bits: 1, 2, 4 or 8.

    Attributes:
        origin: ((m, s) of the file, (mean, deviation) of W as restored); ((0, 1), (0, 1)) where no file was read.
    """

    def __init__(self, latent: Tensor, bits: int) -> None:
        super().__init__()
        self.weight, self.bits = nn.Parameter(latent), bits
        levels, thresholds = code_book(bits)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("thresholds", torch.tensor(thresholds), persistent=False)
        self.register_buffer("origin", torch.tensor([[0.0, 1.0], [0.0, 1.0]]))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """m and s, scalars."""
        given, restored = self.origin
        return given[0] + (self.weight.mean() - restored[0]), given[1] * (self.weight.std() / restored[1])

    def codes(self, standard: Tensor) -> Tensor:
        """Number of the bin of every entry."""
        return torch.bucketize(standard.detach(), self.thresholds)

    def forward(self) -> Tensor:
        """Q, of the shape of W."""
        m, s = self.statistics()
        standard = (self.weight - m) / (s + EPS)
        levels = self.levels[self.codes(standard)] + (standard - standard.detach())
        return levels * s + m

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """Packed `codes` (ceil(n bits / 8),) and `scale` (m, s)."""
        m, s = self.statistics()
        return {"codes": pack(self.codes((self.weight - m) / (s + EPS)), self.bits), "scale": torch.stack([m, s])}

    @torch.no_grad()
    def restore(self, codes: Tensor, scale: Tensor) -> None:
        """Take back what `stored` gave."""
        m, s = scale.to(self.weight)
        levels = self.levels[unpack(codes.to(self.weight.device), self.bits, self.weight.numel())]
        self.weight.copy_((levels * (s + EPS) + m).view_as(self.weight))
        deviation = self.weight.std()
        deviation = torch.where(deviation > 0, deviation, 1)  # of a constant matrix, whose s is 0
        self.origin.copy_(torch.stack([m, s, self.weight.mean(), deviation]).view(2, 2))


class QuantisedPair(SiteModule):
    """Quantised `down` (width, dim_in) and `up` (dim_out, width); files hold both packed.

    `down` starts Kaiming-uniform as in an nn.Linear, `up` truncated normal with a standard deviation of 0.001: at zero
    it would have no scale.
    """

    def __init__(self, site: Site, width: int, bits: int, strength: float, dropout: float) -> None:
        super().__init__(site)
        down, up = torch.empty(width, site.dim_in), torch.empty(site.dim_out, width)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        nn.init.trunc_normal_(up, std=1e-3, a=-2e-3, b=2e-3)
        self.down, self.up = Quantised(down, bits), Quantised(up, bits)
        self.strength, self.dropout = strength, dropout

    def stored(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": v for name, part in self.named_children() for key, v in part.stored().items()}

    def restore(self, stored: dict[str, Tensor]) -> None:
        for name, part in self.named_children():
            part.restore(stored[f"{name}.codes"], stored[f"{name}.scale"])
