"""Resizing as published protocols have it."""

from __future__ import annotations

from typing import Any

import albumentations as A
import numpy as np
from PIL import Image


class BicubicResize(A.Resize):
    """Pillow's bicubic resizing to a fixed size, which smooths where it shrinks; the aspect ratio is not kept.

    It is what torchvision's Resize does to an image file, and so what VTAB-1k's figures were made with. OpenCV's
    bicubic, which albumentations has, takes four pixels per axis whatever it shrinks by. For 8-bit images of 1, 3 or 4
    bands; a mask takes the nearest values.

    Args:
        height: in pixels.
        width: in pixels.
        p: chance that an image is resized.
    """

    def __init__(self, height: int, width: int, p: float = 1.0):
        super().__init__(height=height, width=width, p=p)

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        image = Image.fromarray(img[..., 0] if img.shape[-1] == 1 else img)
        resized = np.asarray(image.resize((self.width, self.height), Image.Resampling.BICUBIC))
        return resized.reshape(self.height, self.width, img.shape[-1])
