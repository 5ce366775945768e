"""The handwritten digits that come with scikit-learn: real 8x8 scans, no files needed."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ..errors import InputError, hint
from ..registry import DATASETS
from .base import ClassificationDataset

SPLITS = ("train", "test")


@DATASETS.register_module()
class Digits(ClassificationDataset):
    """500 training and 500 test images (8, 8, 3) uint8 of the ten digits, stratified.

    The split is fixed; `seed` changes the augmentation only.

    Args:
        split: train or test.
        transform: see ClassificationDataset; it also brings the images to the backbone's size.
        seed: of the augmentation.
        training: True for the data that are trained on.

    Raises:
        InputError: an unknown split.
    """

    def __init__(
        self,
        split: str = "train",
        transform: list[dict] | None = None,
        seed: int = 0,
        training: bool = False,
    ):
        if split not in SPLITS:
            raise InputError(f"Digits has no split '{split}'{hint(split, SPLITS)}")
        scans = load_digits()
        parts = train_test_split(
            np.arange(len(scans.target)), train_size=500, test_size=500, stratify=scans.target, random_state=0
        )
        chosen = np.sort(parts[SPLITS.index(split)])
        grey = (scans.images[chosen] * (255 / 16)).round().astype(np.uint8)  # scans hold 0 to 16
        self._images = np.repeat(grey[..., None], 3, axis=3)
        paths = [f"digits/{i:04d}" for i in chosen]
        classes = [str(d) for d in range(10)]
        super().__init__(paths, scans.target[chosen], classes, transform, 3, False, seed, training)

    def _check_files(self) -> None:
        """There are none."""

    def load(self, index: int) -> np.ndarray:
        return self._images[index]
