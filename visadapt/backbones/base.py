"""What every backbone offers, and what it gives for an image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core.context import Context
from ..core.sites import Site
from ..errors import InputError, hint
from ..registry import arguments_of

POOLS = ("native", "cls", "avg", "cls_avg")


@dataclass
class Features:
    """Output of a backbone.

    Attributes:
        tokens: (B, h*w, D) patch tokens after the final norm.
        grid: patch rows and columns (h, w).
        cls: (B, D) class token after the final norm, None where the network has none.
        native: (B, D) the network's own pooled vector.
        maps: (B, D, h, w) per asked level, shallow to deep.
    """

    tokens: Tensor
    grid: tuple[int, int]
    cls: Tensor | None
    native: Tensor
    maps: list[Tensor] = field(default_factory=list)

    def pooled(self, kind: str = "native") -> Tensor:
        """One vector per image: (B, D), or (B, 2D) for "cls_avg".

        Raises:
            InputError: unknown kind, or a class token is asked for where there is none.
        """
        if kind not in POOLS:
            raise InputError(f"unknown pool '{kind}'{hint(kind, POOLS)}")
        if kind == "native":
            return self.native
        if kind == "avg":
            return self.tokens.mean(1)
        if self.cls is None:
            raise InputError(
                f"pool '{kind}' needs a class token and this backbone has none; use pool='avg' or 'native'"
            )
        return self.cls if kind == "cls" else torch.cat([self.cls, self.tokens.mean(1)], 1)


class Backbone(nn.Module):
    """A third-party network, frozen and unedited, that says where its parts are.

    It has no `init_weights` on purpose: mmengine would call it and overwrite pretrained weights.

    Attributes:
        body: the network itself.
        capabilities: subset of tokens, windows, attention, prompts, maps, pairs, points, memory.
        embed_dims: width of each level.
        depth: number of blocks.
        patch: patch size in pixels.
        prefix: tokens before the patches.
        in_chans: bands of the input.
        mean: per band, on the 0..255 scale.
        std: per band, on the 0..255 scale.
        ctx: set by `Adapted`; `ctx.inserted` says how many prompt tokens to take out of the output.
    """

    capabilities: frozenset[str] = frozenset()
    layout: ClassVar[str] = "NLC"
    body: nn.Module
    embed_dims: list[int]
    depth: int
    patch: int
    prefix: int
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(self) -> None:
        super().__init__()
        self.ctx = Context()

    def sites(self) -> list[Site]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Features:
        raise NotImplementedError

    def attention(self, path: str):
        """View of one attention: .module, .project(x) -> q, k, v, bias and .output(o, x)."""
        raise InputError(f"{type(self).__name__} offers no attention views")

    def blocks(self) -> list[nn.Module]:
        """All blocks in the order in which they run, where each one but the first takes what the one before gives.

        Raises:
            InputError: the network is not made that way.
        """
        raise InputError(f"{type(self).__name__} has no single chain of blocks")

    def arguments(self) -> dict:
        """Constructor arguments that rebuild this backbone, as JSON values."""
        return arguments_of(self)

    def layer_id(self, name: str) -> int:
        """Depth of a parameter for layer-wise learning rates: 0 for the stem, i + 1 for block i, depth + 1 beyond."""
        raise NotImplementedError

    def pooled_dim(self, kind: str) -> int:
        return self.embed_dims[-1] * (2 if kind == "cls_avg" else 1)
