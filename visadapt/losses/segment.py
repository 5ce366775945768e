"""Losses on class scores per pixel; pixels of the value 255 in the masks take no part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from ..errors import InputError
from ..ignored import IGNORED
from ..registry import LOSSES


def find_labelled(masks: Tensor, num_classes: int) -> Tensor:
    """Which pixels have a class.

    Values on a GPU are waited for once per call; without that a wrong label ends in an assertion of the driver, and a
    mean over no pixel in NaN.

    Args:
        masks: (B, H, W) int64.
        num_classes: K.

    Returns:
        (B, H, W) bool.

    Raises:
        InputError: a value that is neither 0 to K-1 nor 255, or no labelled pixel at all.
    """
    labelled = masks != IGNORED
    foreign = labelled & ((masks < 0) | (masks >= num_classes))
    any_labelled, any_foreign = torch.stack([labelled.any(), foreign.any()]).tolist()
    if any_foreign:
        raise InputError(
            f"a mask holds {int(masks[foreign][0])}, the head has the classes 0 to {num_classes - 1} ({IGNORED} is "
            "ignored); set num_classes or mend the masks"
        )
    if not any_labelled:
        raise InputError(
            f"no pixel of a batch of {len(masks)} masks is labelled (all are {IGNORED}), so there is no mean; leave "
            "out images without labels, or take larger crops or batches"
        )
    return labelled


def check_weights(name: str, what: str, weights: Sequence[float] | None) -> Tensor | None:
    """One weight above 0 per class as a float32 tensor.

    Raises:
        InputError: none, or one that is not above 0.
    """
    if weights is None:
        return None
    if len(weights) == 0 or not min(weights) > 0:
        raise InputError(f"{name}: {what} is one weight above 0 per class, got {list(weights)}")
    return torch.tensor(weights, dtype=torch.float32)


def check_count(name: str, what: str, weights: Tensor | None, num_classes: int) -> None:
    """Refuse another number of weights than there are classes."""
    if weights is not None and len(weights) != num_classes:
        raise InputError(f"{name}: {what} has {len(weights)} weights for {num_classes} classes")


class PixelLoss(nn.Module, ABC):
    """Brings scores to the size of the masks; subclasses say what is measured there."""

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Mean over the labelled pixels of a batch.

        Args:
            logits: (B, K, h, w); they are resized bilinearly (align_corners=False) in float32 to the masks.
            masks: (B, H, W) int64 class indices, 255 where there is none.

        Returns:
            A scalar, float32.

        Raises:
            InputError: other shapes, a value that is no class, or no labelled pixel in the batch.
        """
        if logits.ndim != 4 or masks.ndim != 3 or len(logits) != len(masks):
            raise InputError(
                f"{type(self).__name__} takes logits (B, K, h, w) and masks (B, H, W), got {tuple(logits.shape)} and "
                f"{tuple(masks.shape)}"
            )
        labelled = find_labelled(masks, logits.shape[1])
        logits = logits.float()
        if logits.shape[2:] != masks.shape[1:]:
            logits = interpolate(logits, masks.shape[1:], mode="bilinear", align_corners=False)
        return self.measure(logits, masks, labelled)

    @abstractmethod
    def measure(self, logits: Tensor, masks: Tensor, labelled: Tensor) -> Tensor:
        """A scalar of logits (B, K, H, W) float32, masks (B, H, W) and labelled (B, H, W) bool, one pixel at least."""


@LOSSES.register_module()
class PixelCrossEntropy(PixelLoss):
    """Softmax cross entropy, mean over the labelled pixels of the batch.

    Args:
        class_weights: one weight per class; the mean is then weighted by those of the pixels' classes. None weighs all
            alike.
        label_smoothing: share of each target that is spread evenly over all classes.

    Raises:
        InputError: a weight that is not above 0, or a share out of range; in use, as many weights as there are classes
            are needed.
    """

    def __init__(self, class_weights: Sequence[float] | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise InputError(f"PixelCrossEntropy: label_smoothing must be in [0, 1), got {label_smoothing}")
        weights = check_weights("PixelCrossEntropy", "class_weights", class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        self.label_smoothing = label_smoothing

    def measure(self, logits: Tensor, masks: Tensor, labelled: Tensor) -> Tensor:
        check_count("PixelCrossEntropy", "class_weights", self.class_weights, logits.shape[1])
        options = {"ignore_index": IGNORED, "label_smoothing": self.label_smoothing}
        return cross_entropy(logits, masks, self.class_weights, **options)


@LOSSES.register_module()
class PixelFocal(PixelLoss):
    """Softmax focal loss (Lin et al. 2017): -alpha_t (1 - p_t)^gamma log p_t, mean over the labelled pixels.

    With two classes and alpha=[1 - a, a] it is the sigmoid focal loss of weight a on the difference of the two logits.

    Args:
        gamma: how strongly pixels that are already right are played down; 0 is cross entropy.
        alpha: one weight per class; None weighs all alike. The mean is not divided by them.

    Raises:
        InputError: a negative gamma, a weight that is not above 0; in use, as many weights as there are classes are
            needed.
    """

    def __init__(self, gamma: float = 2.0, alpha: Sequence[float] | None = None) -> None:
        super().__init__()
        if not gamma >= 0:
            raise InputError(f"PixelFocal: gamma must be 0 or more, got {gamma}")
        self.gamma = gamma
        self.register_buffer("alpha", check_weights("PixelFocal", "alpha", alpha), persistent=False)

    def measure(self, logits: Tensor, masks: Tensor, labelled: Tensor) -> Tensor:
        check_count("PixelFocal", "alpha", self.alpha, logits.shape[1])
        terms = surprise = cross_entropy(logits, masks, ignore_index=IGNORED, reduction="none")  # 0 where ignored
        if self.gamma:
            # 1 - p rounds to 0 for a sure prediction, where the slope of a power below 1 is infinite
            terms = terms * (-torch.expm1(-surprise)).clamp_min(torch.finfo(terms.dtype).tiny) ** self.gamma
        if self.alpha is not None:
            terms = terms * self.alpha[masks.where(labelled, 0)]
        return terms.sum() / labelled.sum()


@LOSSES.register_module()
class Dice(PixelLoss):
    """1 - 2 sum(p t) / (sum(p) + sum(t)) of softmax scores p and one-hot labels t (Milletari et al. 2016, their sums
    without squares), over the labelled pixels of each image, mean over the images and classes.

    A class that an image lacks is left out of its mean: the fraction is 0 there whatever the scores. Its scores count
    all the same, as they are missing at the classes that do occur.

    Args:
        classes: indices of the classes that are measured, e.g. [1] for the foreground of two; None takes all.

    Raises:
        InputError: no class, a negative or repeated one; in use, one that the scores do not have.
    """

    def __init__(self, classes: Sequence[int] | None = None) -> None:
        super().__init__()
        if classes is not None and (not classes or min(classes) < 0 or len(set(classes)) < len(classes)):
            raise InputError(f"Dice: classes are indices from 0 on, each once, got {list(classes)}")
        self.classes = None if classes is None else list(classes)

    def measure(self, logits: Tensor, masks: Tensor, labelled: Tensor) -> Tensor:
        count = logits.shape[1]
        if self.classes is not None and max(self.classes) >= count:
            raise InputError(f"Dice: there is no class {max(self.classes)}, the scores have {count} (0 to {count - 1})")
        p = logits.softmax(1) * labelled[:, None]
        t = masks[:, None] == torch.arange(count, device=masks.device).view(-1, 1, 1)  # an eighth of one_hot's memory
        overlap, predicted, true = (v.sum((2, 3)) for v in (p * t, p, t))
        loss, present = 1 - 2 * overlap / (predicted + true).clamp_min(1e-6), true > 0
        if self.classes is not None:
            loss, present = loss[:, self.classes], present[:, self.classes]
        return (loss * present).sum() / present.sum().clamp_min(1)


@LOSSES.register_module()
class Combined(PixelLoss):
    """Weighted sum of losses on pixels, e.g. 0.2 PixelFocal + 0.8 Dice as MapSAM (arXiv 2411.06971) trains.

    Args:
        losses: config of each.
        weights: one factor above 0 for each.

    Raises:
        InputError: no losses, another number of weights, or a loss that is none on pixels.
    """

    def __init__(self, losses: list[dict[str, Any]], weights: list[float]) -> None:
        super().__init__()
        if not losses or len(losses) != len(weights) or not min(weights) > 0:
            raise InputError(
                f"Combined: each loss needs one weight above 0, got {len(losses)} losses and the weights {weights}"
            )
        self.losses, self.weights = nn.ModuleList(LOSSES.build(cfg) for cfg in losses), list(weights)
        if alien := next((loss for loss in self.losses if not isinstance(loss, PixelLoss)), None):
            raise InputError(f"Combined: {type(alien).__name__} is no loss on pixels; take PixelCrossEntropy or Dice")

    def measure(self, logits: Tensor, masks: Tensor, labelled: Tensor) -> Tensor:
        parts = [w * loss.measure(logits, masks, labelled) for loss, w in zip(self.losses, self.weights)]
        return torch.stack(parts).sum()
