"""Blood vessels in photographs of the retina: DRIVE (Staal et al. 2004) and CHASE_DB1 (Fraz et al. 2012)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import InputError, hint
from ..registry import DATASETS
from .base import data_root
from .files import UnreadableImage
from .masks import Pixels, SegmentationDataset, find_pairs

CLASSES = ("background", "vessel")
PALETTE = ("#000000", "#ff4040")
HALF = 20
"""Images of DRIVE that are for training, and those that are for testing."""


@DATASETS.register_module()
class DRIVE(SegmentationDataset):
    """40 images of 565x584: vessels against background inside of the field of view, what is outside is ignored.

    `<root>/training` and `<root>/test` hold `images/<n>_training.tif` (or .jpg; `<n>_test` of the others),
    `1st_manual/<n>_manual1.gif`, the first observer's vessels, and `mask/<n>_training_mask.gif`, the field of view.
    The official split: images 21 to 40 are for training, of which 37 to 40 validate, and 1 to 20 for testing.

    Args:
        split: train (16 images), val (4), trainval (20) or test (20).
        root: folder of the data set, see `data_root`.
        transform: see SegmentationDataset, as are the arguments below.
        strict: raise at the first unreadable image or mask.
        seed: of the augmentation.
        training: what stands in for an unreadable image or mask.
        native_masks: masks keep the size they have on disk.
        tile: side of the windows that images are cut into, 0 for none.

    Raises:
        InputError: an unknown split, no such folder, another number of images, images without masks.
    """

    CLASSES, PALETTE = CLASSES, PALETTE
    SPLITS = {
        "train": ("training", slice(16)),
        "val": ("training", slice(16, HALF)),
        "trainval": ("training", slice(HALF)),
        "test": ("test", slice(HALF)),
    }

    def __init__(
        self,
        split: str = "train",
        root: str | Path = "retina/DRIVE",
        transform: list[dict] | None = None,
        strict: bool = False,
        seed: int = 0,
        training: bool = False,
        native_masks: bool = False,
        tile: int = 0,
    ):
        if split not in self.SPLITS:
            raise InputError(f"DRIVE has no split '{split}'{hint(split, self.SPLITS)}")
        part, chosen = self.SPLITS[split]
        base = data_root(root) / part
        suffix = f"_{part}{'.jpg' if any((base / 'images').glob('*.jpg')) else '.tif'}"
        images, vessels = find_pairs(base / "images", base / "1st_manual", suffix, "_manual1.gif")
        if len(images) != HALF:
            raise InputError(f"DRIVE: {base / 'images'} has {len(images)} images; the splits are those of {HALF}")
        images, vessels = images[chosen], vessels[chosen]
        self.fields = {str(p): base / "mask" / f"{p.stem}_mask.gif" for p in images}
        super().__init__(
            images,
            vessels,
            CLASSES,
            transform,
            strict=strict,
            seed=seed,
            training=training,
            label_map={0: 0, 255: 1},
            native_masks=native_masks,
            tile=tile,
        )

    def _check_files(self) -> None:
        super()._check_files()
        self._refuse_missing([str(p) for p in self.fields.values()], "fields of view")

    def raw_mask(self, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        mask, window = read_gif(Path(self.masks[index])), self.windows[index]
        return mask if window is None else mask[window.slices], mask.shape

    def pixels(self, index: int) -> Pixels:
        pixels, window = super().pixels(index), self.windows[index]
        outside = read_gif(self.fields[self.paths[index]]) == 0
        if outside.shape != pixels.size:
            raise InputError(
                f"{self.paths[index]} is {pixels.size}, its field of view {outside.shape} (height, width); both need "
                "one size"
            )
        return pixels._replace(empty=outside if window is None else outside[window.slices])


@DATASETS.register_module()
class CHASEDB1(SegmentationDataset):
    """28 images of 999x960, both eyes of 14 children: vessels, as the first observer saw them, against background.

    `<root>/Image_<child><L or R>.jpg` and `Image_<child><L or R>_1stHO.png`. Children 1 to 10 are for training, of
    whom 9 and 10 validate, and 11 to 14 for testing, so that no child is in two splits. The set has no fields of view:
    the black surroundings count as background.

    Args:
        split: train (16 images), val (4), trainval (20) or test (8).
        root: folder of the data set, see `data_root`.
        transform: see SegmentationDataset, as are the arguments below.
        strict: raise at the first unreadable image or mask.
        seed: of the augmentation.
        training: what stands in for an unreadable image or mask.
        native_masks: masks keep the size they have on disk.
        tile: side of the windows that images are cut into, 0 for none.

    Raises:
        InputError: an unknown split, no such folder, images that do not exist or have no masks.
    """

    CLASSES, PALETTE = CLASSES, PALETTE
    SPLITS = {"train": range(1, 9), "val": range(9, 11), "trainval": range(1, 11), "test": range(11, 15)}

    def __init__(
        self,
        split: str = "train",
        root: str | Path = "retina/CHASEDB1",
        transform: list[dict] | None = None,
        strict: bool = False,
        seed: int = 0,
        training: bool = False,
        native_masks: bool = False,
        tile: int = 0,
    ):
        if split not in self.SPLITS:
            raise InputError(f"CHASEDB1 has no split '{split}'{hint(split, self.SPLITS)}")
        base = data_root(root)
        eyes = [base / f"Image_{child:02d}{eye}" for child in self.SPLITS[split] for eye in "LR"]
        super().__init__(
            [f"{eye}.jpg" for eye in eyes],
            [f"{eye}_1stHO.png" for eye in eyes],
            CLASSES,
            transform,
            strict=strict,
            seed=seed,
            training=training,
            label_map={0: 0, 1: 1, 255: 1},  # the files have one bit
            native_masks=native_masks,
            tile=tile,
        )


def read_gif(path: Path) -> np.ndarray:
    """A grey picture (H, W) uint8.

    Raises:
        UnreadableImage: it is missing or damaged.
    """
    try:
        with Image.open(path) as picture:
            return np.array(picture.convert("L"))
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        raise UnreadableImage(f"{path} is missing, damaged or not an image") from error
