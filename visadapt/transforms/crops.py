"""Crops that look at the mask, in the form of albumentations' own transforms."""

from __future__ import annotations

from typing import Any

import albumentations as A
import numpy as np

from ..errors import InputError

TRIES = 10


class BalancedCrop(A.RandomCrop):
    """A random crop in which no class has more than a share of the labelled pixels.

    Places are drawn until one fits; the last of ten is taken as it is, so uniform images pass as well. This is what
    segmentation recipes call `cat_max_ratio` (Earth-Adapter: 512 pixels, 0.75). It needs a mask beside the image.

    Args:
        height: of the crop, in pixels.
        width: of the crop, in pixels.
        max_share: the highest share of one class, in (0, 1].
        pad_if_needed: pad smaller images, with `fill` and an ignored mask; else they are an error.
        pad_position: where the image then stands, e.g. "center" or "top_left".
        fill: value of added pixels, one number or one per band.
        p: chance that an image is cropped at all.

    Raises:
        InputError: `max_share` is out of range.
    """

    targets_as_params = ("mask",)

    def __init__(
        self,
        height: int,
        width: int,
        max_share: float = 0.75,
        pad_if_needed: bool = False,
        pad_position: str = "center",
        fill: float | tuple[float, ...] = 0,
        p: float = 1.0,
    ) -> None:
        if not 0 < max_share <= 1:
            raise InputError(f"BalancedCrop: max_share must be in (0, 1], got {max_share}")
        super().__init__(
            height=height, width=width, pad_if_needed=pad_if_needed, pad_position=pad_position, fill=fill, p=p
        )
        self.max_share = max_share

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """The place of the crop; `data["mask"]` (H, W) holds 0 where it is ignored, see `Albu`."""
        for _ in range(TRIES):
            place = super().get_params_dependent_on_data(params, data)
            counts = np.bincount(self.apply_to_mask(data["mask"], **place).ravel(), minlength=2)[1:]
            if 0 < counts.max() <= self.max_share * counts.sum():
                break
        return place
