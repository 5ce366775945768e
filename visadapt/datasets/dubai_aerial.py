"""Aerial images of Dubai with coloured masks (MBRSC, Humans in the Loop)."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError, hint
from ..registry import DATASETS
from .base import data_root
from .masks import SegmentationDataset, find_pairs

SPLITS = {"train": (1, 2, 3, 4, 5), "train4": (1, 2, 3, 4), "val": (5,), "test": (6,)}
"""Tiles of each."""
UNLABELED = ("#9b9b9b", "#000000")


@DATASETS.register_module()
class DubaiAerial(SegmentationDataset):
    """Five classes in `<root>/Tile <n>/images/*.jpg` and `<root>/Tile <n>/masks/*.png`, about 1000 pixels a side.

    Tiles 1 to 5 are for training, tile 6, another place, for testing. To choose settings without it, train on tiles 1
    to 4 and validate on tile 5. Unlabelled and black pixels are ignored.

    Args:
        split: train (tiles 1 to 5), train4 (1 to 4), val (5) or test (6).
        root: folder of the data set, see `data_root`.
        transform: see SegmentationDataset, as are the arguments below.
        strict: raise at the first unreadable image or mask.
        seed: of the augmentation.
        training: what stands in for an unreadable image or mask.
        native_masks: masks keep the size they have on disk.
        tile: side of the windows that images are cut into, 0 for none.

    Raises:
        InputError: an unknown split, no such folder, images without masks.
    """

    CLASSES = ("building", "land", "road", "vegetation", "water")
    PALETTE = ("#3c1098", "#8429f6", "#6ec1e4", "#fedd3a", "#e2a929")

    def __init__(
        self,
        split: str = "train",
        root: str | Path = "dubai_aerial",
        transform: list[dict] | None = None,
        strict: bool = False,
        seed: int = 0,
        training: bool = False,
        native_masks: bool = False,
        tile: int = 0,
    ):
        if split not in SPLITS:
            raise InputError(f"DubaiAerial has no split '{split}'{hint(split, SPLITS)}")
        folders = [data_root(root) / f"Tile {n}" for n in SPLITS[split]]
        pairs = [find_pairs(folder / "images", folder / "masks", ".jpg", ".png") for folder in folders]
        super().__init__(
            [image for images, _ in pairs for image in images],
            [mask for _, masks in pairs for mask in masks],
            self.CLASSES,
            transform,
            strict=strict,
            seed=seed,
            training=training,
            colors=self.PALETTE,
            ignore=UNLABELED,
            native_masks=native_masks,
            tile=tile,
        )
