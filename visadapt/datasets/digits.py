"""The handwritten digits that come with scikit-learn: real 8x8 scans, no files needed."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ..errors import InputError, hint
from ..registry import DATASETS
from .base import ClassificationDataset

SPLITS = ("train", "test", "train800", "val200", "train800val200")


@DATASETS.register_module()
class Digits(ClassificationDataset):
    """Images (8, 8, 3) uint8 of the ten digits, in fixed and stratified splits; `seed` changes the augmentation only.

    500 images are for testing, and as many others for training. A split as that of VTAB-1k has 800 images for training
    and 200 to choose settings by, drawn from all that are not for testing.

    Args:
        split: train, test, train800, val200 or train800val200.
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
        chosen = _splits(scans.target)[split]
        grey = (scans.images[chosen] * (255 / 16)).round().astype(np.uint8)  # scans hold 0 to 16
        self._images = np.repeat(grey[..., None], 3, axis=3)
        paths = [f"digits/{i:04d}" for i in chosen]
        classes = [str(d) for d in range(10)]
        super().__init__(paths, scans.target[chosen], classes, transform, 3, False, seed, training)

    def _check_files(self) -> None:
        """There are none."""

    def load(self, index: int) -> np.ndarray:
        return self._images[index]


def _splits(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Sorted indices of the scans of each split."""

    def draw(scans: np.ndarray, first: int, second: int) -> list[np.ndarray]:
        return train_test_split(scans, train_size=first, test_size=second, stratify=labels[scans], random_state=0)

    scans = np.arange(len(labels))
    train, test = draw(scans, 500, 500)
    train800, val200 = draw(np.setdiff1d(scans, test), 800, 200)
    parts = (train, test, train800, val200, np.concatenate([train800, val200]))
    return {name: np.sort(part) for name, part in zip(SPLITS, parts, strict=True)}
