"""Augmentation of the frames of a clip, and RandAugment for frames and single images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import albumentations as A
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

STRENGTHS = 11
"""Of RandAugment: 0 to 10, the scale of the paper."""


def for_each_frame(transform: Callable[[np.ndarray, int], np.ndarray], frames: np.ndarray, seed: int) -> np.ndarray:
    """Transform all frames (N, H, W, C) with the same draw: each one is given the same seed.

    Args:
        transform: takes an image and a seed, as `visadapt.transforms.albu.Albu` does.
        frames: of one clip.
        seed: decides every random choice.

    Returns:
        (N, H', W', C).
    """
    return np.stack([transform(frame, seed) for frame in frames])


def three_crops(frames: np.ndarray, num_frames: int) -> np.ndarray:
    """Squares at both ends and in the middle of the longer side, as wide as the shorter one.

    Args:
        frames: (V * T, H, W, C), all frames of the first view first.
        num_frames: T.

    Returns:
        (3 * V * T, S, S, C) with S = min(H, W), all frames of the first view and the first crop first.
    """
    height, width = frames.shape[1:3]
    side, spare = min(height, width), abs(height - width)
    views = frames.reshape(-1, num_frames, *frames.shape[1:])
    axis = 2 if height > width else 3
    crops = [np.take(views, range(at, at + side), axis) for at in (0, spare // 2, spare)]
    return np.stack(crops, axis=1).reshape(-1, side, side, frames.shape[3])


class RandAugment(A.ImageOnlyTransform):
    """RandAugment (Cubuk et al. 2020, arXiv:1909.13719): n operations of 14, drawn anew each time, all of strength m.

    The operations and their ranges are torchvision's. Some of them move pixels, so this is not for images with masks.

    Args:
        m: strength, 0 to 10.
        n: number of operations, one after the other.
        p: chance that an image is changed at all.
    """

    class InitSchema(A.ImageOnlyTransform.InitSchema):
        m: int
        n: int

    def __init__(self, m: int = 7, n: int = 4, p: float = 1.0):
        super().__init__(p=p)
        if not 0 <= m < STRENGTHS or n < 1:
            raise ValueError(f"m must be 0 to {STRENGTHS - 1} and n at least 1, got {m} and {n}")
        self.m, self.n = m, n
        self._augment = v2.RandAugment(n, m, STRENGTHS, InterpolationMode.BILINEAR)

    def get_params(self) -> dict[str, Any]:
        return {"seed": self.py_random.getrandbits(63)}

    def apply(self, img: np.ndarray, seed: int, **_: Any) -> np.ndarray:
        """(H, W, C) uint8 to the same."""
        with torch.random.fork_rng(devices=[]):  # torchvision takes no generator
            torch.default_generator.manual_seed(seed)  # and not those of GPUs, which nothing would put back
            return np.array(self._augment(Image.fromarray(img)))  # a few times as fast as with a tensor
