"""Class maps of pictures in memory that are too large for the model, tile by tile as those of scenes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from ..ignored import IGNORED
from .tiles import Scorer, mirrored, plan, score_tiles


class Picture:
    """The source of tiles.

    Args:
        image: (H, W, C).
        empty: (H, W), the pixels that get no class.
    """

    def __init__(self, image: np.ndarray, empty: np.ndarray) -> None:
        self.image, self.empty = image, empty

    def tile(self, x: int, y: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Values (C, side, side), uint8 or float32, and where they are empty (side, side)."""
        part = slice(y, y + side), slice(x, x + side)
        values = np.moveaxis(self.image[part], -1, 0)
        return mirrored(values if values.dtype == np.uint8 else values.astype(np.float32), self.empty[part], side)


class PictureMask:
    """What takes the classes.

    Attributes:
        labels: (H, W) uint8, 255 where there is no class.
        unscored: pixels without a class because their scores were not finite.
    """

    nodata = IGNORED

    def __init__(self, height: int, width: int) -> None:
        self.labels = np.full((height, width), IGNORED, np.uint8)
        self.unscored = 0
        self.done: dict[int, int] = {}

    def write(self, labels: np.ndarray, unscored: np.ndarray, column: int, top: int) -> None:
        self.labels[top : top + labels.shape[0], column : column + labels.shape[1]] = labels
        self.unscored += int(unscored.sum())


def map_picture(
    image: np.ndarray,
    empty: np.ndarray,
    score: Callable[[Tensor], Tensor],
    classes: int,
    tile: int | None,
    overlap: float,
    batch: int | None,
    memory: int,
) -> tuple[PictureMask, int]:
    """The classes of a picture, and the side of its tiles.

    Args:
        image: (H, W, C).
        empty: (H, W), the pixels that get no class.
        score: tiles (B, C, t, t) to scores (B, K, t, t).
        classes: K, 255 at most.
        tile: see `plan`, as are the arguments below.
        overlap: share of a tile's side that neighbours have in common.
        batch: tiles at once.
        memory: bytes for all but the model's weights and the picture.

    Raises:
        InputError: a value out of range, or a budget that is too small.
    """
    height, width, channels = image.shape
    grid, batch = plan(width, height, channels, classes, tile, overlap, batch, memory)
    mask = PictureMask(height, width)
    score_tiles(mask, Picture(image, empty), grid, Scorer(score, classes, batch))
    return mask, grid.tile
