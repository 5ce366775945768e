"""Convolutional networks that read the image beside a transformer and give maps at falling resolution."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, trunc_normal_
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from ...core.context import Context
from ...core.kinds import Side
from ...errors import InputError

FEW_BANDS = 16
"""Up to here the covariance of 3 x 3 patches of an image costs less than full-width maps at its resolution."""

CACHED = 2**14
"""Vectors whose moments are taken at once, so that their copies in double precision stay in the cache."""


class Perception(Side):
    """Runs a network below once per image (B, C, H, W) and gives "context0" and, with several levels, "context1", ...

    Args:
        net: image to maps (B, width, h', w'), fine to coarse.
        context: "sum" of all maps, pooled to the size of the last; the "last" map; or "levels", one of each stage.
        on_grid: give contexts as (B, h*w, width), resized to the patch grid, in place of maps.
        reads: number of the context by the key of the site that reads it.
    """

    def __init__(self, net: nn.Module, context: str, on_grid: bool, reads: dict[str, int]) -> None:
        super().__init__()
        self.net, self.context, self.on_grid, self.reads = net, context, on_grid, reads

    def forward(self, ctx: Context) -> dict[str, Tensor]:
        height, width = ctx.image.shape[-2:]
        if min(height, width) < self.net.least:
            raise InputError(
                f"adapter '{self.owner}' halves the image {len(self.net.stages)} times, so that its sides must be at "
                f"least {self.net.least} pixels, got {height}x{width}; give a smaller depth"
            )
        maps = self.joined(self.net(ctx.image))
        return {f"context{n}": self._given(m, ctx) for n, m in enumerate(maps)}

    def joined(self, maps: list[Tensor]) -> list[Tensor]:
        """Contexts (B, width, h, w), fine to coarse, from the maps of the network."""
        if self.context == "sum":
            size = maps[-1].shape[-2:]
            return [sum(F.adaptive_avg_pool2d(m, size) for m in maps[:-1]) + maps[-1]]
        if self.context == "last":
            return maps[-1:]
        return maps[-len(self.net.stages) :]  # without one of full resolution

    def _given(self, context: Tensor, ctx: Context) -> Tensor:
        if not self.on_grid:
            return context
        return F.interpolate(context, ctx.grid, mode="bilinear", align_corners=False).flatten(2).mT.contiguous()


class Unit(nn.Module):
    """norm2(pointwise(norm1(spatial(x)))), plus x where resolution and channels stay. There is no activation in it.

    Weights start normal with variance 2 / (k k c_out / groups).
    """

    def __init__(self, in_chans: int, width: int, size: int, stride: int = 1, depthwise: bool = False) -> None:
        super().__init__()
        middle, groups = (in_chans, in_chans) if depthwise else (width, 1)
        self.spatial = nn.Conv2d(in_chans, middle, size, stride, (size - 1) // 2, groups=groups, bias=False)
        self.norm1 = nn.BatchNorm2d(middle)
        self.pointwise = nn.Conv2d(middle, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.skip = stride == 1 and in_chans == width
        for conv in (self.spatial, self.pointwise):
            fan_out = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
            nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))

    def forward(self, x: Tensor, rule: Tensor | None = None) -> Tensor:
        """Of x, or of the map `rule` @ x at every pixel, (in_chans, channels of x) in double precision."""
        conv = self.spatial
        if rule is None:
            y = conv(x)
        else:
            y = F.conv2d(x, composed(conv.weight, rule).to(x.dtype), None, conv.stride, conv.padding)
        y = self.norm2(self.pointwise(self.norm1(y)))
        return x + y if self.skip else y


class LinearPyramid(nn.Module):
    """Image (B, C, H, W) to maps of `width` channels at strides 1, 2, 4, ..., 2^depth.

    The first one is given as its means over the places of the last one, which is all that is asked of it.

    A 1 x 1 unit lifts the bands to `width` channels, a 3 x 3 unit (`stem`) stays at full resolution, and each stage
    halves it, by a 3 x 3 unit or by 2 x 2 max pooling. With batch statistics or stored ones alike every unit is linear.

    Args:
        in_chans: bands C.
        width: channels of all maps.
        depth: number of stages.
        stem: False leaves out the unit at full resolution.
        pool: stages are max pooling and have no weights.

    Attributes:
        least: smallest side of an image in pixels.
        stages: modules that halve the resolution.
    """

    def __init__(self, in_chans: int, width: int, depth: int, stem: bool = True, pool: bool = False) -> None:
        super().__init__()
        self.least = 2**depth if pool else 1
        self.lift = Unit(in_chans, width, 1, depthwise=True)
        self.stem = Unit(width, width, 3) if stem else None
        self.stages = nn.ModuleList(nn.MaxPool2d(2) if pool else Unit(width, width, 3, stride=2) for _ in range(depth))

    def forward(self, image: Tensor) -> list[Tensor]:
        x, rule = self._full_resolution(image)
        first, *others = self.stages
        if rule is not None and isinstance(first, nn.MaxPool2d):
            x, rule = per_pixel(rule, x), None
        maps = [first(x) if rule is None else first(x, rule)]
        for stage in others:
            maps.append(stage(maps[-1]))
        pooled = F.adaptive_avg_pool2d(x, maps[-1].shape[-2:])
        return [pooled if rule is None else per_pixel(rule, pooled), *maps]

    def _full_resolution(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values x (B, k, H, W) and the rule (width, k) that gives the map at every pixel; None where the map is x."""
        if self.stem is None:
            return self.lift(image), None
        plain = type(self.stem.norm1) is nn.BatchNorm2d  # norms that ask other processes see more than this batch
        if plain and image.shape[1] <= FEW_BANDS:
            return as_one_rule(self.lift, self.stem, image)
        return self.stem(self.lift(image)), None


def composed(weight: Tensor, rule: Tensor) -> Tensor:
    """Weight (o, m, i, j) of the convolution of `rule` @ x, (o, k, i, j), for a rule (m, k) in double precision."""
    return torch.einsum("omij,mk->okij", weight.double(), rule)


def per_pixel(rule: Tensor, x: Tensor) -> Tensor:
    """`rule` (width, k) @ x at every pixel of x (B, k, H, W)."""
    return F.conv2d(x, rule[:, :, None, None].to(x.dtype))


def as_one_rule(lift: Unit, stem: Unit, image: Tensor) -> tuple[Tensor, Tensor | None]:
    """stem(lift(image)) for a 1 x 1 `lift` without skip and a 3 x 3 `stem` with one, in training and in evaluation.

    Both are linear but for the statistics of their batch norms, and those follow from mean and covariance of the
    image's 3 x 3 patches. So the map is a rule of these patches. It is not made itself, nor is its gradient: what comes
    behind it, a convolution or a mean, takes in the rule. Maps of full resolution are the larger part of what the
    network costs. Where patches have more channels than the map, the map is the smaller one, and is made.

    A further band of ones carries offsets. Outside of the image it is 0, as `stem` pads with zeros what `lift` gives.

    Returns:
        The patches (B, k, H, W) and the rule (width, k), in double precision; or the map and None.
    """
    x = torch.cat([image, torch.ones_like(image[:, :1])], 1)  # (B, n, H, W)
    n, count, patches = x.shape[1], image.shape[0] * image[0, 0].numel(), patches_of(x)
    learn = any(norm.training for norm in (lift.norm1, lift.norm2, stem.norm1, stem.norm2))
    moments = patch_moments(patches) if learn else None
    at_centre = moments and (moments[0].view(n, 9)[:, 4], moments[1].view(n, 9, n, 9)[:, 4, :, 4])

    def after(unit: Unit, rule: Tensor, one: int, moments: tuple[Tensor, Tensor] | None) -> Tensor:
        rule = normalised(unit.norm1, rule, one, moments, count)
        return normalised(unit.norm2, unit.pointwise.weight.flatten(1).double() @ rule, one, moments, count)

    scale = torch.diag(lift.spatial.weight.flatten().double())
    lifted = after(lift, F.pad(scale, (0, 1)), n - 1, at_centre)  # (width, n): lift(image) = lifted @ x
    spread = composed(stem.spatial.weight, lifted).flatten(1)
    rule = after(stem, spread, 9 * n - 5, moments)  # the ones at the centre: 9 (n - 1) + 4
    rule = rule + F.pad(lifted[..., None], (4, 4)).flatten(1)
    if patches.shape[1] <= len(rule):
        return patches, rule
    return F.conv2d(x, rule.unflatten(1, (n, 3, 3)).to(x.dtype), padding=1), None


def patches_of(x: Tensor) -> Tensor:
    """Zero-padded 3 x 3 patches of (B, n, H, W) as channels (B, 9 n, H, W), which are last in memory."""
    windows = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # (B, n, H, W, 3, 3)
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(3).permute(0, 3, 1, 2)


def patch_moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (k,) and covariance (k, k) of vectors (B, k, H, W), in double precision.

    Neighbours are alike: in single precision the variance of their differences would lose the digits that count.
    """
    vectors = patches.movedim(1, -1).flatten(0, -2)
    total, second = 0, 0
    for part in vectors.split(CACHED):
        part = part.double()
        total, second = total + part.sum(0), second + part.mT @ part
    mean = total / len(vectors)
    return mean, second / len(vectors) - torch.outer(mean, mean)


def normalised(
    norm: nn.BatchNorm2d, rule: Tensor, one: int, moments: tuple[Tensor, Tensor] | None, count: int
) -> Tensor:
    """The linear rule (c, k) by which norm(rule @ u) follows from vectors u (k,) whose entry `one` is 1.

    Args:
        norm: a batch norm; its running statistics are updated in training.
        rule: in double precision.
        one: where the constant stands.
        moments: mean and covariance of the vectors; only asked for in training.
        count: number of vectors.
    """
    if not norm.training:
        mean, variance = norm.running_mean.double(), norm.running_var.double()
    else:
        mean, variance = rule @ moments[0], (rule @ moments[1] * rule).sum(1).clamp(min=0)
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            norm.running_mean.lerp_(mean.to(norm.running_mean), norm.momentum)
            norm.running_var.lerp_((variance * count / (count - 1)).to(norm.running_var), norm.momentum)
    gain = norm.weight * (variance + norm.eps).rsqrt()
    offset = norm.bias - gain * mean
    constant = torch.zeros_like(rule[0])
    constant[one] = 1
    return gain[:, None] * rule + torch.outer(offset, constant)


class ConvNeXtPyramid(nn.Module):
    """Image (B, C, H, W) to maps of `width` channels at strides 2, 4, ..., 2^depth: a ConvNeXt of one block per stage.

    Each stage halves the resolution by a 2 x 2 convolution, with a norm after it in the first stage and before it in
    the others, runs one block, and gives its map through a norm of its own.

    Args:
        in_chans: bands C.
        width: channels of all maps.
        depth: number of stages.
        only_last: give the last map only; the other stages then have no norm of their own.

    Attributes:
        least: smallest side of an image in pixels.
        stages: modules that halve the resolution.
    """

    def __init__(self, in_chans: int, width: int, depth: int, only_last: bool = False) -> None:
        super().__init__()
        self.least = 2**depth
        self.stages = nn.ModuleList()
        for n in range(depth):
            conv, norm = nn.Conv2d(width if n else in_chans, width, 2, stride=2), LayerNorm2d(width)
            down = nn.Sequential(norm, conv) if n else nn.Sequential(conv, norm)
            self.stages.append(nn.ModuleDict({"down": down, "block": ConvNeXtBlock(width)}))
        self.norms = nn.ModuleDict({str(n): LayerNorm2d(width) for n in range(depth - 1 if only_last else 0, depth)})
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> list[Tensor]:
        maps, x = [], image
        for n, stage in enumerate(self.stages):
            x = stage["block"](stage["down"](x))
            if str(n) in self.norms:
                maps.append(self.norms[str(n)](x))
        return maps
