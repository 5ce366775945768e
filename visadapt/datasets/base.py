"""What data sets of images share, the data set of images with labels, and how samples become a batch.

Augmentation draws from (seed, epoch, index) alone, so a sample is the same whatever the number of workers and whether
or not the run was resumed in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from ..transforms.albu import Albu
from .files import UnreadableImage, data_root, find_list, read_image, read_lines

__all__ = [
    "ClassificationDataset",
    "Draw",
    "ImageDataset",
    "collate",
    "data_root",
    "find_list",
    "read_image",
    "read_lines",
]


class Draw(NamedTuple):
    """What a sampler asks for: sample `index` as it looks in `epoch`."""

    epoch: int
    index: int


def draw_seed(seed: int, epoch: int, index: int) -> int:
    """A 64-bit seed for one sample of one epoch; neighbouring arguments give unrelated seeds."""
    return int(np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)[0])


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, C) to (C, H, W); 8-bit values stay uint8, all others become float32. Values are not scaled."""
    image = image if image.dtype == np.uint8 else image.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


class ImageDataset(Dataset):
    """Image files with something to learn about each; what that is, subclasses say in `_sample` and `_blank`.

    Args:
        paths: image files, one per sample.
        classes: class names; their order gives the class index.
        transform: albumentations entries, see `visadapt.transforms.albu.Albu`; None leaves images as they are.
        channels: bands of every image.
        strict: raise at the first unreadable image.
        seed: of the augmentation.
        training: what stands in for an unreadable image where `strict` is off: True takes the next readable sample,
            False gives an all-zero image with `valid=False`, which metrics leave out.

    Attributes:
        unit: what one sample is called in messages: "image", "tile" or "clip".

    Raises:
        InputError: no samples, a class named twice, files that do not exist, transforms that cannot work.
    """

    unit = "image"

    def __init__(
        self,
        paths: Sequence[str | Path],
        classes: Sequence[str],
        transform: list[dict] | None,
        channels: int,
        strict: bool,
        seed: int,
        training: bool,
    ):
        self.paths = [str(p) for p in paths]
        self.classes = tuple(str(c) for c in classes)
        self.metainfo = {"classes": self.classes}
        self.transform = Albu(transform, channels) if transform else None
        self.channels, self.strict, self.seed, self.training = channels, strict, seed, training
        self._check()
        self._check_files()

    def _check(self) -> None:
        name = type(self).__name__
        if not self.paths:
            raise InputError(f"{name} has no {self.unit}s")
        if self.seed < 0:
            raise InputError(f"{name}: seed must be 0 or more, got {self.seed}")
        if len(set(self.classes)) != len(self.classes):
            twice = next(c for c in self.classes if self.classes.count(c) > 1)
            raise InputError(f"{name}: class '{twice}' is named twice")

    def _check_files(self) -> None:
        self._refuse_missing(self.paths, "images")

    def _refuse_missing(self, paths: Sequence[str], noun: str, there: Callable[[Path], bool] = Path.is_file) -> None:
        missing = [p for p in paths if not there(Path(p))]
        if missing:
            more = ", …" if len(missing) > 5 else ""
            raise InputError(
                f"{type(self).__name__}: {len(missing)} of {len(paths)} listed {noun} do not exist: "
                f"{', '.join(missing[:5])}{more}; mend the list or the data folder"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """What a sample is called in results."""
        return self.paths[index]

    def load(self, index: int) -> np.ndarray:
        """The raw image (H, W, C).

        Raises:
            UnreadableImage: it is missing or damaged.
        """
        return read_image(self.paths[index], self.channels)

    def read(self, index: int) -> Any:
        """All that is read from the files of a sample."""
        return self.load(index)

    def _read(self, index: int, seed: int) -> Any:
        """What `_sample` takes, for data sets where the draw decides what is read."""
        return self.read(index)

    def _sample(self, index: int, content: Any, seed: int) -> dict[str, Any]:
        """ "inputs" (C, H, W) and what is to be learnt, from what `read` gave; `seed` decides the augmentation."""
        raise NotImplementedError

    def _blank(self, index: int, like: dict[str, Any]) -> dict[str, Any]:
        """What stands in for an unreadable sample: zeros in the shape of another one, so that a batch still stacks."""
        return {**like, "inputs": torch.zeros_like(like["inputs"])}

    def _load_readable(self, index: int, seed: int) -> tuple[int, Any]:
        """The first readable sample from `index` on, going round the end."""
        for shift in range(len(self)):
            other = (index + shift) % len(self)
            try:
                return other, self._read(other, seed)
            except UnreadableImage:
                if self.strict:
                    raise
        raise InputError(
            f"{type(self).__name__}: none of the {len(self)} {self.unit}s can be read; the first is {self.paths[0]}"
        )

    def __getitem__(self, item: int | Draw) -> dict[str, Any]:
        """One sample.

        Args:
            item: an index, which means epoch 0, or a Draw.

        Returns:
            "inputs" (C, H, W), what is to be learnt ("label" or "mask"), "index", "path", "valid" and "unreadable": the
            path of the image that was asked for and could not be read, else "".
        """
        epoch, index = item if isinstance(item, tuple) else (0, int(item))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        seed = draw_seed(self.seed, epoch, index)
        found, content = self._load_readable(index, seed)
        sample = self._sample(found, content, seed)
        valid = found == index or self.training
        unreadable = "" if found == index else self.paths[index]
        if not valid:
            sample, found = self._blank(index, sample), index
        return {**sample, "index": found, "path": self.name(found), "valid": valid, "unreadable": unreadable}


class ClassificationDataset(ImageDataset):
    """Images with one label each.

    Args:
        paths: image files, one per sample.
        labels: class index of each sample.
        classes: class names; their order gives the class index.
        transform: see ImageDataset, as are the arguments below.
        channels: bands of every image.
        strict: raise at the first unreadable image.
        seed: of the augmentation.
        training: what stands in for an unreadable image.

    Raises:
        InputError: no samples, labels that name no class, files that do not exist, transforms that cannot work.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        labels: Sequence[int],
        classes: Sequence[str],
        transform: list[dict] | None = None,
        channels: int = 3,
        strict: bool = False,
        seed: int = 0,
        training: bool = False,
    ):
        self.labels = [int(label) for label in labels]
        super().__init__(paths, classes, transform, channels, strict, seed, training)

    def _check(self) -> None:
        super()._check()
        name = type(self).__name__
        if len(self.paths) != len(self.labels):
            raise InputError(f"{name}: {len(self.paths)} {self.unit}s but {len(self.labels)} labels")
        for path, label in zip(self.paths, self.labels):
            if not 0 <= label < len(self.classes):
                raise InputError(
                    f"{name}: {path} has label {label}, but there are {len(self.classes)} classes (0 to "
                    f"{len(self.classes) - 1}); mend the label or name all classes"
                )

    def _sample(self, index: int, content: np.ndarray, seed: int) -> dict[str, Any]:
        image = content if self.transform is None else self.transform(content, seed)
        return {"inputs": to_tensor(image), "label": self.labels[index]}

    def _blank(self, index: int, like: dict[str, Any]) -> dict[str, Any]:
        return {**super()._blank(index, like), "label": self.labels[index]}


def stack(
    samples: list[dict[str, Any]],
    key: str = "inputs",
    noun: str = "images",
    axes: str = "bands, height, width",
    advice: str = "add a resize or crop transform, such as dict(type='Resize', height=224, width=224)",
) -> Tensor:
    """Tensors of all samples as one (B, ...).

    Raises:
        InputError: images, or what the noun says, of different size; with the axes of a sample, and what to do.
    """
    shapes = {tuple(s[key].shape): s["path"] for s in samples}
    if len(shapes) > 1:
        (a, path_a), (b, path_b) = list(shapes.items())[:2]
        raise InputError(f"{noun} of a batch differ in size: {path_a} is {a}, {path_b} is {b} ({axes}); {advice}")
    return torch.stack([s[key] for s in samples])


def common(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """What a batch says about its samples, whatever is to be learnt.

    Returns:
        "index" (B,) int64, "path": list of B, "valid" (B,) bool, "unreadable": paths of the images that could not be
        read, and "task" (B,) int64 where the samples have one.
    """
    return {
        "index": torch.tensor([s["index"] for s in samples], dtype=torch.int64),
        "path": [s["path"] for s in samples],
        "valid": torch.tensor([s["valid"] for s in samples], dtype=torch.bool),
        "unreadable": [s["unreadable"] for s in samples if s["unreadable"]],
        **({"task": torch.tensor([s["task"] for s in samples], dtype=torch.int64)} if "task" in samples[0] else {}),
    }


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples with labels into a batch.

    Returns:
        "inputs" (B, C, H, W) or "features" (B, D), "labels" (B,) int64, and what `common` adds.

    Raises:
        InputError: images of different size.
    """
    key = "features" if "features" in samples[0] else "inputs"
    labels = torch.tensor([s["label"] for s in samples], dtype=torch.int64)
    return {key: stack(samples, key), "labels": labels, **common(samples)}
