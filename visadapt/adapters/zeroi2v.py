"""Video recognition with an image model at no cost: shifted attention, and linear adapters that merge away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..core.adapter import Adapter
from ..core.context import Context
from ..core.inject import in_autocast
from ..core.kinds import SiteModule, Tokens, WeightMap
from ..core.products import affine, as_matrix
from ..core.sites import Site
from ..errors import InputError, hint
from ..registry import ADAPTERS
from ._common.shifted_attention import ShiftedAttention, checked_offsets

OFFSETS: dict[str, tuple[tuple[int, int], ...]] = {
    "base": ((1, 1), (-1, 1)),
    "base-long": ((1, 1), (-1, 1), (2, 1), (-2, 1)),
    "large": ((1, 2), (-1, 2)),
    "large-long": ((1, 2), (-1, 2), (2, 2)),
    "large-ssv2": ((1, 2), (-1, 2), (2, 1), (-2, 1), (3, 1)),
}
"""The published tables. For the 12 heads of a ViT-B: "base" (Kinetics with 8 and 16 frames; UCF101, HMDB51 with 8) and
"base-long" (Something-Something with 16; UCF101, HMDB51 with 32). For the 16 of a ViT-L: "large" (Kinetics with 8),
"large-long" (Kinetics with 32) and "large-ssv2" (Something-Something with 32)."""

PLACES = {
    **dict.fromkeys(("qkv", "q", "k", "v"), "attn_in"),
    **{"proj": "attn_out", "fc1": "mlp_in", "gate": "mlp_in", "fc2": "mlp_out"},
}
"""The linear adapter of a block that a role has; linears which read the same tokens share theirs."""


def _kept(x: Tensor, width: int, dropout: float) -> Tensor:
    """What dropout leaves of `width` values per token of x (..., D), as (..., width) ones and zeros.

    CPUs draw 64 bits in the time of one number. Those are enough for eight values at a rate in steps of 1/256: a call
    takes one of the two steps around `dropout`, so often that every value is dropped at that rate. Products with
    booleans would be four times slower there.
    """
    shape = (*x.shape[:-1], width)
    if x.device.type != "cpu" or torch.compiler.is_compiling() or dropout > 255 / 256:
        return (torch.rand(shape, device=x.device) >= dropout).to(x.dtype)
    count, dropped = x.shape[:-1].numel() * width, int(256 * dropout + torch.rand((), device=x.device).item())
    words = torch.empty(-(-count // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None).view(torch.uint8)
    return torch.ge(words[:count].view(shape), dropped, out=torch.empty(shape, dtype=x.dtype, device=x.device))


class AddLinears(torch.autograd.Function):
    """x + c W2 (m (W1 x + b1)) + s b2, at fewer passes over what has the size of x than autograd takes.

    Args:
        x: (..., D).
        w1: (r, D).
        b1: (r,).
        w2: (D, r).
        b2: (D,).
        kept: m (..., r), ones and zeros; only ones where None.
        factor: c.
        scaling: s.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        kept: Tensor | None,
        factor: float,
        scaling: float,
    ) -> Tensor:
        z = affine(x, w1, b1, times=kept)
        _, for_w1, _, for_w2, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_w1 else None, z if for_w2 else None, w1, w2, kept)
        ctx.factor, ctx.scaling = factor, scaling
        return affine(z, w2 * factor, b2 * scaling, plus=x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, z, w1, w2, kept = ctx.saved_tensors
        g = as_matrix(grad)
        with torch.autocast(grad.device.type, enabled=False):
            by_z = affine(g, (w2 * ctx.factor).T, times=kept)
            by_x = affine(by_z, w1.T, plus=g).view(grad.shape) if ctx.needs_input_grad[0] else None
            by_w1 = None if x is None else affine(by_z.T, as_matrix(x).T)
            by_w2 = None if z is None else affine(as_matrix(z).T, g.T).T.mul_(ctx.factor)
        return by_x, by_w1, by_z.sum(0), by_w2, g.sum(0).mul_(ctx.scaling), None, None, None


class LinearAdapter(nn.Module):
    """u to u + s (W2 dropout(W1 u + b1) + b2); W1 (r, D) from a truncated normal of deviation 0.02, the rest zero."""

    def __init__(self, dim: int, width: int, scaling: float, dropout: float) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.scaling, self.dropout = scaling, dropout

    @property
    def random(self) -> bool:
        return self.training and self.dropout > 0

    def forward(self, x: Tensor) -> Tensor:
        x, *weights = in_autocast(x, self.down.weight, self.down.bias, self.up.weight, self.up.bias)
        kept, share = (_kept(x, self.up.in_features, self.dropout), 1 - self.dropout) if self.random else (None, 1)
        return AddLinears.apply(x, *weights, kept, self.scaling / share, self.scaling)

    def constant(self) -> Tensor:
        """What it makes of zero, (D,)."""
        return self.scaling * (self.up.weight @ self.down.bias + self.up.bias)


class LinearPiece(WeightMap):
    """A linear adapter beside the weight of a linear; it belongs to the adapter's shared modules."""

    def __init__(self, site: Site, adapter: LinearAdapter) -> None:
        super().__init__(site)
        self._adapter = (adapter,)  # in a tuple, because it is stored once and other sites may have the same one

    @property
    def adapter(self) -> LinearAdapter:
        return self._adapter[0]

    @property
    def random(self) -> bool:
        return self.adapter.random

    def by_forward(self) -> bool:
        # Through the new weight, the gradients would go through one of the size of the weight.
        return self.random or (torch.is_grad_enabled() and self.adapter.down.weight.requires_grad)


class LinearBefore(LinearPiece):
    """y = W a(x) + b: W' = W + s (W W2) W1, b' = b + W a(0)."""

    def map(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
        a = self.adapter
        constant = w @ a.constant()
        return w + a.scaling * (w @ a.up.weight) @ a.down.weight, constant if b is None else b + constant

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        return base(self.adapter(x))


class LinearAfter(LinearPiece):
    """y = a(W x + b): W' = W + s W2 (W1 W), b' = b + s W2 (W1 b) + a(0)."""

    def map(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
        a = self.adapter
        new_w = w + a.scaling * a.up.weight @ (a.down.weight @ w)
        if b is None:
            return new_w, a.constant()
        return new_w, b + a.scaling * (a.up.weight @ (a.down.weight @ b)) + a.constant()

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        return self.adapter(base(x))


class TemporalEmbedding(Tokens):
    """x + e_t for all tokens of frame t, class token and registers too; e (T, D) is zero at the start."""

    position = "before"

    def __init__(self, site: Site, frames: int) -> None:
        super().__init__(site)
        self.embedding = nn.Parameter(torch.zeros(frames, site.dim_in))

    def forward(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        added = self.embedding
        if ctx.num_frames != len(added):
            added = F.interpolate(added.T[None], ctx.num_frames, mode="linear", align_corners=False)[0].T
        clips = x.unflatten(0, (ctx.clips("ZeroI2V"), -1))
        return (clips + added[:, None]).flatten(0, 1)


@ADAPTERS.register_module()
class ZeroI2V(Adapter):
    """An image transformer for clips: some heads look into other frames, linears adapt, and all of it merges away.

    Images of a batch are frame-major, index b * T + t with T = `ctx.num_frames`. In a block

        x = x + a2(Attn(a1(norm1(x)))),   x = x + a4(fc2(act(fc1(a3(norm2(x)))))),
        a(u) = u + s (W2 dropout(W1 u + b1) + b2)

    with W1 (r, D), W2 (D, r); a1 is one for q, k and v. For a head with offset d, frame t attends to K and V of frame
    t - d, queries staying its own; a frame without a source keeps its own K and V, as single images do. Every frame has
    an embedding that is added to all its tokens after the position embedding, zero at the start.

    The linear adapters fold exactly: W' = W (I + s W2 W1) before a linear and (I + s W2 W1) W behind one. Offsets and
    frame embeddings stay, at next to no cost. In a ViT-B with 8 frames there are 14,201,856 + 6,144 values.

    The published recipe trains the norm behind the last block as well: add `LayerNormTuning(targets=["norm"])`. Clips
    of another length than `num_frames` get embeddings that are resampled linearly, a choice of ours.

    Args:
        num_frames: T of the frame embeddings.
        offsets: pairs (offset d, number of heads), laid out from the first head on; the other heads stay spatial. Or
            the name of a published table, see `OFFSETS`.
        ratio: r / D. None for no linear adapters, as is left after a merge.
        scaling: s; 0.5 for Kinetics, UCF101 and HMDB51, 1 for Something-Something in the published recipes.
        dropout: between W1 and W2 in training; 0.1, and 0 for a ViT-B on Something-Something there.
        targets: roles. Backbones with split projections or gates have more of them: q, k, v in place of qkv, and gate.
        layers: block indices; None for all blocks and the frame embeddings, which are left out otherwise.
    """

    kinds = ("attention", "tokens", "weight")
    targets = ("attn", "qkv", "proj", "fc1", "fc2", "stem")
    roles = ("attn", "stem", *PLACES)
    needs = frozenset({"attention", "tokens"})
    paper = "ZeroI2V: Zero-Cost Adaptation of Pre-trained Transformers from Image to Video, arXiv 2310.01324"
    identity_at_init = False

    def __init__(
        self,
        num_frames: int = 8,
        offsets: str | Sequence[Sequence[int]] = "base",
        ratio: float | None = 0.25,
        scaling: float = 0.5,
        dropout: float = 0.1,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(num_frames=num_frames)
        self.require_strength(ratio=ratio, scaling=scaling)
        self.require_rate(dropout=dropout)
        if isinstance(offsets, str) and offsets not in OFFSETS:
            raise InputError(f"ZeroI2V: no table of offsets '{offsets}'{hint(offsets, OFFSETS)}")
        self.offsets = checked_offsets("ZeroI2V", OFFSETS[offsets] if isinstance(offsets, str) else offsets)
        self.num_frames, self.ratio, self.scaling, self.dropout = num_frames, ratio, scaling, dropout
        there = {"attention": bool(self.offsets), "tokens": layers is None, "weight": ratio is not None}
        self.kinds = tuple(kind for kind in type(self).kinds if there[kind])

    def shared(self, sites: list[Site], backbone) -> nn.ModuleDict:
        chosen = {site.role for site in sites}
        if "fc1" in chosen and "gate" not in chosen and any(site.role == "gate" for site in backbone.sites()):
            raise InputError(
                "ZeroI2V: fc1 and gate read the same tokens in this backbone; name both, e.g. targets="
                f"{[*self.targets, 'gate']}"
            )
        found: dict[str, Any] = {}
        for site in sites if self.ratio is not None else ():
            place = PLACES.get(site.role)
            if place is not None and (name := f"{site.layer:02d}_{place}") not in found:
                width = site.dim_in if place.endswith("_in") else site.dim_out
                found[name] = LinearAdapter(width, max(1, int(width * self.ratio)), self.scaling, self.dropout)
        return nn.ModuleDict(found)

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> SiteModule | None:
        if site.role == "attn":
            heads = backbone.attention(site.path).module.num_heads
            return ShiftedAttention(site, self.offsets, heads, "ZeroI2V") if self.offsets else None
        if site.role == "stem":
            return TemporalEmbedding(site, self.num_frames)
        if self.ratio is None:
            return None
        place = PLACES[site.role]
        kind = LinearBefore if place.endswith("_in") else LinearAfter
        return kind(site, shared[f"{site.layer:02d}_{place}"])

    def rest(self) -> ZeroI2V:
        return ZeroI2V(**self.arguments() | {"ratio": None})
