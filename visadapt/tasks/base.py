"""What all tasks share: an adapted backbone, and images made ready for it."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.model import BaseDataPreprocessor, BaseModel
from torch import Tensor, nn

from ..core.adapted import Adapted
from ..errors import InputError
from ..registry import ADAPTERS, BACKBONES


class Normalize(BaseDataPreprocessor):
    """Move a batch to the device and normalise its images band by band.

    Args:
        mean: per band, on the scale of the images.
        std: likewise.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        data = dict(self.cast_data(data))
        if "inputs" in data:
            data["inputs"] = self.normalize(data["inputs"])
        return data

    def normalize(self, images: Tensor) -> Tensor:
        """(..., C, H, W) of any number type to float32 with mean 0 and deviation 1 per band.

        Raises:
            InputError: no tensor, or another number of bands than there are statistics for.
        """
        if not isinstance(images, Tensor):
            raise InputError(
                "the inputs of a batch are no tensor; give the loader a collate_fn: dict(type=collate) for images, "
                "collate_clips for clips, collate_masks for images with masks"
            )
        if images.shape[-3] != self.mean.shape[1]:
            raise InputError(
                f"images have {images.shape[-3]} bands, the backbone takes {self.mean.shape[1]}; see in_chans"
            )
        return (images.float() - self.mean) / self.std


class AdaptedTask(BaseModel):
    """A frozen backbone with adapters; subclasses add what makes a prediction of its features.

    Args:
        backbone: config of a backbone.
        adapters: configs by adapter name; the frozen backbone alone where None.
        base_mode: "eval", or "train" for recipes with stochastic depth in the backbone.
        checkpointing: recompute block activations in the backward pass instead of keeping them.

    Attributes:
        head: what makes a prediction of the features.
    """

    head: nn.Module

    def __init__(
        self, backbone: dict, adapters: dict[str, dict] | None, base_mode: str = "eval", checkpointing: bool = False
    ) -> None:
        built = BACKBONES.build(backbone)
        super().__init__(data_preprocessor=Normalize(built.mean, built.std))
        self.adapted = Adapted(built, base_mode)
        if checkpointing:
            built.body.set_grad_checkpointing(True)
        for name, cfg in (adapters or {}).items():
            self.adapted.add(name, ADAPTERS.build(cfg))

    @property
    def heads(self) -> dict[str, nn.Module]:
        """Heads by their names in an adapter file."""
        return {"main": self.head}

    def card(self) -> dict[str, Any]:
        """What an adapter file must say to rebuild this task."""
        raise NotImplementedError
