"""BLIP's text decoder: BERT with causal self-attention and cross-attention to the tokens of an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import InputError

EPS = 1e-12
Projected = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""q (B, heads, L, head_dim), k and v (B, heads, S, head_dim), and what is added to the scores or None."""


@dataclass
class KeysValues:
    """Keys and values (B, heads, S, head_dim) that one attention has computed so far."""

    k: Tensor | None = None
    v: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.k is None else self.k.shape[2]

    def extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, after those of new tokens have been added."""
        if self.k is not None:
            k, v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        self.k, self.v = k, v
        return k, v


Cache = list[tuple[KeysValues, KeysValues]]
"""Of self-attention and of cross-attention, per block."""


class Attention(nn.Module):
    """An attention with its four linears; subclasses say where keys and values come from.

    Args:
        width: of the tokens that ask, and of the attention.
        heads: number of heads.
        source: width of the tokens that are asked.
    """

    def __init__(self, width: int, heads: int, source: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(source, width), nn.Linear(source, width)
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor, *args: Tensor | KeysValues | None) -> Projected:
        raise NotImplementedError

    def output(self, o: Tensor) -> Tensor:
        """(B, heads, L, head_dim) to (B, L, D)."""
        return self.proj(o.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, *args: Tensor | KeysValues | None) -> Tensor:
        q, k, v, bias = self.project(x, *args)
        return self.output(F.scaled_dot_product_attention(q, k, v, attn_mask=bias))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class SelfAttention(Attention):
    """Among the tokens of a text, those in the cache first."""

    def project(self, x: Tensor, bias: Tensor | None, past: KeysValues | None) -> Projected:
        q, k, v = (self._heads(linear(x)) for linear in (self.q, self.k, self.v))
        if past is not None:
            k, v = past.extended(k, v)
        return q, k, v, bias if bias is None else bias.to(q.dtype)


class CrossAttention(Attention):
    """From the tokens of a text to those of an image, whose keys and values are computed once."""

    def project(self, x: Tensor, image: Tensor, past: KeysValues | None) -> Projected:
        if past is not None and past.length:
            return self._heads(self.q(x)), past.k, past.v, None
        q, k, v = self._heads(self.q(x)), self._heads(self.k(image)), self._heads(self.v(image))
        if past is not None:
            past.extended(k, v)
        return q, k, v, None


class AttentionView:
    """What an attention core of an adapter sees of an `Attention`, which is kept by reference."""

    def __init__(self, module: Attention) -> None:
        self.module = module

    def project(self, x: Tensor, *args: Tensor | KeysValues | None) -> Projected:
        return self.module.project(x, *args)

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.module.output(o)

    def linear(self) -> nn.Linear:
        return self.module.proj


class Block(nn.Module):
    """Self-attention, cross-attention and MLP, each with a norm behind its residual sum."""

    def __init__(self, width: int, heads: int, hidden: int, image_width: int) -> None:
        super().__init__()
        self.attn, self.norm1 = SelfAttention(width, heads, width), nn.LayerNorm(width, EPS)
        self.xattn, self.xnorm = CrossAttention(width, heads, image_width), nn.LayerNorm(width, EPS)
        self.mlp, self.norm2 = Mlp(width, hidden), nn.LayerNorm(width, EPS)

    def forward(
        self,
        x: Tensor,
        image: Tensor,
        bias: Tensor | None,
        past: KeysValues | None = None,
        seen: KeysValues | None = None,
    ) -> Tensor:
        x = self.norm1(x + self.attn(x, bias, past))
        x = self.xnorm(x + self.xattn(x, image, seen))
        return self.norm2(x + self.mlp(x))


class TextDecoder(nn.Module):
    """Tokens of a text and of an image to scores of the next token, tied to the word embeddings.

    There is no dropout. The bias of the scores is a buffer: the features of an image do not come to it, so that it
    could not train with all others.

    Args:
        image_width: of the image tokens.
        layers: number of blocks.
        width: of the text tokens.
        heads: per attention.
        vocab: number of words.
        hidden: inner width of the MLPs, 4 * width where None.
        positions: longest text.
    """

    def __init__(
        self,
        image_width: int,
        layers: int = 12,
        width: int = 768,
        heads: int = 12,
        vocab: int = 30524,
        hidden: int | None = None,
        positions: int = 512,
    ) -> None:
        super().__init__()
        hidden = 4 * width if hidden is None else hidden
        sizes = dict(layers=layers, width=width, heads=heads, vocab=vocab, hidden=hidden, positions=positions)
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"text decoder: {name} must be at least 1, got {value}")
        if width % heads:
            raise InputError(f"text decoder: width {width} is no multiple of its {heads} heads")
        self.words, self.positions = nn.Embedding(vocab, width), nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width, EPS)
        self.blocks = nn.ModuleList(Block(width, heads, hidden, image_width) for _ in range(layers))
        self.answer, self.answer_norm = nn.Linear(width, width), nn.LayerNorm(width, EPS)
        self.register_buffer("bias", torch.zeros(vocab))
        for table in (self.words, self.positions):  # as in BERT; scores would be large with torch's own start
            nn.init.normal_(table.weight, std=0.02)
        self.saving = False

    def cache(self) -> Cache:
        """An empty one, for texts that grow from call to call."""
        return [(KeysValues(), KeysValues()) for _ in self.blocks]

    def forward(self, ids: Tensor, image: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """The last hidden states, (B, L, D).

        Args:
            ids: (B, L) words; with a cache, those that follow what is in it.
            image: (B, N, image_width); not looked at again once the cache holds its keys and values.
            mask: (B, S) bool over all words, those in the cache first; False is not attended to.
            cache: filled further.
        """
        start = cache[0][0].length if cache else 0
        stop = start + ids.shape[1]
        x = self.norm(self.words(ids) + self.positions.weight[start:stop])
        bias = causal_bias(start, stop, mask, x)
        for block, past in zip(self.blocks, cache or [()] * len(self.blocks)):
            if self.saving and not past:
                x = checkpoint(block, x, image, bias, use_reentrant=False)
            else:
                x = block(x, image, bias, *past)
        return x

    def answers(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) to what the words are compared with, (..., D)."""
        return self.answer_norm(F.gelu(self.answer(hidden)))

    def scores(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) to the scores of the word that follows, (..., vocab)."""
        return F.linear(self.answers(hidden), self.words.weight, self.bias)


def causal_bias(start: int, stop: int, mask: Tensor | None, like: Tensor) -> Tensor | None:
    """What keeps the words from `start` to `stop` from seeing later and masked ones: 0 and -inf, (L, stop) or
    (B, 1, L, stop), in the dtype of `like`; None where nothing is hidden.
    """
    if mask is None and stop - start == 1:
        return None
    place = torch.arange(stop, device=like.device)
    hidden = place > place[start:, None]
    if mask is not None:
        hidden = hidden | ~mask[:, None, None]
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill(hidden, float("-inf"))
