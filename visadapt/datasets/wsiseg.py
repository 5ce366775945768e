"""WSISEG (Xie et al. 2020): clouds in photographs of the whole sky."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError, hint
from ..registry import DATASETS
from .base import data_root
from .masks import SegmentationDataset, find_pairs

SPLITS = {"train": slice(140), "test": slice(-40, None)}
COUNT = 200


@DATASETS.register_module()
class WSISEG(SegmentationDataset):
    """Every second image of WSISEG at half its size, 240x225: 140 to train and 40 to test, from one fisheye camera.

    `<root>/whole sky images/*.jpg` and `<root>/annotation/*.png`, where 255 is cloud, 100 sky and 0, beside the sky,
    ignored. The 20 images between the splits are left out, for neighbours in time look alike.

    Args:
        split: train or test.
        root: folder of the data set, see `data_root`.
        transform: see SegmentationDataset, as are the arguments below.
        strict: raise at the first unreadable image or mask.
        seed: of the augmentation.
        training: what stands in for an unreadable image or mask.
        native_masks: masks keep the size they have on disk.

    Raises:
        InputError: an unknown split, no such folder, or another number of images than 200.
    """

    CLASSES = ("sky", "cloud")
    PALETTE = ((70, 130, 180), (240, 150, 40))  # white would not show on clouds

    def __init__(
        self,
        split: str = "train",
        root: str | Path = "wsiseg",
        transform: list[dict] | None = None,
        strict: bool = False,
        seed: int = 0,
        training: bool = False,
        native_masks: bool = False,
    ):
        if split not in SPLITS:
            raise InputError(f"WSISEG has no split '{split}'{hint(split, SPLITS)}")
        base = data_root(root)
        images, masks = find_pairs(base / "whole sky images", base / "annotation", ".jpg", ".png")
        if len(images) != COUNT:
            raise InputError(f"WSISEG: {base} has {len(images)} images; the splits are those of {COUNT}")
        super().__init__(
            images[SPLITS[split]],
            masks[SPLITS[split]],
            self.CLASSES,
            transform,
            strict=strict,
            seed=seed,
            training=training,
            label_map={0: 255, 100: 0, 255: 1},
            native_masks=native_masks,
        )
