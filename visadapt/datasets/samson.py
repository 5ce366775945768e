"""Samson: one hyperspectral scene of soil, trees and water."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, hint
from ..registry import DATASETS
from .base import data_root
from .masks import Pixels, SegmentationDataset

SIZE = (95, 95, 156)
COLUMNS = {"train": (0, 38), "val": (38, 48), "trainval": (0, 48), "test": (48, 95)}
"""First column of each split, and the first one after it."""


@DATASETS.register_module()
class Samson(SegmentationDataset):
    """The scene of 95x95 pixels and 156 bands (401 to 889 nm), reflectance of 0 to 1, cut into splits by columns.

    `<root>/Y_clean.mat` holds the image and `<root>/Samson_gt.mat` the classes 1 soil, 2 tree and 3 water, which are
    the largest reference abundance of each pixel. A split is one image, or with `tile` several windows of it. Soil is
    rare in the west and frequent in the east: 3 % of trainval, 53 % of test.

    Args:
        split: train (columns 0 to 37), val (38 to 47), trainval (0 to 47) or test (48 to 94).
        root: folder of the data set, see `data_root`.
        transform: see SegmentationDataset, as are the arguments below. A crop that is larger than the image needs
            `pad_if_needed=True`. OpenCV flips 128 bands at most: RandomRotate90 and Transpose give what D4 would.
        seed: of the augmentation.
        training: True for the data that are trained on.
        native_masks: masks keep the size they have on disk.
        tile: side of the windows that the split is cut into, 0 for none.

    Raises:
        InputError: an unknown split, no such folder or files, or files of another scene.
    """

    CLASSES = ("soil", "tree", "water")
    PALETTE = ((170, 140, 90), (40, 130, 50), (50, 90, 190))

    def __init__(
        self,
        split: str = "train",
        root: str | Path = "samson_hsi",
        transform: list[dict] | None = None,
        seed: int = 0,
        training: bool = False,
        native_masks: bool = False,
        tile: int = 0,
    ):
        if split not in COLUMNS:
            raise InputError(f"Samson has no split '{split}'{hint(split, COLUMNS)}")
        base = data_root(root)
        image = read_mat(base / "Y_clean.mat", "Y_clean", SIZE)
        mask = read_mat(base / "Samson_gt.mat", "samson_gt", SIZE[:2])
        part = slice(*COLUMNS[split])
        self._image, self._mask = np.ascontiguousarray(image[:, part], np.float32), mask[:, part]
        # the splits share a file, and are no copies of each other
        paths = [f"{base / name}#{part.start}-{part.stop - 1}" for name in ("Y_clean.mat", "Samson_gt.mat")]
        super().__init__(
            paths[:1],
            paths[1:],
            self.CLASSES,
            transform,
            channels=SIZE[2],
            seed=seed,
            training=training,
            reduce_zero=True,
            native_masks=native_masks,
            tile=tile,
        )

    def _check_files(self) -> None:
        """Both have been read."""

    def pixels(self, index: int) -> Pixels:
        window = self.windows[index]
        image = self._image if window is None else self._image[window.slices]
        return Pixels(image, self._image.shape[:2])

    def mask_size(self, mask: str) -> tuple[int, int]:
        return self._mask.shape

    def raw_mask(self, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        window = self.windows[index]
        return self._mask if window is None else self._mask[window.slices], self._mask.shape


def read_mat(path: Path, name: str, shape: tuple[int, ...]) -> Any:
    """An array of a Matlab file.

    Raises:
        InputError: no such file, a damaged one, or no array of that name and shape in it.
    """
    from scipy.io import loadmat

    if not path.is_file():
        raise InputError(f"Samson: there is no {path}; see data/README.md")
    try:
        found = loadmat(path, variable_names=[name]).get(name)
    except Exception as error:  # a damaged header can fail in any way
        raise InputError(f"Samson: {path} is damaged or not a Matlab file; fetch it again") from error
    if found is None or found.shape != shape:
        has = "no array" if found is None else f"{found.shape} as"
        raise InputError(f"Samson: {path} has {has} '{name}', {shape} is needed")
    return found
