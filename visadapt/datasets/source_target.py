"""Labelled images of one domain, each with an image of another."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from ..errors import InputError
from ..registry import DATASETS
from .base import Draw, ImageDataset, draw_seed, stack
from .masks import SegmentationDataset, collate_masks


@DATASETS.register_module()
class SourceTarget(Dataset):
    """The samples of a source, each with an image of the target that is drawn anew in every epoch; see `SelfTraining`.

    An epoch is one pass over the source. The draw is uniform and depends on (seed, epoch, index) alone, and with the
    target's own seed so does its augmentation. Of the target nothing but images is handed on.

    Args:
        source: config of a segmentation data set.
        target: config of a data set of images, with masks or without.
        seed: of the draw.

    Attributes:
        classes: of the source, as are `metainfo`, `transform`, `channels` and `unit`.

    Raises:
        InputError: the source has no masks, the target no images, their bands differ, one is not for training, or a
            transform of the target looks at masks.
    """

    def __init__(self, source: dict, target: dict, seed: int = 0) -> None:
        self.source, self.target, self.seed = DATASETS.build(source), DATASETS.build(target), seed
        self._check()
        self.classes, self.metainfo = self.source.classes, self.source.metainfo
        self.transform, self.channels, self.unit = self.source.transform, self.source.channels, self.source.unit

    def _check(self) -> None:
        if self.seed < 0:
            raise InputError(f"SourceTarget: seed must be 0 or more, got {self.seed}")
        if not isinstance(self.source, SegmentationDataset):
            raise InputError(f"SourceTarget: source ({type(self.source).__name__}) is no data set with masks")
        if not isinstance(self.target, ImageDataset):
            raise InputError(f"SourceTarget: target ({type(self.target).__name__}) is no data set of images")
        for name, part in (("source", self.source), ("target", self.target)):
            if not part.training:
                raise InputError(f"SourceTarget: give {name} training=True, so that unreadable images are replaced")
        if self.source.channels != self.target.channels:
            raise InputError(
                f"SourceTarget: source has {self.source.channels} bands, target {self.target.channels}; they must agree"
            )
        if self.target.transform is not None and "BalancedCrop" in self.target.transform.names:
            raise InputError(
                "SourceTarget: BalancedCrop looks at the masks of the target, which are not to be used; take RandomCrop"
            )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: int | Draw) -> dict[str, Any]:
        """The source's sample, and as "target" the "inputs" (C, H, W), "path" and "unreadable" of the other image.

        Args:
            item: an index, which means epoch 0, or a Draw.
        """
        epoch, index = item if isinstance(item, tuple) else (0, int(item))
        sample = self.source[Draw(epoch, index)]
        index %= len(self)
        drawn = draw_seed(self.seed, epoch, index) % len(self.target)
        other = self.target[Draw(epoch * len(self) + index, drawn)]  # drawn twice in an epoch, it looks different
        return sample | {"target": {key: other[key] for key in ("inputs", "path", "unreadable")}}


def collate_source_target(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The batch of `collate_masks`, with "target" (B, C, H, W) and the target's unreadable images among the others.

    Raises:
        InputError: images of different size within one of the domains.
    """
    batch, others = collate_masks(samples), [s["target"] for s in samples]
    unreadable = [o["unreadable"] for o in others if o["unreadable"]]
    return batch | {"target": stack(others), "unreadable": batch["unreadable"] + unreadable}
