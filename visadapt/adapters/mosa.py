"""MoSA: a bottleneck split into sparse experts; training runs drawn ones, evaluation their merge."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.context import Context
from ..core.kinds import Tokens
from ..core.progress import Progress
from ..core.sites import Site
from ..errors import InputError, hint
from ..registry import ADAPTERS

STYLES = {
    "adaptformer": (("mlp_res",), nn.GELU, True, 0.1, 0.1),
    "pfeiffer": (("mlp_res",), nn.ReLU, True, 1.0, 0.0),
    "houlsby": (("attn_res", "mlp_res"), nn.SiLU, False, 1.0, 0.0),
}
"""Targets, activation, whether a norm stands in front, strength and dropout of each style."""


def owners(scores: Tensor, experts: int) -> Tensor:
    """The expert that trains each entry, int64 in the shape of `scores`.

    The entry with the j-th smallest of n scores, j from 0, is that of expert e with
    floor(e n / E) <= j < floor((e + 1) n / E).
    """
    rank = scores.flatten().argsort(stable=True).argsort().view(scores.shape)
    return ((rank + 1) * experts - 1) // scores.numel()


class Experts(nn.Module):
    """E linears of one shape. In training every view of the images has a drawn one, otherwise all have the merge.

    Attributes:
        weight: (E, out, in).
        bias: (E, out).
        weight_owner: (out, in), the expert that trains an entry.
        bias_owner: (out,), likewise where biases are split; otherwise every expert trains all of its own.
        drawn: (2,), the expert of each view.
    """

    def __init__(self, dim_in: int, dim_out: int, count: int, seed: int, settings: MoSA) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, dim_out, dim_in))
        self.bias = nn.Parameter(torch.zeros(count, dim_out))
        self.register_buffer("drawn", torch.zeros(2, dtype=torch.long))
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("weight_owner", (dim_out, dim_in)), ("bias_owner", (dim_out,))):
            owner = owners(torch.rand(shape, generator=generator), count)
            self.register_buffer(name, owner, persistent=False)
        self.split_bias, self.joint = settings.split_bias, settings.merge == "joint"
        self.official = self.joint and settings.variant == "official"

    def forward(self, x: Tensor, views: int, batch_dim: int) -> Tensor:
        """(..., in) to (..., out)."""
        if not self.training or len(self.weight) == 1:
            return F.linear(x, *self.merged())
        chosen = self.drawn[:views]
        parts = zip(x.chunk(views, batch_dim), self.weight[chosen], self.bias[chosen], strict=True)
        return torch.cat([F.linear(*part) for part in parts], batch_dim)

    def masks(self) -> tuple[Tensor, Tensor]:
        """(E, out, in) and (E, out): True where an expert trains an entry."""
        expert = torch.arange(len(self.weight), device=self.weight.device)[:, None]
        return self.weight_owner == expert[..., None], (self.bias_owner == expert) | (not self.split_bias)

    def mask_gradients(self) -> None:
        for value, mask in zip((self.weight, self.bias), self.masks()):
            if value.grad is not None:
                value.grad.mul_(mask)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Weight (out, in) and bias (out,) that stand for all experts; experts that are equal give their own bits."""
        if len(self.weight) == 1:
            return self.weight[0], self.bias[0]
        if not self.joint:
            return _mean(self.weight), _mean(self.bias)
        weight = self.weight.gather(0, self.weight_owner[None])[0]
        if self.split_bias:
            bias = self.bias.gather(0, self.bias_owner[None])[0]
        else:
            bias = self.bias[-1] if self.official else _mean(self.bias)
        return (weight / len(self.weight), bias / len(self.weight)) if self.official else (weight, bias)

    @torch.no_grad()
    def fill(self, weight: Tensor, bias: Tensor) -> None:
        """Make all experts equal, with this weight and bias as their merge."""
        factor = len(self.weight) if self.official else 1
        self.weight.copy_(factor * weight)
        self.bias.copy_(factor * bias)


def _mean(values: Tensor) -> Tensor:
    """Mean over the first dimension, which of equal values is exact."""
    return values[0] + (values - values[0]).mean(0)


class SplitBottleneck(Tokens):
    """y' = y + s up(dropout(act(down(norm(t))))), y (..., D) being a residual branch and x the stream before it.

    t is x for "adaptformer", y for "pfeiffer", x + y for "houlsby".
    """

    position = "parallel"

    def __init__(self, site: Site, settings: MoSA) -> None:
        super().__init__(site)
        _, act, normed, strength, dropout = STYLES[settings.style]
        self.style, self.strength = settings.style, strength if settings.scale is None else settings.scale
        self.norm = nn.LayerNorm(site.dim_in, eps=1e-6) if normed else nn.Identity()
        self.act, self.dropout = act(), nn.Dropout(dropout if settings.dropout is None else settings.dropout)
        for name, dims in (("down", (site.dim_in, settings.width)), ("up", (settings.width, site.dim_out))):
            count = 1 if settings.share == name else settings.experts
            seed = settings.seed + zlib.crc32(f"{site.key}/{name}".encode())
            setattr(self, name, Experts(*dims, count, seed, settings))
        one = nn.init.kaiming_uniform_(torch.empty(settings.width, site.dim_in), a=math.sqrt(5))
        self.down.weight.data.copy_(one)

    def forward(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        seen = x + y if self.style == "houlsby" else x if self.style == "adaptformer" else y
        views, batch_dim = ctx.views, self.site.batch_dim
        hidden = self.dropout(self.act(self.down(self.norm(seen), views, batch_dim)))
        return y + self.strength * self.up(hidden, views, batch_dim)

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """The merge in place of the experts."""
        found = super().stored()
        for name, part in (("down", self.down), ("up", self.up)):
            del found[f"{name}.drawn"]
            found |= {f"{name}.{leaf}": v.detach() for leaf, v in zip(("weight", "bias"), part.merged())}
        return found

    def restore(self, stored: dict[str, Tensor]) -> None:
        rest = dict(stored)
        for name, part in (("down", self.down), ("up", self.up)):
            part.fill(rest.pop(f"{name}.weight"), rest.pop(f"{name}.bias"))
        super().restore(rest)


@ADAPTERS.register_module()
class MoSA(Adapter):
    """A bottleneck whose projections are split into E experts that train disjoint entries; merged, a plain adapter.

    With h the residual stream behind the attention and F the MLP's branch, s = 0.1 and t = LN(.) of its own:
    "adaptformer" h + F + s up(dropout(GELU(down(LN(h))))), "pfeiffer" h + F + up(ReLU(down(LN(F)))), and "houlsby"
    z + up(SiLU(down(z))) with z = h + F, likewise behind the attention. All sit behind LayerScale and DropPath, which
    the paper's network does not have: that place is ours.

    Every projection but the shared one has E weights (out, in), equal at the start, and a random partition of the
    entries. Each training step draws one expert per projection and view of the images; a draw is the same on all
    processes. Forward uses all entries of the drawn expert. Between the backward pass and the update gradients are
    multiplied by the masks of the partition, so that an expert learns its own entries only. Evaluation and files have
    the merge: "add" is the mean of all experts, "joint" takes every entry from the expert that trains it.

    Training passes every batch twice, each pass with draws of its own, and draws the two predictions together:
    `loss=dict(type="Consistency")` of the task. With another loss there is one pass.

    Where the paper is silent: entries that an expert does not train, and those of experts that were not drawn, have a
    zero gradient; weight decay acts on all of them, as in the official code, and momentum goes on. Clipping by norm
    sees gradients before the masks. An adapter file holds the merge alone, as large as a plain adapter's; training that
    starts from it starts with all experts equal to the merge. Checkpoints of a run hold all experts.

    Left out of the official code: a learned strength, the loss on block outputs, partitions by rows or columns.

    Trained values per site: 2 D of the norm, which "houlsby" has not, r D + r of `down` and r D + D of `up`, E times
    where a projection is split.

    Args:
        width: inner width r.
        experts: E.
        style: "adaptformer", "pfeiffer" or "houlsby".
        share: "down" or "up", the projection with one expert; None where both are split.
        merge: "add" or "joint".
        scale: strength s; that of the style where None.
        dropout: between the two projections, in training; that of the style where None.
        split_bias: biases are divided among the experts as well; every expert trains all of its own where False, and
            "joint" takes their mean.
        seed: of the partition. Each projection draws with this number and its own name.
        variant: "paper", or "official", which repeats two errors of the official code's "joint": it is divided by E,
            and biases that all experts train are those of the last one.
        targets: roles of residual branches; those of the style where None.
        layers: block indices.
    """

    kinds = ("tokens",)
    targets = ("mlp_res",)
    roles = ("attn_res", "mlp_res")
    needs = frozenset({"tokens"})
    paper = "Split & Merge: Unlocking the Potential of Visual Adapters via Sparse Training, arXiv 2312.02923"

    def __init__(
        self,
        width: int = 64,
        experts: int = 4,
        style: str = "adaptformer",
        share: str | None = "down",
        merge: str = "add",
        scale: float | None = None,
        dropout: float | None = None,
        split_bias: bool = False,
        seed: int = 0,
        variant: str = "paper",
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        known = {"style": (style, STYLES), "share": (share, (None, "down", "up")), "merge": (merge, ("add", "joint"))}
        for name, (value, allowed) in (known | {"variant": (variant, ("paper", "official"))}).items():
            if value not in allowed:
                raise InputError(f"MoSA: unknown {name} '{value}'{hint(value, filter(None, allowed))}")
        super().__init__(STYLES[style][0] if targets is None else targets, layers)
        self.require_positive(width=width, experts=experts)
        self.require_rate(dropout=dropout or 0.0)
        self.require_strength(scale=scale)
        self.width, self.experts, self.style, self.share, self.merge = width, experts, style, share, merge
        self.scale, self.dropout, self.split_bias, self.seed, self.variant = scale, dropout, split_bias, seed, variant

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> SplitBottleneck:
        return SplitBottleneck(site, self)

    def _parts(self) -> list[Experts]:
        return [part for piece in self.pieces.values() for part in (piece.down, piece.up)]

    def on_step(self, progress: Progress) -> None:
        for part in self._parts():
            part.drawn.copy_(torch.randint(len(part.weight), (2,), generator=progress.generator))

    def on_gradients(self, progress: Progress) -> None:
        for part in self._parts():
            part.mask_gradients()

    def finalize(self) -> None:
        """Let all experts be the merge, so that every mode gives what evaluation and files do."""
        for piece in self.pieces.values():
            piece.restore(piece.stored())
