"""Multi-scale deformable attention (Deformable DETR, Zhu et al., 2021, arXiv 2010.04159, equation 3)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def deformable_attention(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of values at a few places per query, found by bilinear interpolation, zero outside of a map.

    Args:
        value: (B, S, heads, d), the cells of all levels one behind the other, row by row.
        shapes: (h, w) per level, the sum of h w being S.
        locations: (B, N, heads, levels, points, 2), x and y, 0 and 1 being the outer edges of the border cells.
        weights: (B, N, heads, levels, points).

    Returns:
        (B, N, heads * d).
    """
    batch, _, heads, _ = value.shape
    maps = value.permute(0, 2, 3, 1).flatten(0, 1)  # (B heads, d, S)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B heads, N, levels, points, 2)
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]  # (B heads, 1, N, levels, points)
    mixed = 0
    for level, cells in enumerate(maps.split([h * w for h, w in shapes], -1)):
        found = F.grid_sample(cells.unflatten(-1, shapes[level]), grids[:, :, level], align_corners=False)
        mixed = mixed + (found * weights[..., level, :]).sum(-1)  # (B heads, d, N)
    return mixed.unflatten(0, (batch, heads)).flatten(1, 2).mT


class DeformableAttention(nn.Module):
    """x + O attention(V x), where x plus its position gives the offsets and the weights of the points.

    Offsets are counted in cells of the level that they look at. At the start each head looks into a direction of its
    own, point k at k cells from the reference, with equal weights.
    """

    def __init__(self, width: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj, self.output_proj = nn.Linear(width, width), nn.Linear(width, width)

    @torch.no_grad()
    def start(self) -> None:
        """Set the initial values."""
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions /= directions.abs().amax(-1, keepdim=True)  # onto the square of side 2
        steps = torch.arange(1.0, self.points + 1)[:, None]
        offsets = (directions[:, None, None] * steps).expand(-1, self.levels, -1, -1)
        self.sampling_offsets.bias.copy_(offsets.flatten())
        for zero in (self.sampling_offsets.weight, *self.attention_weights.parameters()):
            nn.init.zeros_(zero)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, positions: Tensor, reference: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """Mix the cells of all levels.

        Args:
            x: (B, S, width).
            positions: (S, width).
            reference: (S, 2), x and y of each cell in [0, 1].
            shapes: (h, w) per level.

        Returns:
            (B, S, width).
        """
        query, value = x + positions, self.value_proj(x)
        exact = torch.promote_types(value.dtype, torch.float32)  # half precision cannot tell neighbouring places apart
        offsets = self.sampling_offsets(query).to(exact).unflatten(-1, (self.heads, self.levels, self.points, 2))
        sizes = reference.new_tensor([(w, h) for h, w in shapes])[:, None]
        locations = reference[:, None, None, None] + offsets / sizes
        weights = self.attention_weights(query).to(exact).unflatten(-1, (self.heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, (self.levels, self.points))
        split = value.to(exact).unflatten(-1, (self.heads, -1))
        return x + self.output_proj(deformable_attention(split, shapes, locations, weights).to(value.dtype))
