"""Losses on class scores, for targets that are class indices or shares of classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, one_hot

from ..errors import InputError
from ..registry import LOSSES


def check_target(target: Tensor, num_classes: int) -> None:
    """Refuse targets that do not belong to K classes, which a GPU would answer with an assertion and no value.

    Args:
        target: (B,) int64 class indices, or (B, K) shares.
        num_classes: K.

    Raises:
        InputError: an index below 0 or not below K, or another number of columns.
    """
    if target.ndim == 2:
        if target.shape[1] != num_classes:
            raise InputError(f"the target has {target.shape[1]} classes, the head has {num_classes}; set num_classes")
        return
    low, high = (int(v) for v in torch.aminmax(target))
    if low < 0 or high >= num_classes:
        raise InputError(
            f"label {low if low < 0 else high} does not fit the head's {num_classes} classes (0 to {num_classes - 1}); "
            "set num_classes or mend the labels"
        )


def as_shares(target: Tensor, num_classes: int) -> Tensor:
    """(B,) class indices as float32 one-hot rows (B, K); shares pass through.

    Raises:
        InputError: the target does not fit K classes.
    """
    check_target(target, num_classes)
    return target if target.ndim == 2 else one_hot(target, num_classes).float()


def _check_share(name: str, what: str, value: float) -> None:
    if not 0 <= value < 1:
        raise InputError(f"{name}: {what} must be in [0, 1), got {value}")


@LOSSES.register_module()
class CrossEntropy(nn.Module):
    """Softmax cross entropy, mean over the batch.

    Args:
        label_smoothing: share of each target that is spread evenly over all classes.

    Raises:
        InputError: a share out of range.
    """

    def __init__(self, label_smoothing: float = 0.0):
        super().__init__()
        _check_share("CrossEntropy", "label_smoothing", label_smoothing)
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """logits (B, K), target (B,) int64 or (B, K) shares, to a scalar."""
        check_target(target, logits.shape[1])
        return cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing)


@LOSSES.register_module()
class FocalLoss(nn.Module):
    """Softmax focal loss (Lin et al. 2017): -sum_k t_k alpha_k (1 - p_k)^gamma log p_k, mean over the batch.

    Args:
        gamma: how strongly samples that are already right are played down; 0 is cross entropy.
        alpha: one weight per class; None weighs all alike.

    Raises:
        InputError: a negative gamma or weight; in use, as many weights as there are classes are needed.
    """

    def __init__(self, gamma: float = 2.0, alpha: Sequence[float] | None = None):
        super().__init__()
        if gamma < 0:
            raise InputError(f"FocalLoss: gamma must be 0 or more, got {gamma}")
        if alpha is not None and (len(alpha) == 0 or min(alpha) < 0):
            raise InputError(f"FocalLoss: alpha is one weight of 0 or more per class, got {list(alpha)}")
        self.gamma = gamma
        self.register_buffer("alpha", None if alpha is None else torch.tensor(alpha, dtype=torch.float32), False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """logits (B, K), target (B,) int64 or (B, K) shares, to a scalar."""
        if self.alpha is not None and len(self.alpha) != logits.shape[1]:
            raise InputError(f"FocalLoss: alpha has {len(self.alpha)} weights for {logits.shape[1]} classes")
        log_p = log_softmax(logits.float(), dim=1)
        terms = as_shares(target, logits.shape[1]) * -log_p
        if self.gamma:
            # 1 - p rounds to 0 for a sure prediction, where the slope of a power below 1 is infinite
            terms = terms * (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny) ** self.gamma
        return (terms if self.alpha is None else terms * self.alpha).sum(1).mean()


@LOSSES.register_module()
class BCE(nn.Module):
    """Binary cross entropy of each class against the rest, mean over batch and classes.

    Args:
        smoothing: share of a class index that is spread evenly over all classes; targets that are shares already stay
            as they are.

    Raises:
        InputError: a share out of range.
    """

    def __init__(self, smoothing: float = 0.0):
        super().__init__()
        _check_share("BCE", "smoothing", smoothing)
        self.loss = BinaryCrossEntropy(smoothing=smoothing)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """logits (B, K), target (B,) int64 or (B, K) shares, to a scalar."""
        check_target(target, logits.shape[1])
        return self.loss(logits.float(), target)
