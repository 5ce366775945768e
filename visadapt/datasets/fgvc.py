"""FGVC: five sets of fine-grained classes with the splits that visual prompt tuning published (Jia et al. 2022)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..errors import InputError, hint
from ..registry import DATASETS
from .base import ClassificationDataset, data_root
from .files import read_json


class FineGrained(NamedTuple):
    """One of the five.

    Attributes:
        classes: how many there are.
        images: folder below that of the task which the paths of the lists are relative to, "" for the task's own.
    """

    classes: int
    images: str


TASKS = {
    "cub_200_2011": FineGrained(200, "images"),
    "nabirds": FineGrained(555, "images"),
    "oxford_flowers102": FineGrained(102, ""),
    "stanford_dogs": FineGrained(120, "Images"),
    "stanford_cars": FineGrained(196, ""),
}
SPLITS = {"train": ("train",), "val": ("val",), "trainval": ("train", "val"), "test": ("test",)}


def _key(name: str) -> tuple[int, int, str]:
    """Class ids in their order: numbers by value, before names."""
    return (0, int(name), "") if name.isdecimal() else (1, 0, name)


@DATASETS.register_module()
class FGVC(ClassificationDataset):
    """One split of one set, from `<root>/<task>/train.json`, `val.json` and `test.json`: {"path": class id}.

    Hyper-parameters are chosen on train and val; the final model is trained on trainval and measured on test. Class ids
    may be any numbers or names, as NABirds has 555 of about a thousand; sorted, they are the classes. This is the
    layout of the lists as they are commonly handed on; it was not checked against a copy of them.

    Args:
        task: one of the five names in `TASKS`, which also say where below `<root>/<task>` the images are.
        split: train, val, trainval or test.
        root: folder that holds the task folders, see `data_root`.
        transform: see ClassificationDataset, as are the arguments below.
        strict: raise at the first unreadable image.
        seed: of the augmentation.
        training: what stands in for an unreadable image.

    Raises:
        InputError: an unknown task or split, no such folder or list, another number of classes than the task has, or
            images that do not exist.
    """

    def __init__(
        self,
        task: str,
        split: str = "train",
        root: str | Path = "fgvc",
        transform: list[dict] | None = None,
        strict: bool = False,
        seed: int = 0,
        training: bool = False,
    ):
        if task not in TASKS:
            raise InputError(f"FGVC has no task '{task}'{hint(task, TASKS)}")
        if split not in SPLITS:
            raise InputError(f"FGVC has no split '{split}'{hint(split, SPLITS)}")
        base, known = data_root(root) / task, TASKS[task]
        if not base.is_dir():
            raise InputError(f"FGVC: no folder {base}; unpack the task there, see data/README.md")
        # the classes are those of training, so that all splits agree
        lists = {name: read_ids(base / f"{name}.json") for name in dict.fromkeys(("train", "val", *SPLITS[split]))}
        classes = sorted({*lists["train"].values(), *lists["val"].values()}, key=_key)
        if len(classes) != known.classes:
            raise InputError(
                f"FGVC: train.json and val.json in {base} name {len(classes)} classes, {task} has {known.classes}; "
                "put the published lists there"
            )
        rows = [(name, path, label) for name in SPLITS[split] for path, label in lists[name].items()]
        index = {name: i for i, name in enumerate(classes)}
        for name, path, label in rows:
            if label not in index:
                raise InputError(f"{base / name}.json: '{path}' has class {label}, which no training image has")
        paths, labels = [base / known.images / path for _, path, _ in rows], [index[label] for *_, label in rows]
        super().__init__(paths, labels, classes, transform, 3, strict, seed, training)


def read_ids(path: Path) -> dict[str, str]:
    """Class ids by image path.

    Raises:
        InputError: no such file, or it is no mapping from paths to numbers or names.
    """
    found = read_json(path)
    if not isinstance(found, dict) or not all(type(label) in (int, str) for label in found.values()):
        raise InputError(f'{path}: a list is {{"path": class id, ...}}')
    return {image: str(label) for image, label in found.items()}
