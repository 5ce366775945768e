"""Losses for images with any number of classes each."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ..errors import InputError
from ..registry import LOSSES


@LOSSES.register_module()
class MultilabelBCE(nn.Module):
    """Binary cross entropy of each class by itself, mean over batch and classes, for multi-hot labels.

    PyTorch calls the same figure MultiLabelSoftMarginLoss.
    """

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """logits (B, K), target (B, K) of 0 and 1, to a scalar.

        Raises:
            InputError: class indices, or another number of classes.
        """
        if target.shape != logits.shape:
            indices = "; these are class indices, for which there is BCE" if target.ndim == 1 else "; set num_classes"
            raise InputError(
                f"MultilabelBCE: the head gives {tuple(logits.shape)} scores, the labels are {tuple(target.shape)}"
                f"{indices}"
            )
        return binary_cross_entropy_with_logits(logits.float(), target.float())
