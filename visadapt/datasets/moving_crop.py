"""Synthetic motion over real pictures: a task that no single frame can solve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError
from ..registry import DATASETS
from .base import ClassificationDataset, data_root
from .folder import images_below

SIDES, SHIFTS, ZOOMS = (0.35, 0.55), (0.4, 0.8), (1.3, 1.7)
"""Ranges of a window's side over the picture's short side, of its way over its side, and of its largest over its
smallest side."""


@DATASETS.register_module()
class MovingCrop(ClassificationDataset):
    """Clips made by moving a window over one picture: to the left or the right, growing, shrinking, or not at all.

    Each picture stands for one clip per class; place, size and way of the window are drawn from (seed, epoch, index).
    Left and right, and zoom in and out, are the same frames in another order, so that what looks at frames one by one,
    or at shuffled ones, cannot tell them apart: it gets at most 0.6 right, and 0.2 by guessing.

    Args:
        folders: of pictures, see `data_root`; give those of other scenes to the test set.
        suffix: of the pictures' names; other files are left out.
        size: side of the frames in pixels.
        num_frames: T.
        shuffled: in a random order, as a control.
        strict: raise at the first unreadable picture.
        seed: of the draws.
        training: draws differ from epoch to epoch.

    Attributes:
        views_of_clips: arguments of ClipDataset by which other clips are seen as these are, for adapter files; None in
            training, and where frames are shuffled.

    Raises:
        InputError: no pictures, too few frames or pixels.
    """

    unit = "clip"
    CLASSES = ("left", "right", "zoom in", "zoom out", "still")

    def __init__(
        self,
        folders: Sequence[str | Path],
        suffix: str = ".jpg",
        size: int = 56,
        num_frames: int = 4,
        shuffled: bool = False,
        strict: bool = False,
        seed: int = 0,
        training: bool = False,
    ):
        if size < 1 or num_frames < 2:
            raise InputError(f"MovingCrop: size must be 1 or more and num_frames 2, got {size} and {num_frames}")
        self.size, self.num_frames, self.shuffled = size, num_frames, shuffled
        seen = dict(num_frames=num_frames, sampling="uniform", stride=1, clips=1, size=size, crops=1, short="repeat")
        self.views_of_clips = None if training or shuffled else {"transform": [], **seen}
        found = [path for folder in folders for path in images_below(data_root(folder))]
        pictures = [path for path in found if path.name.endswith(suffix)]
        count = len(self.CLASSES)
        labels = [label for _ in pictures for label in range(count)]
        paths = [path for path in pictures for _ in range(count)]
        super().__init__(paths, labels, self.CLASSES, strict=strict, seed=seed, training=training)

    def _sample(self, index: int, content: np.ndarray, seed: int) -> dict[str, Any]:
        label, rng = self.labels[index], np.random.default_rng(seed)
        windows = self._windows(self.CLASSES[label], content.shape[0], content.shape[1], rng)
        if self.shuffled:
            windows = rng.permutation(windows)
        return {"inputs": self._cut(content, windows), "label": label}

    def _windows(self, motion: str, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        """(T, 4) left, upper, right and lower edges of the window."""
        side = rng.uniform(*SIDES) * min(height, width)
        way, zoom = rng.uniform(*SHIFTS) * side, rng.uniform(*ZOOMS)
        time = np.linspace(0, 1, self.num_frames)
        if motion in ("right", "zoom out"):  # the others backwards
            time = time[::-1]
        moves = way if motion in ("left", "right") else 0.0
        sides = np.full(self.num_frames, side)
        if motion.startswith("zoom"):
            sides = side * zoom ** (0.5 - time)
        largest = sides.max()
        x = rng.uniform(largest / 2, width - largest / 2 - moves) + moves * (1 - time)
        y = np.full(self.num_frames, rng.uniform(largest / 2, height - largest / 2))
        return np.stack([x - sides / 2, y - sides / 2, x + sides / 2, y + sides / 2], 1)

    def _cut(self, picture: np.ndarray, windows: np.ndarray) -> Tensor:
        """(T, C, H, W) uint8."""
        image, shape = Image.fromarray(picture), (self.size, self.size)
        frames = [np.asarray(image.resize(shape, Image.Resampling.BILINEAR, box=tuple(w))) for w in windows]
        return torch.from_numpy(np.stack(frames).transpose(0, 3, 1, 2).copy())
