"""A small convolutional network beside the backbone that feeds its patch tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.context import Context
from ..core.kinds import Side, Tokens
from ..core.sites import Site
from ..registry import ADAPTERS


class ConvFeatures(Side):
    """Image (B, C, H, W) to "features" (B, width, h, w) on the patch grid, once per image.

    3 x 3 convolutions of stride 2, each with a norm and GELU, go down to the last power of two within the patch size;
    channels double from step to step up to `width`. For other patch sizes the map is then resampled.
    """

    def __init__(self, in_chans: int, width: int, patch: int) -> None:
        super().__init__()
        steps = max(patch.bit_length() - 1, 1)
        widths = [in_chans, *(max(width >> (steps - 1 - i), 1) for i in range(steps))]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.GroupNorm(1, b), nn.GELU())
                for a, b in pairwise(widths)
            )
        )

    def forward(self, ctx: Context) -> dict[str, Tensor]:
        x = self.stages(ctx.image)
        return {"features": F.interpolate(x, ctx.grid, mode="bilinear", align_corners=False)}


class AddFeatures(Tokens):
    """Patch tokens (B, h*w, D) before a block: x + up(features); class, register and prompt tokens stay."""

    position = "before"

    def __init__(self, site: Site, width: int) -> None:
        super().__init__(site)
        self.up = nn.Linear(width, site.dim_in)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        lead, patches = ctx.split(x)
        features = ctx.values[f"{self.owner}.features"].flatten(2).mT  # (B, h*w, width)
        return torch.cat([lead, patches + self.up(features)], 1)


@ADAPTERS.register_module()
class ConvBranch(Adapter):
    """A convolutional branch reads the image once and adds its features to the patch tokens before the blocks.

    For block i: x <- x + U_i features + u_i on the patches, U_i (D, width) and u_i zero at the start, so a fresh
    adapter is the identity; the branch itself is shared by all blocks. It gives a frozen transformer local detail and
    reads any number of bands. A design of this package, in the spirit of the spatial prior of ViT-Adapter and of
    side-tuning, and neither of them to the letter.

    Args:
        width: channels of the features.
        layers: indices of the blocks that are fed; all where None.
    """

    kinds = ("side", "tokens")
    targets = ("block",)
    roles = ("block",)
    needs = frozenset({"tokens"})
    paper = "own design; cf. ViT-Adapter (Chen et al., 2022), arXiv 2205.08534; side-tuning, arXiv 1912.13503"

    def __init__(self, width: int = 64, layers: Sequence[int] | None = None) -> None:
        super().__init__(layers=layers)
        self.require_positive(width=width)
        self.width = width

    def shared(self, sites: list[Site], backbone) -> nn.ModuleDict:
        return nn.ModuleDict({"branch": ConvFeatures(backbone.in_chans, self.width, backbone.patch)})

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> AddFeatures:
        return AddFeatures(site, self.width)
