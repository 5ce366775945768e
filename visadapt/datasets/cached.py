"""Features that were computed once and are trained on from then on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from ..registry import DATASETS
from .base import Draw


@DATASETS.register_module()
class FeatureDataset(Dataset):
    """Samples with "features" in place of "inputs".

    Args:
        features: (N, D) pooled vectors, or (N, L, D) tokens that enter a block of the backbone; any float type.
        labels: (N,) class indices.
        paths: N image paths, for reports.
        classes: class names in order; None takes the numbers up to the highest label.

    Attributes:
        size: height and width of the images that they were made from, None where that is not known.

    Raises:
        InputError: the lengths differ, or a label is no class.
    """

    size: tuple[int, int] | None = None

    def __init__(
        self,
        features: Tensor,
        labels: Sequence[int] | Tensor,
        paths: Sequence[str],
        classes: Sequence[str] | None = None,
    ):
        labels = torch.as_tensor(labels)
        if features.ndim not in (2, 3) or not 0 < len(features) == len(labels) == len(paths):
            raise InputError(
                f"FeatureDataset: features {tuple(features.shape)}, {len(labels)} labels and {len(paths)} paths do not "
                "belong together; give (N, D) or (N, L, D), N and N"
            )
        classes = [str(i) for i in range(int(labels.max()) + 1)] if classes is None else classes
        wrong = labels[(labels < 0) | (labels >= len(classes))]
        if len(wrong):
            raise InputError(f"FeatureDataset: label {int(wrong[0])} is none of the {len(classes)} classes")
        self.features = features
        self.labels = labels.tolist()  # numbers, or lists of 0 and 1
        self.paths = list(paths)
        self.classes = tuple(classes)
        self.metainfo = {"classes": self.classes}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int | Draw) -> dict[str, Any]:
        """One sample; features are the same in every epoch."""
        index = item.index if isinstance(item, Draw) else int(item)
        return {
            "features": self.features[index],
            "label": self.labels[index],
            "index": index,
            "path": self.paths[index],
            "valid": True,
            "unreadable": "",
        }
