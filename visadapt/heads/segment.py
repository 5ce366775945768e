"""The smallest head for segmentation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..registry import HEADS


@HEADS.register_module()
class LinearSegHead(nn.Module):
    """Batch norm and one linear layer per pixel of all levels, as DINOv2 is probed (Oquab et al. 2024, section 7.4).

    Levels of other sizes are resized to the finest.

    Args:
        num_classes: K.
        in_channels: per level.

    Raises:
        InputError: fewer than 2 classes.
    """

    def __init__(self, num_classes: int, in_channels: list[int]) -> None:
        super().__init__()
        if num_classes < 2:
            raise InputError(f"LinearSegHead: num_classes must be 2 or more, got {num_classes}")
        self.num_classes, self.in_channels = num_classes, in_channels
        self.norm = nn.BatchNorm2d(sum(in_channels))
        self.fc = nn.Conv2d(sum(in_channels), num_classes, 1)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Per level (B, D, h, w) to logits (B, num_classes, h, w) at the size of the first."""
        size = maps[0].shape[2:]
        levels = [x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear") for x in maps]
        return self.fc(self.norm(torch.cat(levels, 1)))
