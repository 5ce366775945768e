"""Attach pieces to a third-party network without changing its module tree, its keys or its class.

Hooks and forward objects are instances of plain classes, never closures: they survive deepcopy (a copy gets its own
pieces), pickle, `torch.compile(fullgraph=True)` and `torch.export`; taking them off restores the network bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from .context import Context
from .kinds import AttnCore, Delta, Prompt, SiteModule, Tokens, WeightMap
from .lowrank import LowRankLinear, merged_weight, worth_factoring
from .products import affine, bare, linear
from .routing import routed_forward
from .sparse import Entries, SparseLinear, with_entries

if TYPE_CHECKING:
    from ..backbones.base import Backbone


ADAPTABLE = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)
"""Modules whose weight can be adapted; a batch norm as it is in eval mode."""


class StandIn:
    """A module with another weight and bias, to be handed to the `forward` of the module's class."""

    def __init__(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
        self.module, self.weight, self.bias = module, weight, bias

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def run_with(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The module's own computation with another weight and bias: its stride, padding, groups, layout, statistics."""
    if bias is not None:
        bias = bias.to(weight.dtype)  # an offset in float32 on a base in half precision
    if isinstance(module, nn.Linear):
        return linear(x, weight, bias)
    return type(module).forward(StandIn(module, weight, bias), x)


def effective(weight: Tensor, bias: Tensor | None, pieces: list[SiteModule]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a module with pieces applied in order: the one definition that forward and merge share."""
    for piece in pieces:
        start, stop = piece.site.rows or (0, weight.shape[0])
        w, b = weight[start:stop], None if bias is None else bias[start:stop]
        if isinstance(piece, Delta):
            new_w, new_b = w + piece.scale * piece.delta().view(w.shape), b
        else:
            new_w, new_b = piece.map(w, b)
            if piece.scale != 1:
                new_w = torch.lerp(w, new_w, piece.scale)
                if new_b is not None:
                    new_b = torch.lerp(torch.zeros_like(new_b) if b is None else b, new_b, piece.scale)
        if (start, stop) == (0, weight.shape[0]):
            weight, bias = new_w, new_b
            continue
        weight = torch.cat([weight[:start], new_w, weight[stop:]])
        if new_b is not None:
            whole = weight.new_zeros(weight.shape[0]) if bias is None else bias
            bias = torch.cat([whole[:start], new_b, whole[stop:]])
    return weight, bias


def add_rows(y: Tensor, change: Tensor, rows: tuple[int, int] | None, channels: int = -1) -> Tensor:
    """y with `change` added to a slice of the dimension `channels`."""
    if rows is None:
        return y + change
    behind = (y.ndim - 1 - channels) % y.ndim
    return y + F.pad(change, (*[0, 0] * behind, rows[0], y.shape[channels] - rows[1]))


def take_rows(y: Tensor, rows: tuple[int, int] | None, channels: int) -> Tensor:
    """A slice of the dimension `channels` of y."""
    return y if rows is None else y.narrow(channels, rows[0], rows[1] - rows[0])


class WeightForward:
    """`module.forward` of a linear, convolution or norm that has Deltas or WeightMaps. One per module."""

    def __init__(self, module: nn.Module, ctx: Context) -> None:
        self.module, self.ctx = module, ctx
        self.pieces: list[SiteModule] = []

    def ordered(self) -> list[SiteModule]:
        """Active pieces: weight maps in the order of `add`, then deltas."""
        active = [p for p in self.pieces if p.on]
        return [p for p in active if isinstance(p, WeightMap)] + [p for p in active if isinstance(p, Delta)]

    def __call__(self, x: Tensor) -> Tensor:
        if self.ctx.ids is not None:
            return routed_forward(self, x, self.ctx.ids)
        pieces = self.ordered()
        return self.apply(x, pieces) if pieces else self.base(x)

    def base(self, x: Tensor) -> Tensor:
        """What the module gives without adapters, bit by bit."""
        return type(self.module).forward(self.module, x)

    def apply(self, x: Tensor, pieces: list[SiteModule]) -> Tensor:
        """Output with exactly these pieces; of a linear without any, the base's but for rounding."""
        last = next((i for i in reversed(range(len(pieces))) if pieces[i].by_forward()), None)
        if last is None:
            return self._by_weight(x, pieces)
        piece = pieces[last]
        if isinstance(piece, Delta):  # deltas add up in any order
            y, site = self.apply(x, pieces[:last] + pieces[last + 1 :]), piece.site
            return add_rows(y, piece.scale * piece(x), site.rows, site.channels)
        last = max(i for i, p in enumerate(pieces) if isinstance(p, WeightMap))
        piece, rest = pieces[last], pieces[:last]
        if rest and type(piece).forward is WeightMap.forward:
            if random := next((p.owner for p in rest if p.by_forward() and p.random), None):
                raise InputError(
                    f"adapter '{random}' is random in training (dropout) and '{piece.owner}' works on its weight at "
                    f"{piece.site.key}; set its dropout to 0, or add '{piece.owner}' first"
                )
            return self._by_weight(x, pieces)
        rows, channels = piece.site.rows, piece.site.channels
        y = self.apply(x, rest) if rows or piece.scale != 1 else None
        mapped = piece(x, RowsOf(self, rest, rows, channels, x, y))
        if y is not None:
            mapped = add_rows(y, piece.scale * (mapped - take_rows(y, rows, channels)), rows, channels)
        if deltas := pieces[last + 1 :]:
            change, _ = effective(torch.zeros_like(self.module.weight), None, deltas)
            mapped = mapped + run_with(self.module, x, change, None)
        return mapped

    def _by_weight(self, x: Tensor, pieces: list[SiteModule]) -> Tensor:
        module = self.module
        if not pieces:
            return run_with(module, x, module.weight, module.bias)
        deltas = [p for p in pieces if isinstance(p, Delta)]
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        frozen = not module.weight.requires_grad and (module.bias is None or not module.bias.requires_grad)
        if isinstance(module, nn.Linear) and frozen and len(deltas) == len(pieces):
            sparse = [p.entries() for p in deltas]
            if all(e is not None for e in sparse) and not traced:
                return self._sparse(x, deltas, sparse)
            low_rank = [p.factors() for p in deltas]
            if all(f is not None for f in low_rank) and worth_factoring(module.weight, low_rank):
                return self._low_rank(x, deltas, low_rank)
        if any(p.recompute for p in pieces) and torch.is_grad_enabled() and not traced:
            return checkpoint(self._effective, x, pieces, use_reentrant=False, preserve_rng_state=False)
        return self._effective(x, pieces)

    def _effective(self, x: Tensor, pieces: list[SiteModule]) -> Tensor:
        return run_with(self.module, x, *effective(self.module.weight, self.module.bias, pieces))

    def _sparse(self, x: Tensor, pieces: list[Delta], sparse: list[Entries]) -> Tensor:
        x, weight, bias, *values = in_autocast(x, self.module.weight, self.module.bias, *(e.values for e in sparse))
        rows, scales = tuple(p.site.rows or (0, weight.shape[0]) for p in pieces), tuple(p.scale for p in pieces)
        with torch.autocast(x.device.type, enabled=False):
            if not torch.is_grad_enabled():
                return affine(x, with_entries(weight, rows, scales, [e.index for e in sparse], values), bias)
            return SparseLinear.apply(x, weight, bias, rows, scales, sparse, *values)

    def _low_rank(self, x: Tensor, pieces: list[Delta], low_rank: list[tuple[Tensor, Tensor, float]]) -> Tensor:
        module = self.module
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            y = F.linear(x, module.weight, module.bias)
            for piece in pieces:
                y = add_rows(y, piece.scale * piece(x), piece.site.rows)
            return y
        factors = (t for a, b, _ in low_rank for t in (a, b))
        x, weight, bias, *factors = in_autocast(x, module.weight, module.bias, *factors)
        rows = tuple(p.site.rows or (0, weight.shape[0]) for p in pieces)
        scales = tuple(p.scale * s for p, (_, _, s) in zip(pieces, low_rank))
        with torch.autocast(x.device.type, enabled=False):
            if not torch.is_grad_enabled():
                return affine(x, merged_weight(weight, rows, scales, *factors), bias)
            return LowRankLinear.apply(x, weight, bias, rows, scales, *factors)


def in_autocast(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """The tensors in the dtype that products have at the moment."""
    if not torch.is_autocast_enabled(x.device.type):
        return [x, *others]
    dtype = torch.get_autocast_dtype(x.device.type)
    return [t if t is None else t.to(dtype) for t in (x, *others)]


class RowsOf:
    """The computation before a weight map, cut to the map's rows; what it gives for `known` is `known_y` already."""

    def __init__(
        self,
        forward: WeightForward,
        pieces: list[SiteModule],
        rows: tuple[int, int] | None,
        channels: int,
        known: Tensor,
        known_y: Tensor | None,
    ) -> None:
        self.forward, self.pieces, self.rows, self.channels = forward, pieces, rows, channels
        self.known, self.known_y = known, known_y

    def __call__(self, x: Tensor) -> Tensor:
        same = x is self.known and self.known_y is not None
        return take_rows(self.known_y if same else self.forward.apply(x, self.pieces), self.rows, self.channels)


class Keep:
    """Pre-hook on a site's `source`: keeps its input for the piece further down."""

    def __init__(self, piece: Tokens, ctx: Context) -> None:
        self.piece, self.ctx = piece, ctx

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if self.piece.on:
            self.ctx.values[f"{self.piece.owner}/{self.piece.site.key}"] = args[0]


class TokensAfter:
    """Forward hook: the piece sees input and output of the sub-layer and returns the new output."""

    def __init__(self, piece: Tokens, ctx: Context) -> None:
        self.piece, self.ctx = piece, ctx

    def __call__(self, module: nn.Module, args: tuple, y: Tensor) -> Tensor:
        piece = self.piece
        if not piece.on:
            return y
        x = args[0] if piece.site.source is None else self.ctx.values.pop(f"{piece.owner}/{piece.site.key}")
        new = piece(x, y, self.ctx)
        return new if piece.scale == 1 else torch.lerp(y, new, piece.scale)


class TokensBefore:
    """Pre-hook: the piece returns the new input of the sub-layer."""

    def __init__(self, piece: Tokens, ctx: Context) -> None:
        self.piece, self.ctx = piece, ctx

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        if not self.piece.on:
            return None
        x = args[0]
        new = self.piece(x, x, self.ctx)
        return (new if self.piece.scale == 1 else torch.lerp(x, new, self.piece.scale), *args[1:])


class Output:
    """The output projection of an attention, as an attention core is given it.

    Args:
        view: of the attention.
        x: the attention's input.
    """

    def __init__(self, view: Any, x: Tensor) -> None:
        self.view, self.x = view, x

    def __call__(self, o: Tensor) -> Tensor:
        """(B, heads, N, head_dim) to (B, N, D)."""
        return self.view.output(o, self.x)

    def then(self, layer: nn.Linear, o: Tensor) -> Tensor:
        """layer(self(o)), (B, N, K), in the dtype of `layer` also under autocast.

        It is one product with that of both weights where this is less work and nothing lies between them.
        """
        inner, dtype = self.view.linear(), layer.weight.dtype
        few = not torch.compiler.is_compiling() and o.shape[0] * o.shape[2] <= layer.out_features
        if few or not bare(inner):
            y, weight, bias = self(o), layer.weight, layer.bias
        else:
            y, weight, bias = o.transpose(1, 2).flatten(2), inner.weight.to(dtype), inner.bias
            with torch.autocast(o.device.type, enabled=False):
                bias = layer.bias if bias is None else F.linear(bias.to(dtype), layer.weight, layer.bias)
                weight = layer.weight @ weight
        with torch.autocast(o.device.type, enabled=False):
            return linear(y.to(dtype), weight, bias)


class AttnForward:
    """`attention.forward` with another core between projections and output."""

    def __init__(self, piece: AttnCore, view: Any, ctx: Context) -> None:
        self.piece, self.view, self.ctx = piece, view, ctx

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module = self.view.module
        if not self.piece.on:
            return type(module).forward(module, x, *args, **kwargs)
        q, k, v, bias = self.view.project(x, *args, **kwargs)
        return self.piece.run(q, k, v, bias, Output(self.view, x), self.ctx)


def prompt_key(piece: Prompt) -> str:
    return f"{piece.owner}/{piece.site.key}"


class PromptIn:
    """Pre-hook of a block: inserts deep tokens behind the prefix, shallow ones before the patches."""

    def __init__(self, piece: Prompt, ctx: Context) -> None:
        self.piece, self.ctx = piece, ctx

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        if not self.piece.on:
            return None
        x, ctx = args[0], self.ctx
        tokens = self.piece(x.shape[0]).to(x.dtype)
        ctx.prompts[prompt_key(self.piece)] = tokens.shape[1]
        n = ctx.prefix if self.piece.deep else x.shape[1] - ctx.grid[0] * ctx.grid[1]
        return (torch.cat([x[:, :n], tokens, x[:, n:]], 1), *args[1:])


class PromptOut:
    """Forward hook of a block: takes deep prompts out again."""

    def __init__(self, piece: Prompt, ctx: Context) -> None:
        self.piece, self.ctx = piece, ctx

    def __call__(self, module: nn.Module, args: tuple, y: Tensor) -> Tensor:
        if not self.piece.on or not self.piece.deep:
            return y
        n = self.ctx.prefix
        count = self.ctx.prompts.pop(prompt_key(self.piece))
        return torch.cat([y[:, :n], y[:, n + count :]], 1)


def _weight_forward(module: nn.Module, path: str, ctx: Context) -> WeightForward:
    """The module's forward object, made when first asked for."""
    found = module.__dict__.get("forward")
    if isinstance(found, WeightForward):
        return found
    if not isinstance(module, ADAPTABLE):
        raise InputError(
            f"{path} is a {type(module).__name__}; weights of linears, convolutions and norms can be adapted"
        )
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise InputError(f"{path} is read by an nn.MultiheadAttention and never run; what sits there would do nothing")
    module.forward = WeightForward(module, ctx)
    return module.forward


def attach(piece: SiteModule, backbone: Backbone, ctx: Context) -> None:
    """Put one piece at its site.

    Raises:
        InputError: the site's module cannot carry this kind, or has an attention core already.
    """
    site = piece.site
    module = backbone.body.get_submodule(site.path)
    if isinstance(piece, Delta | WeightMap):
        _weight_forward(module, site.path, ctx).pieces.append(piece)
    elif isinstance(piece, Tokens):
        if piece.position == "before":
            module.register_forward_pre_hook(TokensBefore(piece, ctx))
            return
        if site.source is not None:
            backbone.body.get_submodule(site.source).register_forward_pre_hook(Keep(piece, ctx))
        module.register_forward_hook(TokensAfter(piece, ctx))
    elif isinstance(piece, AttnCore):
        if isinstance(module.__dict__.get("forward"), AttnForward):
            other = module.forward.piece.owner
            raise InputError(
                f"{site.path} has the attention core of adapter '{other}'; one per attention, remove it first"
            )
        module.forward = AttnForward(piece, backbone.attention(site.path), ctx)
    elif isinstance(piece, Prompt):
        module.register_forward_pre_hook(PromptIn(piece, ctx))
        module.register_forward_hook(PromptOut(piece, ctx))


def detach(piece: SiteModule, backbone: Backbone) -> None:
    """Take a piece off; the module is as it was before `attach`."""
    site = piece.site
    for path in filter(None, (site.path, site.source)):
        module = backbone.body.get_submodule(path)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [k for k, h in hooks.items() if getattr(h, "piece", None) is piece]:
                del hooks[key]
        drop_forward(module, piece)


def drop_forward(module: nn.Module, piece: SiteModule) -> None:
    """Take a piece out of the module's forward object, and the object away when it is empty."""
    forward: Callable | None = module.__dict__.get("forward")
    if isinstance(forward, WeightForward):
        forward.pieces = [p for p in forward.pieces if p is not piece]
        if not forward.pieces:
            del module.forward
    elif isinstance(forward, AttnForward) and forward.piece is piece:
        del module.forward
