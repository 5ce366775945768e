"""A few images of each class, drawn from published splits: the protocol of CoOp (Zhou et al. 2022)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, hint
from ..registry import DATASETS
from .base import ClassificationDataset, data_root, find_list
from .files import read_json

SPLITS = ("train", "val", "test")
VAL_SHOTS = 4
"""The most images of a class that validation takes; fewer where there are fewer shots."""

Row = tuple[str, int, str]
"""Path, class index, class name."""


def _published(folder: str, images: str, name: str) -> dict[str, str]:
    return {"root": f"few-shot/{folder}", "image_dir": images, "split_file": f"split_zhou_{name}.json"}


TASKS: dict[str, tuple[int, dict[str, str]]] = {
    "caltech101": (100, _published("caltech-101", "101_ObjectCategories", "Caltech101")),
    "oxford_pets": (37, _published("oxford_pets", "images", "OxfordPets")),
    "stanford_cars": (196, _published("stanford_cars", "", "StanfordCars")),
    "oxford_flowers": (102, _published("oxford_flowers", "jpg", "OxfordFlowers")),
    "food101": (101, _published("food-101", "images", "Food101")),
    "sun397": (397, _published("sun397", "SUN397", "SUN397")),
    "dtd": (47, _published("dtd", "images", "DescribableTextures")),
    "eurosat": (10, _published("eurosat", "2750", "EuroSAT")),
    "ucf101": (101, _published("ucf101", "UCF-101-midframes", "UCF101")),
}
"""Number of classes and arguments of FewShot of each set that has such a split file; ImageNet and FGVC-Aircraft, the
other two of the eleven, have none. Folders are named as in CoOp's instructions, from memory."""


@DATASETS.register_module()
class FewShot(ClassificationDataset):
    """`shots` images of each class to train on, min(shots, 4) to validate on, and all test images.

    Published figures are means over draws 1, 2 and 3. The draw is that of CLIP-LoRA: one `random.Random(draw)` takes
    first the validation images and then those for training, each class in the order in which it first comes in the
    list of its split, by `sample`, or by `choices`, with repeats, where a class has fewer images than asked for.

    Args:
        root: folder of the data set, see `data_root`.
        split_file: `split_zhou_<Dataset>.json` below the root: lists "train", "val" and "test" of
            [path, class index, class name].
        shots: K, images of each class.
        draw: seed of the draw.
        split: train, val or test.
        image_dir: folder below the root that the paths are relative to; "" for the root itself.
        transform: see ClassificationDataset, as are the arguments below.
        strict: raise at the first unreadable image.
        seed: of the augmentation.
        training: what stands in for an unreadable image.

    Raises:
        InputError: an unknown split, no such file, one of another layout, fewer shots than 1, or drawn images that do
            not exist.
    """

    def __init__(
        self,
        root: str | Path,
        split_file: str,
        shots: int = 16,
        draw: int = 1,
        split: str = "train",
        image_dir: str = "",
        transform: list[dict] | None = None,
        strict: bool = False,
        seed: int = 0,
        training: bool = False,
    ):
        if split not in SPLITS:
            raise InputError(f"FewShot has no split '{split}'{hint(split, SPLITS)}")
        if shots < 1:
            raise InputError(f"FewShot: shots must be 1 or more, got {shots}")
        base = data_root(root)
        source = find_list(split_file, base)
        lists = read_splits(source)
        names = class_names(source, [row for part in lists.values() for row in part])
        rng = random.Random(draw)
        few = {"val": _drawn(lists["val"], min(shots, VAL_SHOTS), rng), "train": _drawn(lists["train"], shots, rng)}
        rows = {**lists, **few}[split]
        paths, labels = [base / image_dir / path for path, _, _ in rows], [label for _, label, _ in rows]
        super().__init__(paths, labels, names, transform, 3, strict, seed, training)


def _drawn(rows: Sequence[Row], count: int, rng: random.Random) -> list[Row]:
    """So many rows of each class."""
    classes: dict[int, list[Row]] = {}
    for row in rows:
        classes.setdefault(row[1], []).append(row)
    take = [rng.sample if len(found) >= count else rng.choices for found in classes.values()]
    return [row for draw, found in zip(take, classes.values()) for row in draw(found, k=count)]


def read_splits(path: Path) -> dict[str, list[Row]]:
    """The rows of each split.

    Raises:
        InputError: it is no split file.
    """
    found: Any = read_json(path)
    for split in SPLITS:
        if not isinstance(found, dict) or not isinstance(found.get(split), list) or not found[split]:
            raise InputError(f"{path} has no list '{split}'; give a split_zhou_<Dataset>.json")
        for n, row in enumerate(found[split]):
            if not isinstance(row, list) or [type(item) for item in row] != [str, int, str]:
                raise InputError(f"{path}: '{split}', entry {n}: {row!s:.60} is not [path, class index, class name]")
    return {split: [tuple(row) for row in found[split]] for split in SPLITS}


def class_names(path: Path, rows: Sequence[Row]) -> list[str]:
    """Class names in the order of their indices, with blanks for underscores.

    Raises:
        InputError: an index without a name or with two, or a gap between indices.
    """
    names: dict[int, str] = {}
    for image, label, name in rows:
        if names.setdefault(label, name) != name:
            raise InputError(f"{path}: class {label} is '{names[label]}' and, for {image}, '{name}'; give it one name")
    if sorted(names) != list(range(len(names))):
        raise InputError(f"{path}: class indices are 0 to {len(names) - 1} for {len(names)} classes, got {max(names)}")
    return [names[i].replace("_", " ") for i in range(len(names))]
