"""From the maps of a backbone to three levels of memory and one fine map of mask features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .deformable import DeformableAttention
from .layers import FeedForward, sine_positions, xavier_normal

LEVELS, POINTS, GROUPS = 3, 4, 32


class ConvNorm(nn.Module):
    """Convolution of odd size k, group norm and, where asked for, ReLU."""

    def __init__(self, in_dim: int, width: int, size: int, bias: bool, relu: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, width, size, padding=size // 2, bias=bias)
        self.gn = nn.GroupNorm(GROUPS, width)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.gn(self.conv(x))
        return x.relu() if self.relu else x


class EncoderLayer(nn.Module):
    """Deformable attention and feed-forward layer, each followed by its norm."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(width, heads, LEVELS, POINTS)
        self.ffn = FeedForward(width, hidden)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor, positions: Tensor, reference: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        x = self.norms[0](self.self_attn(x, positions, reference, shapes))
        return self.norms[1](self.ffn(x))


class Encoder(nn.Module):
    """The layers that mix the cells of the three coarse levels."""

    def __init__(self, width: int, heads: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(width, heads, hidden) for _ in range(depth))

    def forward(self, x: Tensor, positions: Tensor, reference: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        for layer in self.layers:
            x = layer(x, positions, reference, shapes)
        return x


def cell_centres(shape: tuple[int, int], device: torch.device) -> Tensor:
    """(h w, 2): x and y of the centres of all cells, row by row, in (0, 1)."""
    rows, columns = ((torch.arange(n, device=device) + 0.5) / n for n in shape)
    return torch.cartesian_prod(rows, columns).flip(-1)


class PixelDecoder(nn.Module):
    """Deformable encoder on the three coarse levels, and one step of a feature pyramid to the finest.

    Args:
        in_channels: of the four maps, fine to coarse.
        width: of everything that comes out.
        heads: of the attention.
        hidden: inner width of the feed-forward layers.
        depth: encoder layers.
    """

    def __init__(self, in_channels: Sequence[int], width: int, heads: int, hidden: int, depth: int) -> None:
        super().__init__()
        finest, *coarse = in_channels
        self.input_convs = nn.ModuleList(ConvNorm(dim, width, 1, bias=True) for dim in reversed(coarse))
        self.encoder = Encoder(width, heads, hidden, depth)
        self.level_encoding = nn.Embedding(LEVELS, width)
        self.lateral_convs = nn.ModuleList([ConvNorm(finest, width, 1, bias=False)])
        self.output_convs = nn.ModuleList([ConvNorm(width, width, 3, bias=False, relu=True)])
        self.mask_feature = nn.Conv2d(width, width, 1)
        self._start()

    def _start(self) -> None:
        xavier_normal(self.encoder)
        for layer in self.encoder.layers:
            layer.self_attn.start()
        for block in self.input_convs:
            nn.init.xavier_uniform_(block.conv.weight)
            nn.init.zeros_(block.conv.bias)
        for conv in (self.lateral_convs[0].conv, self.output_convs[0].conv, self.mask_feature):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(self.mask_feature.bias)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[tuple[int, int]]]:
        """Decode the maps of a backbone.

        Args:
            maps: four (B, in_channels[i], h, w), fine to coarse, of any sizes.

        Returns:
            (B, width, h, w) mask features at the size of the finest map; the memory (B, h w, width) of the three coarse
            levels, coarse to fine; and their sizes (h, w).
        """
        finest, *coarse = maps
        coarse = [conv(x) for conv, x in zip(self.input_convs, reversed(coarse))]
        shapes = [tuple(x.shape[2:]) for x in coarse]
        width, device = self.level_encoding.embedding_dim, finest.device
        levels = zip(shapes, self.level_encoding.weight)
        positions = torch.cat([sine_positions(shape, width, device) + which for shape, which in levels])
        reference = torch.cat([cell_centres(shape, device) for shape in shapes])
        cells = torch.cat([x.flatten(2).mT for x in coarse], 1)
        memory = self.encoder(cells, positions, reference, shapes).split([h * w for h, w in shapes], 1)
        lateral = self.lateral_convs[0](finest)
        top = memory[-1].mT.unflatten(-1, shapes[-1])
        top = F.interpolate(top, lateral.shape[2:], mode="bilinear", align_corners=False)
        return self.mask_feature(self.output_convs[0](lateral + top)), list(memory), shapes
