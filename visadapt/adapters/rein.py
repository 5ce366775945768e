"""Rein: learned tokens refine the patch features behind every block, and offer queries to a mask head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.context import Context
from ..core.kinds import Tokens
from ..core.sites import Site
from ..errors import InputError
from ..registry import ADAPTERS


class Refiner(nn.Module):
    """What all blocks share: W1, b1 (`value`), W2, b2 (`out`) and the strength s, which is fixed at 1 where None."""

    def __init__(self, dim: int, strength: float | None) -> None:
        super().__init__()
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.strength = None if strength is None else nn.Parameter(torch.tensor(strength))
        if strength is None:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def values(self, tokens: Tensor) -> Tensor:
        """(m, D) tokens to the rows that they add; the first one adds nothing."""
        return F.pad(self.value(tokens[1:]), (0, 0, 1, 0))

    def change(self, x: Tensor) -> Tensor:
        """s (x W2 + b2), x (B, N, D). The factor goes into the weight: the output need not be kept for its gradient."""
        if self.strength is None:
            return self.out(x)
        return F.linear(x, self.strength * self.out.weight, self.strength * self.out.bias)


class QueryLink(nn.Module):
    """Tokens of all blocks (blocks, m, D) to object queries (m, q)."""

    def __init__(self, dim: int, query_dim: int) -> None:
        super().__init__()
        self.project, self.merge = nn.Linear(dim, query_dim), nn.Linear(3 * query_dim, query_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        z = self.project(tokens)
        # Channel by channel: maximum, mean and last block stand beside each other.
        return self.merge(torch.stack([z.max(0).values, z.mean(0), z[-1]], -1).flatten(1))


class ReinTokens(Tokens):
    """X' = X + s ((Y + X) W2 + b2) on patches X (B, h*w, D), Y being what the block's tokens T (m, D) add to them.

    T = A B with A (m, r) and B (r, D); A is T itself, (m, D), where there is no rank.
    """

    def __init__(self, site: Site, options: Rein, bound: float, refiner: Refiner) -> None:
        super().__init__(site)
        width = site.dim_out if options.rank is None else options.rank
        self.a = nn.Parameter(torch.empty(options.length, width).uniform_(-bound, bound))
        self.b = None
        if options.rank is not None:
            self.b = nn.Parameter(torch.empty(width, site.dim_out).uniform_(-bound, bound))
        self.softmax = options.softmax
        self._refiner = (refiner,)  # in a tuple, because it belongs to the adapter and is stored there once

    def tokens(self) -> Tensor:
        return self.a if self.b is None else self.a @ self.b

    def forward(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        (refiner,), tokens = self._refiner, self.tokens()
        lead, patches = ctx.split(y)
        shares = F.linear(y, tokens)[
            :, lead.shape[1] :
        ]  # a product with all of y copies nothing, one with a slice does
        if self.softmax:
            shares = (shares * tokens.shape[1] ** -0.5).softmax(-1)
        seen = patches + shares @ refiner.values(tokens)
        return torch.cat([lead, patches + refiner.change(seen)], 1)


@ADAPTERS.register_module()
class Rein(Adapter):
    """Every patch looks at m learned tokens behind every block, and takes what they give through a shared MLP.

    With patches X, tokens T = A B of the block and S = softmax(X T^T / sqrt(D)):

        Y = S[:, 1:] (T[1:] W1 + b1),    X' = X + s ((Y + X) W2 + b2)

    The first token takes a share of the softmax and adds nothing, so that a patch may look away; it learns through the
    softmax alone. W1, W2 and the scalar s, 0.001 at the start, are shared by all blocks. Class, register and prompt
    tokens stay as they are. A and B start uniform in ±sqrt(6 / (C p² + sqrt(D r))), full tokens in
    ±sqrt(6 / (C p² + D)), with C bands and patch p.

    Queries: z = T Wt + bt of all blocks; per token the maximum, the mean and the last over the blocks, next to each
    other in every channel, go through one more linear to (m, q). A mask head takes them from `queries()` in place of
    its own; with heads that do not ask for any, set `query_dim=None`, or these projections get no gradient.

    Trained values in a ViT-L with the defaults: 2,990,081.

    Args:
        length: m, tokens per block; also the number of queries.
        rank: r of A (m, r) and B (r, D); full tokens (m, D) where None.
        query_dim: q, width of the queries; no queries where None.
        softmax: S is X T^T without softmax and without 1 / sqrt(D) where False.
        zero_start: W2 and b2 start at zero and s is fixed at 1, so that a fresh adapter changes nothing.
        layers: block indices.
    """

    kinds = ("tokens",)
    targets = ("block",)
    roles = ("block",)
    needs = frozenset({"tokens"})
    paper = "Stronger, Fewer, & Superior (Wei et al., 2024; w1oves/Rein), arXiv 2312.04265"
    identity_at_init = False

    def __init__(
        self,
        length: int = 100,
        rank: int | None = 16,
        query_dim: int | None = 256,
        softmax: bool = True,
        zero_start: bool = False,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(layers=layers)
        given = {"rank": rank, "query_dim": query_dim}
        self.require_positive(length=length, **{k: v for k, v in given.items() if v is not None})
        if length < 2:
            raise InputError(f"Rein: length must be at least 2, since the first token adds nothing, got {length}")
        self.length, self.rank, self.query_dim = length, rank, query_dim
        self.softmax, self.zero_start = softmax, zero_start
        self.identity_at_init = zero_start

    def shared(self, sites: list[Site], backbone) -> nn.ModuleDict:
        if len(widths := sorted({s.dim_out for s in sites})) > 1:
            raise InputError(f"Rein: blocks are {widths} wide and share one MLP; name blocks of one width in layers")
        made = {"refiner": Refiner(widths[0], None if self.zero_start else 1e-3)}
        if self.query_dim is not None:
            made["link"] = QueryLink(widths[0], self.query_dim)
        return nn.ModuleDict(made)

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> ReinTokens:
        fan = site.dim_out if self.rank is None else math.sqrt(site.dim_out * self.rank)
        bound = math.sqrt(6 / (backbone.in_chans * backbone.patch**2 + fan))
        return ReinTokens(site, self, bound, shared["refiner"])

    def queries(self) -> Tensor | None:
        """(m, q), with gradients to the tokens of all blocks."""
        if self.query_dim is None:
            return None
        return self.common["link"](torch.stack([piece.tokens() for piece in self.pieces.values()]))
