"""The six kinds of things that can be attached to a site. A method subclasses one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .context import Context
from .sites import Site
from .sparse import Entries

if TYPE_CHECKING:
    from .inject import Output


class SiteModule(nn.Module):
    """One attached piece of an adapter.

    Attributes:
        kind: which of the six kinds this is.
        folds: the piece can be folded into the base weights.
        site: where it sits; None for a Side.
        owner: name of the adapter it belongs to.
        on: whether it takes part in the forward pass.
        scale: run-time factor on what it changes; 1 is the trained strength.
        random: while `by_forward` says so no weight gives the same, as under dropout; False where `forward` is only
            the cheaper way.
        rebases: it was made from the base weight and stands for a part of it, so that a second such piece on the same
            rows would count that part twice.
        recompute: of a Delta or WeightMap whose weight is computed from much less than it and its intermediate values
            take; training computes it again in the backward pass and keeps none of them.
    """

    kind: ClassVar[str]
    folds: ClassVar[bool] = False
    random: bool = True
    rebases: bool = False
    recompute: ClassVar[bool] = False

    def __init__(self, site: Site | None) -> None:
        super().__init__()
        self.site = site
        self.owner = ""
        self.on = False
        self.scale = 1.0

    def by_forward(self) -> bool:
        """True while `forward` must run in place of the merged weight, e.g. under dropout."""
        return False

    def stored(self) -> dict[str, Tensor]:
        """What an adapter file holds of it; packed forms override this and `restore` together."""
        return self.state_dict()

    @torch.no_grad()
    def restore(self, stored: dict[str, Tensor]) -> None:
        """Take back what `stored` gave; names and shapes are known to fit."""
        own = self.state_dict()
        for name, value in stored.items():
            own[name].copy_(value)


class Delta(SiteModule):
    """y[rows] += x @ delta.T (or the convolution with delta).

    Attributes:
        pair: names of the parameters A (r, in) and B (out, r) of methods that have just these two, for optimizers that
            treat them as a pair; `factors()` then gives their scale s.
    """

    kind = "delta"
    folds = True
    pair: ClassVar[tuple[str, str] | None] = None

    def delta(self) -> Tensor:
        """(dim_out, dim_in) for linears; for convolutions the weight's shape, or flattened to (dim_out, -1)."""
        a, b, scale = self.factors()
        return scale * (b @ a)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """(A (r, dim_in), B (dim_out, r), s) with delta = s * B @ A; None where delta has no such form."""
        return None

    def entries(self) -> Entries | None:
        """What of delta is not zero, None where that is most of it. Merging then exchanges these entries only."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """The change of the output, (..., dim_out), for linears."""
        if (low_rank := self.factors()) is None:
            return F.linear(x, self.delta())
        a, b, scale = low_rank
        return F.linear(F.linear(x, a), b) * scale


class WeightMap(SiteModule):
    """y = x @ w'.T + b' with (w', b') a function of the frozen weight and bias."""

    kind = "weight"
    folds = True

    def map(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """New weight and bias of the site's rows."""
        raise NotImplementedError

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """Output of the site's rows where `by_forward` says so; `base` is the map before this one."""
        raise NotImplementedError


class Tokens(SiteModule):
    """y' = f(x, y, ctx) on the tokens at a sub-layer.

    `position` is "after" or "parallel" (f sees input and output, and returns the new output) or "before" (f sees the
    input as both x and y, and returns the new input). At `attn` and `mlp` y is the sub-layer's output before LayerScale
    and the residual sum; at `attn_res` and `mlp_res` x is the residual stream before the norm and y the branch after
    LayerScale and DropPath.
    """

    kind = "tokens"
    position = "after"

    def forward(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        raise NotImplementedError


class AttnCore(SiteModule):
    """o = attend(q, k, v, bias, ctx) in place of the softmax core of an attention; all (B, heads, L, head_dim).

    Methods that also change what comes out of the attention override `run` instead.
    """

    kind = "attention"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, ctx: Context) -> Tensor:
        raise NotImplementedError

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        output: Output,
        ctx: Context,
    ) -> Tensor:
        """The attention's output (B, L, D), before LayerScale and the residual sum.

        Args:
            q: (B, heads, L, head_dim).
            k: (B, heads, S, head_dim), as is v; S is L where tokens look at each other.
            v: likewise.
            bias: what is added to the scores, (..., L, S), or None.
            output: (B, heads, N, head_dim) to (B, N, D), the frozen output projection of the attention.
                `output.then(linear, o)` is linear(output(o)) for less.
            ctx: of the pass.
        """
        return output(self.attend(q, k, v, bias, ctx))


class Prompt(SiteModule):
    """Tokens inserted after the prefix of a block's input.

    `deep` prompts are taken out again behind the block; shallow ones travel to the end of the network, where the
    backbone takes them out.
    """

    kind = "prompt"
    deep = True

    @property
    def count(self) -> int:
        """Number of tokens n."""
        raise NotImplementedError

    def forward(self, batch: int) -> Tensor:
        """(batch, n, D)"""
        raise NotImplementedError


class Side(SiteModule):
    """A network beside the backbone: runs once per image before it, and its results stand in `ctx.values`."""

    kind = "side"

    def __init__(self) -> None:
        super().__init__(None)

    def forward(self, ctx: Context) -> dict[str, Tensor]:
        """Named results; others find them as ctx.values["<adapter>.<name>"]."""
        raise NotImplementedError
