"""Updates that are a matrix of distances between two sets of vectors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...core.kinds import Delta
from ...core.sites import Site
from ...errors import InputError
from .low_rank import require_rank

COEFFICIENTS = (0.1, -0.1)
"""Of the distances in the two halves of the vectors."""


class KernelSite(Delta):
    """delta = f(D), D[o, i] = sum_h c_h |outputs[h, o] - inputs[h, i]|.

    Trained are inputs (2, dim_in, q / 2) and outputs (2, dim_out, q / 2).

    Args:
        site: a linear.
        rank: q, even.
        dropout: on the input of the update, in training.
        drop_path: images that go without the update, in training.
        owner: the method's name, for messages.

    Raises:
        InputError: an odd rank, or one above the size of the site.
    """

    recompute = True

    def __init__(self, site: Site, rank: int, dropout: float, drop_path: float, owner: str) -> None:
        super().__init__(site)
        if rank % 2:
            raise InputError(f"{owner}: rank must be even, for the two halves of each vector, got {rank}")
        require_rank(owner, rank, site, (site.dim_out, site.dim_in))
        self.inputs = nn.Parameter(torch.empty(2, site.dim_in, rank // 2))
        self.outputs = nn.Parameter(torch.empty(2, site.dim_out, rank // 2))
        for vectors in (self.inputs, self.outputs):
            nn.init.kaiming_uniform_(vectors, a=math.sqrt(5))
        self.dropout, self.drop_path = dropout, drop_path

    def kernel(self) -> Tensor:
        """The sum of distances (dim_out, dim_in); never in half precision."""
        with torch.autocast(self.inputs.device.type, enabled=False):
            plus, minus = torch.cdist(self.outputs, self.inputs)
        return COEFFICIENTS[0] * plus + COEFFICIENTS[1] * minus

    def by_forward(self) -> bool:
        return self.training and (self.dropout > 0 or self.drop_path > 0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            y = checkpoint(self._linear, x, use_reentrant=False, preserve_rng_state=False)
        else:
            y = self._linear(x)
        if not self.training or self.drop_path == 0:
            return y
        shape = [1] * y.ndim
        shape[self.site.batch_dim] = y.shape[self.site.batch_dim]
        return y * (torch.rand(shape, device=y.device) >= self.drop_path) / (1 - self.drop_path)

    def _linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.delta())


SAMPLE = 4096
"""Values by which the neighbourhood of an order statistic is found."""


def smallest(magnitudes: Tensor, place: int) -> Tensor:
    """The `place`-th smallest value, counted from 1; of any number of values, where torch.quantile may end at 2^24.

    Exact. Only what lies between two values of a sample, chosen so that the result is almost always among it, is put
    in order: on the CPU that takes less than half the time of ordering all.
    """
    flat = magnitudes.flatten()
    if flat.device.type == "cpu" and len(flat) > 4 * SAMPLE and not torch.compiler.is_compiling():
        sample = flat[:: len(flat) // SAMPLE].sort().values
        centre, margin = place * len(sample) // len(flat), 3 * math.isqrt(len(sample))
        low, high = sample[max(0, centre - margin)], sample[min(len(sample) - 1, centre + margin)]
        inside = flat[(flat >= low) & (flat <= high)]
        rank = place - int((flat < low).count_nonzero())
        if 1 <= rank <= len(inside):
            return inside.kthvalue(rank).values
    return flat.kthvalue(place).values


def compete(d: Tensor, threshold: Tensor) -> Tensor:
    """d |d| where |d| exceeds the threshold, else 0; the factor |d| counts as a constant in the backward pass."""
    size = d.detach().abs()
    return d * torch.where(size > threshold, size, 0)
