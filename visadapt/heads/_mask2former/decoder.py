"""The layers in which queries look at the memory, each at the places of its own mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import FeedForward, xavier_normal


class Attention(nn.Module):
    """x + attention of x to a memory; positions are added to queries and keys, not to values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor, positions: Tensor, memory: Tensor, places: Tensor, hidden: Tensor | None) -> Tensor:
        """x (B, Q, width), positions (Q, width), memory (B, S, width), places (S, width), hidden (B, Q, S) bool."""
        if hidden is not None:
            hidden = hidden.repeat_interleave(self.attn.num_heads, 0)
        return x + self.attn(x + positions, memory + places, memory, attn_mask=hidden, need_weights=False)[0]


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention and feed-forward layer, each followed by its norm."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.cross_attn, self.self_attn = Attention(width, heads), Attention(width, heads)
        self.ffn = FeedForward(width, hidden)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, positions: Tensor, memory: Tensor, places: Tensor, hidden: Tensor) -> Tensor:
        """Shapes as in `Attention`."""
        x = self.norms[0](self.cross_attn(x, positions, memory, places, hidden))
        x = self.norms[1](self.self_attn(x, positions, x, positions, None))
        return self.norms[2](self.ffn(x))


class TransformerDecoder(nn.Module):
    """The layers, and the norm that class and mask are read through after each of them."""

    def __init__(self, width: int, heads: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(width, heads, hidden) for _ in range(depth))
        self.post_norm = nn.LayerNorm(width)
        xavier_normal(self)


@torch.no_grad()
def hidden_places(masks: Tensor, shape: tuple[int, int]) -> Tensor:
    """Where queries may not look: outside of their masks, or nowhere if the mask is empty.

    Args:
        masks: (B, Q, h, w) logits.
        shape: (h', w') of the level that is looked at.

    Returns:
        (B, Q, h' w') bool, True being hidden.
    """
    resized = F.interpolate(masks, shape, mode="bilinear", align_corners=False)
    hidden = (resized.sigmoid() < 0.5).flatten(2)
    return hidden & ~hidden.all(-1, keepdim=True)
