"""Tiny ImageNet (Le and Yang 2015): 64x64 images of 200 classes of ImageNet, or of some of them."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError, hint
from ..registry import DATASETS
from .base import ClassificationDataset, data_root, read_lines
from .folder import images_below

SPLITS = ("train800", "val200", "train800val200", "train", "test")
TRAIN, VAL = 800, 200


@DATASETS.register_module()
class TinyImageNet(ClassificationDataset):
    """Images in `<root>/train/<class>/images/*.JPEG` and `<root>/val/images/*.JPEG`, laid out as in the archive.

    Classes are the WordNet ids of `<root>/wnids.txt`, sorted. As in VTAB-1k, train800 and val200 choose
    hyper-parameters and train800val200 trains the final model: of each class the first 800 // classes images in the
    order of their names, and the next 200 // classes; 16 and 4 for 50 classes, 4 and 1 for 200. Where the division
    leaves a rest there are fewer than 800 and 200.

    Args:
        split: train800, val200, train800val200, train (all training images) or test (the official validation images,
            as labels of the test images were never published).
        root: folder of the data set, see `data_root`.
        transform: see ClassificationDataset, as are the arguments below.
        strict: raise at the first unreadable image.
        seed: of the augmentation.
        training: what stands in for an unreadable image.

    Raises:
        InputError: an unknown split, no such folder or list, more than 200 classes, a class with too few images, or
            images of no known class.
    """

    def __init__(
        self,
        split: str = "train",
        root: str | Path = "tiny_imagenet_50/tiny-imagenet-200",
        transform: list[dict] | None = None,
        strict: bool = False,
        seed: int = 0,
        training: bool = False,
    ):
        if split not in SPLITS:
            raise InputError(f"TinyImageNet has no split '{split}'{hint(split, SPLITS)}")
        base = data_root(root)
        classes = sorted(line for _, line in read_lines(base / "wnids.txt"))
        if len(classes) > VAL:
            raise InputError(f"TinyImageNet: {base / 'wnids.txt'} has {len(classes)} classes, 200 at most are expected")
        pairs = _annotated(base / "val", classes) if split == "test" else _first(base / "train", classes, split)
        paths, labels = [path for path, _ in pairs], [label for _, label in pairs]
        super().__init__(paths, labels, classes, transform, 3, strict, seed, training)


def _first(folder: Path, classes: list[str], split: str) -> list[tuple[Path, int]]:
    """Images and class indices of a split of the training images."""
    few, val = TRAIN // len(classes), VAL // len(classes)
    parts = {"train800": slice(few), "val200": slice(few, few + val), "train800val200": slice(few + val)}
    pairs = []
    for label, name in enumerate(classes):
        images = images_below(folder / name / "images")
        if len(images) < few + val:
            raise InputError(
                f"TinyImageNet: {folder / name / 'images'} has {len(images)} images, {few + val} are needed"
            )
        pairs += [(path, label) for path in images[parts.get(split, slice(None))]]
    return pairs


def _annotated(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Images and class indices by `val_annotations.txt`: name, class and box, with tabs between."""
    source, pairs = folder / "val_annotations.txt", []
    for n, line in read_lines(source):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in classes:
            raise InputError(f"{source}:{n}: '{wnid}' is no class of wnids.txt{hint(wnid, classes)}")
        pairs.append((folder / "images" / name, classes.index(wnid)))
    return pairs
