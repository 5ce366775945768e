"""DSCF: a small super-resolution network of convolutions with parameter-free attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.sites import Site
from ..errors import InputError
from ..registry import BACKBONES
from .base import Backbone, Features
from .weights import load_weights

BANDS = 3
MEAN = (0.4488, 0.4371, 0.4040)
"""Of red, green and blue, on the 0..1 scale."""


class SConvLB(nn.Module):
    """(out3 + x) (sigmoid(out3) - 1/2) with out3 = c3(out2), out2 = SiLU(c2(out1)), out1 = SiLU(c1(x)); 3 x 3 each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c1_r, self.c2_r, self.c3_r = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))

    def stages(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, C, H, W) to the block's output, out1, out2 and out3, all of that shape."""
        out1 = F.silu(self.c1_r(x))
        out2 = F.silu(self.c2_r(out1))
        out3 = self.c3_r(out2)
        return (out3 + x) * (out3.sigmoid() - 0.5), out1, out2, out3

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)[0]


class DSCFNet(nn.Module):
    """Colours around their mean (B, 3, H, W), to the enlarged image (B, 3, s H, s W) on the 0..1 scale.

    Modules have the names of the published checkpoint.
    """

    def __init__(self, channels: int, blocks: int, upscale: int) -> None:
        super().__init__()
        self.blocks = [f"block_{n + 1}" for n in range(blocks)]
        self.conv_1 = nn.Conv2d(BANDS, channels, 3, padding=1)
        for name in self.blocks:
            self.add_module(name, SConvLB(channels))
        self.conv_cat = nn.Conv2d(4 * channels, channels, 1)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)
        last = nn.Conv2d(channels, BANDS * upscale**2, 3, padding=1)
        self.upsampler = nn.Sequential(last, nn.PixelShuffle(upscale))
        self.saving = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.saving = enable

    def levels(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The outputs of the blocks, and what is still to be shuffled into the image, (B, 3 s s, H, W)."""
        first, outputs = self.conv_1(x), []
        x = first
        for name in self.blocks[:-1]:
            x = self._run(self.get_submodule(name), x)
            outputs.append(x)
        x, inner, _, _ = self._run(self.get_submodule(self.blocks[-1]).stages, x)
        outputs.append(x)
        x = self.conv_cat(torch.cat([first, self.conv_2(x), outputs[0], inner], 1))
        return outputs, self.upsampler[0](x)

    def _run(self, function: Callable, x: Tensor) -> Any:
        return checkpoint(function, x, use_reentrant=False) if self.saving else function(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsampler[1](self.levels(x)[1])


@BACKBONES.register_module()
class DSCF(Backbone):
    """The network of DSCLoRA (Yaozzz666/DSCF-SR): enlarges images; the published one has 130,828 parameters.

    After SPAN: a convolution, blocks SConvLB, and a 1 x 1 convolution on the first convolution's output, that of
    another convolution behind the blocks, the first block's output and the last block's first activation; one more
    convolution and a pixel shuffle give the image. The authors train it by distillation from a SPAN; the low-rank
    updates of that training are merged in their file, and new ones go to its convolutions as to any backbone's.

    As features, our reading of an enlarging network, every pixel is a token that holds its s x s pixels of the result;
    `image` puts them together. `maps` are the outputs of blocks, e.g. for the loss SpatialAffinity. Sites: "patch" is
    the convolution that reads the image, "conv" are all others, "block" all blocks but the last, which gives more than
    its output.

    Args:
        weights: None for random weights, or a file (the published team23_DSCF.pth, or of this network's own names).
        channels: width C.
        blocks: number of blocks.
        upscale: factor s on each side.
        out_indices: blocks whose outputs are given as maps, from the first to the last; none by default.
    """

    capabilities = frozenset({"maps"})
    layout = "NCHW"
    patch = 1
    prefix = 0
    in_chans = BANDS
    mean = tuple(255 * value for value in MEAN)
    std = (1.0,) * BANDS

    def __init__(
        self,
        weights: str | None = None,
        channels: int = 26,
        blocks: int = 6,
        upscale: int = 4,
        out_indices: Sequence[int] = (),
    ) -> None:
        super().__init__()
        for name, value in dict(channels=channels, blocks=blocks, upscale=upscale).items():
            if not isinstance(value, int) or value < 1:
                raise InputError(f"DSCF: {name} must be a whole number of at least 1, got {value!r}")
        self.weights, self.channels, self.blocks, self.upscale = weights, channels, blocks, upscale
        self.out_indices = tuple(out_indices)
        if list(self.out_indices) != sorted(set(self.out_indices) & set(range(blocks))):
            raise InputError(
                f"DSCF: out_indices must name blocks from 0 to {blocks - 1} in order, got {list(out_indices)}"
            )
        self.depth = blocks
        self.embed_dims = [channels] * len(self.out_indices) or [BANDS * upscale**2]
        self.body = DSCFNet(channels, blocks, upscale)
        if weights is not None:
            self.weight_report = load_weights(self.body, weights)

    def pooled_dim(self, kind: str) -> int:
        return BANDS * self.upscale**2

    def sites(self) -> list[Site]:
        return list(self._sites())

    def _sites(self) -> Iterator[Site]:
        yield self._conv("conv_1", "patch", -1)
        for i, block in enumerate(self.body.blocks):
            for n, name in enumerate(("c1_r", "c2_r", "c3_r")):
                yield self._conv(f"{block}.{name}", "conv", i, n)
            if i < self.blocks - 1:
                yield Site(block, "block", i, self.channels, self.channels, layout="NCHW")
        for n, path in enumerate(("conv_2", "conv_cat", "upsampler.0")):
            yield self._conv(path, "conv", -1, n)

    def _conv(self, path: str, role: str, layer: int, n: int = 0) -> Site:
        conv = self.body.get_submodule(path)
        return Site(path, role, layer, conv.in_channels, conv.out_channels, layout="NCHW", n=n)

    def layer_id(self, name: str) -> int:
        first = name.split(".")[0]
        if first in self.body.blocks:
            return self.body.blocks.index(first) + 1
        return 0 if first == "conv_1" else self.depth + 1

    def grid(self, x: Tensor) -> tuple[int, int]:
        return x.shape[-2], x.shape[-1]

    def pad(self, x: Tensor) -> Tensor:
        """Images as they are: every size will do."""
        return x

    def forward(self, x: Tensor) -> Features:
        """(B, 3, H, W) images, less their mean on the 0..255 scale, to features with tokens (B, H W, 3 s s).

        Raises:
            InputError: another number of bands.
        """
        if x.ndim != 4 or x.shape[1] != BANDS:
            raise InputError(f"DSCF takes (B, {BANDS}, H, W) images, got {tuple(x.shape)}")
        outputs, last = self.body.levels(x)
        tokens = last.flatten(2).mT
        return Features(tokens, self.grid(x), None, tokens.mean(1), [outputs[i] for i in self.out_indices])

    def image(self, features: Features) -> Tensor:
        """The enlarged images (B, 3, s H, s W) on the 0..1 scale, not clipped, that the features hold."""
        return self.body.upsampler[1](features.tokens.mT.unflatten(2, features.grid))
