"""Heads that turn one feature vector per image into class scores."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from ..errors import InputError
from ..registry import HEADS


def _check(name: str, **sizes: int) -> None:
    for what, size in sizes.items():
        if size < 1:
            raise InputError(f"{name}: {what} must be 1 or more, got {size}")


def _check_dropout(name: str, dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise InputError(f"{name}: dropout must be in [0, 1), got {dropout}")


def _dense(in_dim: int, out_dim: int) -> nn.Linear:
    """A linear layer that starts near zero, so that the first scores are nearly equal."""
    layer = nn.Linear(in_dim, out_dim)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


@HEADS.register_module()
class LinearHead(nn.Module):
    """Dropout and one linear layer.

    Args:
        num_classes: K.
        in_dim: width of the features.
        dropout: share of features set to zero in training.

    Raises:
        InputError: a size or share out of range.
    """

    def __init__(self, num_classes: int, in_dim: int, dropout: float = 0.0):
        super().__init__()
        _check("LinearHead", num_classes=num_classes, in_dim=in_dim)
        _check_dropout("LinearHead", dropout)
        self.num_classes, self.in_dim, self.dropout = num_classes, in_dim, dropout
        self.drop = nn.Dropout(dropout)
        self.fc = _dense(in_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim) to logits (B, num_classes)."""
        return self.fc(self.drop(x))


@HEADS.register_module()
class MLPHead(nn.Module):
    """Linear, GELU, dropout, linear.

    Args:
        num_classes: K.
        in_dim: width of the features.
        hidden: width between the two layers.
        dropout: share of hidden values set to zero in training.

    Raises:
        InputError: a size or share out of range.
    """

    def __init__(self, num_classes: int, in_dim: int, hidden: int = 512, dropout: float = 0.0):
        super().__init__()
        _check("MLPHead", num_classes=num_classes, in_dim=in_dim, hidden=hidden)
        _check_dropout("MLPHead", dropout)
        self.num_classes, self.in_dim, self.hidden, self.dropout = num_classes, in_dim, hidden, dropout
        self.fc1 = _dense(in_dim, hidden)
        self.act = nn.GELU()
        self.drop = nn.Dropout(dropout)
        self.fc2 = _dense(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim) to logits (B, num_classes)."""
        return self.fc2(self.drop(self.act(self.fc1(x))))


@HEADS.register_module()
class CosineHead(nn.Module):
    """Scaled cosine between features and one prototype per class: the length of a feature does not matter.

    Args:
        num_classes: K.
        in_dim: width of the features.
        scale: factor that the cosine in [-1, 1] is multiplied by.
        learn_scale: train the scale too.

    Raises:
        InputError: a size out of range, or a scale that is not above 0.
    """

    def __init__(self, num_classes: int, in_dim: int, scale: float = 20.0, learn_scale: bool = True):
        super().__init__()
        _check("CosineHead", num_classes=num_classes, in_dim=in_dim)
        if not scale > 0:
            raise InputError(f"CosineHead: scale must be above 0, got {scale}")
        self.num_classes, self.in_dim, self.scale, self.learn_scale = num_classes, in_dim, scale, learn_scale
        self.weight = nn.Parameter(torch.empty(num_classes, in_dim))
        nn.init.trunc_normal_(self.weight, std=0.02)
        # the logarithm keeps the scale positive
        log_scale = torch.tensor(float(scale)).log()
        if learn_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim) to logits (B, num_classes)."""
        return self.log_scale.exp() * linear(normalize(x, dim=-1), normalize(self.weight, dim=-1))
