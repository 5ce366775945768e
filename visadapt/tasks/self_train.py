"""Segmentation of a domain without labels: a student learns from labelled images and from its own slow average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import InputError
from ..registry import TASKS
from .base import Normalize
from .segment import Segmenter, stacked


@TASKS.register_module()
class SelfTraining(Segmenter):
    """Segmenter that adapts from a labelled source domain to the images of a target domain.

    Every batch has labelled source images and as many target images (data set `SourceTarget`). The loss on the source
    is always there. After batch `start`, `weight` times the loss on mixed images joins it: half of the label values of
    each source image are drawn, their pixels are pasted over a target image, and the rest is labelled with the classes
    that a teacher sees in the target image. Target labels are never used.

    The teacher is the moving average of what trains; the frozen backbone is there once for both. After batch i, counted
    from 0 (also where several make one step), it keeps the share min(1 - 1 / (i + 1), momentum) of its values. It runs
    in eval mode and with the student's buffers: running statistics of batch norms are averages already, and ranks or
    places that an adapter keeps belong to the student's values. Its values and the count of batches are in checkpoints.

    Evaluation and adapter files take the student, and the latter name `Segmenter` as their task.

    This is DACS (Tranheden et al., 2021, arXiv 2007.08702) without colour changes, blur and confidence weights, as
    Earth-Adapter (arXiv 2504.06220) is trained. The loss of the adapters themselves counts once. Gradient checkpointing
    is not offered: both batches pass before the one backward pass, and blocks of the first that run again in it would
    find what adapters computed of the second.

    Args:
        backbone: see Segmenter, as are the five below.
        head: config of a head for maps.
        neck: config of a neck.
        adapters: configs by adapter name.
        loss: config of a loss, for heads that have none of their own.
        base_mode: "eval" or "train".
        weight: of the loss on mixed images.
        start: number, counted from 0, of the last batch without mixed images; a shorter run sees none.
        momentum: the largest share of its values that the teacher keeps from one batch to the next.

    Raises:
        InputError: as Segmenter, or a weight, start or momentum out of range.
    """

    def __init__(
        self,
        backbone: dict,
        head: dict,
        neck: dict | None = None,
        adapters: dict[str, dict] | None = None,
        loss: dict | None = None,
        base_mode: str = "eval",
        weight: float = 0.5,
        start: int = 4000,
        momentum: float = 0.99,
    ) -> None:
        if not weight > 0 or start < 0 or not 0 <= momentum < 1:
            raise InputError(
                "SelfTraining: weight must be above 0, start 0 or more and momentum in [0, 1), got "
                f"{weight}, {start} and {momentum}"
            )
        super().__init__(backbone, head, neck, adapters, loss, base_mode)
        self.weight, self.start, self.momentum = weight, start, momentum
        built = self.adapted.backbone
        self.data_preprocessor = NormalizeBoth(built.mean, built.std)
        self.teacher = Average(self._student())
        self.register_buffer("batches", torch.tensor(0))

    def card(self) -> dict[str, Any]:
        return {"task": super().card()["task"] | {"type": "Segmenter"}}

    def _student(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    def forward(
        self,
        inputs: Tensor,
        masks: list[Tensor] | None = None,
        mode: str = "tensor",
        target: Tensor | None = None,
        **about: Any,
    ) -> Tensor | dict[str, Tensor] | list[dict[str, Any]]:
        """See Segmenter. `target` (B, C, H, W) are normalised images of the target domain, for mode "loss" in training.

        In eval mode "loss" is that of the source alone, and the teacher stays as it is.
        """
        if mode == "loss" and self.training:
            return self.adapt(inputs, masks, target)
        return super().forward(inputs, masks, mode, **about)

    def adapt(self, inputs: Tensor, masks: list[Tensor] | None, target: Tensor | None) -> dict[str, Tensor]:
        """Losses of one training batch; first the teacher follows what the batch before has changed.

        Returns:
            Those of the source by their names, and those of the mixed images, weighted, as "mixed_<name>".

        Raises:
            InputError: source images without masks, target images missing or of another size or number than the source
                images, or what trains is not what trained when the task was built.
        """
        check_batch(inputs, masks, target)
        number = int(self.batches)
        self.teacher.follow(self._student(), min(1 - 1 / max(number, 1), self.momentum))
        source = stacked(masks, inputs)
        losses = self.mask_losses(inputs, source) | self.adapted.losses()
        if number > self.start:
            images, labels = class_mix(inputs, source, target, self.pseudo_labels(target))
            losses |= {f"mixed_{n}": self.weight * v for n, v in self.mask_losses(images, labels).items()}
        self.batches.add_(1)
        return losses

    @torch.no_grad()
    def pseudo_labels(self, images: Tensor) -> Tensor:
        """The teacher's best class at every pixel: normalised images (B, C, H, W) to (B, H, W) int64."""
        with evaluating(self):
            return functional_call(self, self.teacher.values(), (images,)).argmax(1)


class NormalizeBoth(Normalize):
    """Also normalises the images under "target"."""

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        data = super().forward(data, training)
        if "target" in data:
            data["target"] = self.normalize(data["target"])
        return data


class Average(nn.Module):
    """Moving average of parameters, as buffers.

    Args:
        parameters: by name; their values are the first average.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.keys = {name: name.replace(".", "/") for name in parameters}  # a buffer's name may have no dots
        for name, parameter in parameters.items():
            self.register_buffer(self.keys[name], parameter.detach().clone())

    def values(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(key) for name, key in self.keys.items()}

    @torch.no_grad()
    def follow(self, parameters: dict[str, nn.Parameter], kept: float) -> None:
        """average = kept * average + (1 - kept) * parameter.

        Raises:
            InputError: other parameters than at first.
        """
        values = self.values()
        changed = sorted(set(values) ^ set(parameters))
        changed = changed or [n for n in values if values[n].shape != parameters[n].shape]
        if changed:
            raise InputError(
                f"SelfTraining: {len(changed)} trained tensors came, went or changed shape since the task was built, "
                f"first {changed[0]}; its teacher needs adapters that keep their tensors"
            )
        for name, value in values.items():
            value.lerp_(parameters[name].detach(), 1 - kept)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, and behind it for every module the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_batch(inputs: Tensor, masks: list[Tensor] | None, target: Tensor | None) -> None:
    """Refuse a training batch that is no pair of labelled source and target images."""
    if masks is None or any(m is None for m in masks):
        raise InputError("SelfTraining: the source images have no masks; only those of the target go without")
    if target is None:
        raise InputError(
            "SelfTraining: batches have no target images; train with dataset=dict(type=SourceTarget, source=..., "
            "target=...) and collate_fn=dict(type=collate_source_target)"
        )
    if target.shape != inputs.shape:
        raise InputError(
            f"SelfTraining: target images are {list(target.shape)}, source images {list(inputs.shape)} (number, bands, "
            "height, width); end the transforms of both data sets with a crop or resize to one size"
        )


def class_mix(images: Tensor, masks: Tensor, target: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Half of the label values of each source image, rounded up, pasted over a target image (ClassMix, DACS).

    The value of ignored pixels counts as any other. The draw is uniform, without replacement, from PyTorch's generator
    of the CPU.

    Args:
        images: source, (B, C, H, W).
        masks: of the source, (B, H, W) int64.
        target: (B, C, H, W).
        labels: of the target, (B, H, W) int64.

    Returns:
        New tensors, mixed images (B, C, H, W) and masks (B, H, W).
    """
    pasted = []
    for mask in masks:
        values = mask.unique()
        drawn = torch.randperm(len(values))[: (len(values) + 1) // 2].to(mask.device)
        pasted.append(torch.isin(mask, values[drawn]))
    pasted = torch.stack(pasted)
    return torch.where(pasted[:, None], images, target), torch.where(pasted, masks, labels)
