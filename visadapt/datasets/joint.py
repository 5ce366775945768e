"""Several classification data sets as one, for adapters that tell tasks apart."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from itertools import accumulate
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..errors import InputError
from ..registry import DATASETS
from .base import ClassificationDataset, Draw


@DATASETS.register_module()
class Joint(Dataset):
    """Classification data sets one after the other; the task number of a sample is that of its part.

    Classes follow each other as the parts do. A name that several parts have becomes `<number of the part>/<name>`.
    Augmentation and unreadable images are each part's own affair: a sample is what its part gives, with label and index
    counted on and with "task".

    Args:
        parts: configs of image data sets. Training and evaluation need the same order, and the same classes in each
            part: where a part makes its classes from a list or table, give it `classes`.

    Attributes:
        transform: what all parts have.
        channels: bands, likewise.
        views_of_clips: how parts made of clips see them, likewise; None for images, and in training.
        unit: "image" or "clip", of the first part.

    Raises:
        InputError: no parts, one that is not made of images or clips with one label each, or parts that differ in
            bands, in transform or in how clips are seen.
    """

    def __init__(self, parts: list[dict]) -> None:
        self.parts = [DATASETS.build(part) for part in parts]
        self._check()
        self.transform, self.channels = self.parts[0].transform, self.parts[0].channels
        self.views_of_clips, self.unit = _views(self.parts[0]), self.parts[0].unit
        uses = Counter(name for part in self.parts for name in part.classes)
        self.classes = tuple(
            f"{number}/{name}" if uses[name] > 1 else name
            for number, part in enumerate(self.parts)
            for name in part.classes
        )
        self.metainfo = {"classes": self.classes}
        self._images_before = [0, *accumulate(map(len, self.parts))]
        self._classes_before = [0, *accumulate(len(part.classes) for part in self.parts)]

    def _check(self) -> None:
        if not self.parts:
            raise InputError("Joint has no parts; give parts=[dict(type=...), ...]")
        for number, part in enumerate(self.parts):
            which = f"Joint: part {number} ({type(part).__name__})"
            if not isinstance(part, ClassificationDataset) or not isinstance(part.labels[0], int):
                raise InputError(f"{which} is no data set of images with one label each")
            first = self.parts[0]
            if part.channels != first.channels:
                raise InputError(f"{which} has {part.channels} bands, part 0 has {first.channels}; they must agree")
            if _entries(part) != _entries(first):
                raise InputError(
                    f"{which} has another transform than part 0; give all parts the same one, since an adapter file "
                    "stores one for all images"
                )
            if _views(part) != _views(first):
                raise InputError(
                    f"{which} sees clips in another way than part 0; give all parts the same num_frames, sampling, "
                    "stride, clips, size, crops and short, since an adapter file stores one way for all clips"
                )

    def __len__(self) -> int:
        return self._images_before[-1]

    def _place(self, index: int) -> tuple[int, int]:
        """The number of the part that holds an image, and the image's index in it."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = bisect_right(self._images_before, index) - 1
        return number, index - self._images_before[number]

    def load(self, index: int) -> np.ndarray:
        """The raw image (H, W, C).

        Raises:
            UnreadableImage: it is missing or damaged.
        """
        number, own = self._place(index)
        return self.parts[number].load(own)

    def __getitem__(self, item: int | Draw) -> dict[str, Any]:
        """The sample of the part, see `ClassificationDataset`, with "task": the number of the part."""
        epoch, index = item if isinstance(item, tuple) else (0, int(item))
        number, own = self._place(index)
        sample = self.parts[number][Draw(epoch, own)]
        return sample | {
            "label": sample["label"] + self._classes_before[number],
            "index": sample["index"] + self._images_before[number],
            "task": number,
        }


def _views(part: ClassificationDataset) -> dict[str, Any] | None:
    """How a data set sees clips; None for images, and in training."""
    return getattr(part, "views_of_clips", None)


def _entries(part: ClassificationDataset) -> list[dict[str, Any]]:
    """Transforms of a data set as JSON values."""
    return [] if part.transform is None else part.transform.to_json()
