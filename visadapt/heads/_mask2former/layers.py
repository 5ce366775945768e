"""Parts that both halves of Mask2Former are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TEMPERATURE = 1e4


def sine_positions(shape: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """(h w, width) encoding of the cells of a grid, row by row: half the channels tell the row, half the column.

    Rows and columns count from 1 and are divided by the size of the grid, so that the last one is at 2 pi on grids of
    every size. Channels 2 j and 2 j + 1 of a half are sine and cosine of position / 10000^(2 j / half), as in DETR.
    """
    half = width // 2
    pairs = torch.arange(half // 2, device=device)
    slowness = TEMPERATURE ** (2 * pairs / half)
    axes = []
    for size in shape:
        steps = torch.arange(1, size + 1, device=device) / (size + 1e-6) * 2 * math.pi
        angles = steps[:, None] / slowness
        axes.append(torch.stack([angles.sin(), angles.cos()], -1).flatten(1))  # (size, half)
    rows, columns = axes
    grid = rows[:, None].expand(-1, shape[1], -1), columns[None].expand(shape[0], -1, -1)
    return torch.cat(grid, -1).flatten(0, 1)


class FeedForward(nn.Module):
    """x + W2 relu(W1 x), on the last dimension."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Sequential(nn.Linear(width, hidden), nn.ReLU()), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def xavier_normal(module: nn.Module) -> None:
    """Start every matrix of a module with Xavier's normal numbers; vectors stay as they are."""
    for value in module.parameters():
        if value.ndim > 1:
            nn.init.xavier_normal_(value)
