"""Self-attention over the patches of an image, in few dimensions, beside the attention of the network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.context import Context
from ..core.kinds import Tokens
from ..core.sites import Site
from ..errors import InputError
from ..registry import ADAPTERS

THETA = 1e4


def angles(grid: tuple[int, int], pairs: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(h w, 2 pairs) rotation of every channel at every patch, row by row, equal within each pair of neighbours.

    The first third of the pairs is the slot of time and not rotated, the second turns with the row number and the last
    with that of the column, pair j of its third by THETA^(-j / third) per step.
    """
    third = pairs // 3
    rows, cols, steps = (torch.arange(n, device=device, dtype=dtype) for n in (*grid, third))
    speed = THETA ** (-steps / third)
    by_row = (rows[:, None, None] * speed).expand(*grid, third)
    by_col = (cols[None, :, None] * speed).expand(*grid, third)
    return torch.cat([torch.zeros_like(by_row), by_row, by_col], -1).flatten(0, 1).repeat_interleave(2, 1)


class SpatialLowRankAttention(Tokens):
    """y' = y + up(attention(down(x))) on patches, x (B, L, D) being the normalised input of the attention.

    down (D, r) and up (r, D) have no bias, q, k, v and o (r, r) have one; up starts at zero.
    """

    position = "parallel"

    def __init__(self, site: Site, rank: int, heads: int) -> None:
        super().__init__(site)
        self.down, self.up = nn.Linear(site.dim_in, rank, bias=False), nn.Linear(rank, site.dim_out, bias=False)
        self.q, self.k, self.v, self.o = (nn.Linear(rank, rank) for _ in range(4))
        self.heads = heads
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        _, patches = ctx.split(x)
        low = self.down(patches)
        frames = low.unflatten(1, (-1, ctx.grid[0] * ctx.grid[1])).flatten(0, 1)  # (images, h*w, r)
        q, k, v = (f(frames).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        turn = angles(ctx.grid, q.shape[-1] // 2, x.device, torch.promote_types(q.dtype, torch.float32))
        sin, cos = turn.sin(), turn.cos()
        mixed = F.scaled_dot_product_attention(apply_rot_embed(q, sin, cos), apply_rot_embed(k, sin, cos), v)
        change = self.up(self.o(mixed.transpose(1, 2).flatten(2))).reshape(patches.shape)
        return y + F.pad(change, (0, 0, y.shape[1] - patches.shape[1], 0))


@ADAPTERS.register_module()
class SLRA(Adapter):
    """Spatial low-rank attention beside the attention: y + U attention(D n), n being the normalised input.

    D takes the patches of one image to r channels, where full self-attention with rotary positions (row and column;
    the slot of time is not rotated) mixes them, and U, zero at the start, takes them back. It sees one image at a time:
    frames of a clip, which are images of the batch or stand one behind the other in the sequence, stay apart, so that
    what the network does over time is left to it. Parameters per block: 2 D r + 4 (r^2 + r). The branch joins the
    attention's output before LayerScale and the residual sum, as the authors add it before the gate of their video
    transformer.

    Our design, where the paper knows no such thing: class, register and prompt tokens do not take part and are left as
    they are.

    Args:
        rank: r, a multiple of 6 * heads: each head has r / heads channels, in pairs, in three equal parts.
        heads: attention heads; 4 as published.
        layers: block indices.
    """

    kinds = ("tokens",)
    targets = ("attn",)
    roles = ("attn",)
    needs = frozenset({"tokens"})
    paper = "the spatial low-rank adapter of ToonComposer (TencentARC/ToonComposer)"

    def __init__(self, rank: int = 72, heads: int = 4, layers: Sequence[int] | None = None) -> None:
        super().__init__(layers=layers)
        self.require_positive(rank=rank, heads=heads)
        if rank % (6 * heads):
            near = max(1, round(rank / (6 * heads))) * 6 * heads
            raise InputError(
                f"SLRA: rank must be a multiple of 6 * heads = {6 * heads}, got {rank}; give e.g. rank={near}"
            )
        self.rank, self.heads = rank, heads

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> SpatialLowRankAttention:
        return SpatialLowRankAttention(site, self.rank, self.heads)
