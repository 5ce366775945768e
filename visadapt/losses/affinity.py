"""Distillation by how alike the places of an image are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..registry import LOSSES


def affinity(features: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H W, H W): the cosine of the feature vectors of every two positions."""
    with torch.autocast(features.device.type, enabled=False):  # half precision errs as much as maps differ
        vectors = F.normalize(features.float().flatten(2), dim=1)
        return vectors.mT @ vectors


@LOSSES.register_module()
class SpatialAffinity(nn.Module):
    """Mean over levels of mean |A(teacher) - A(student)|, with A = F^T F of vectors of length 1 per position.

    After the distillation of DSCLoRA (Yaozzz666/DSCF-SR), whose training code is not published: that second-order
    features of a teacher guide the student is theirs; cosines, the absolute difference and the mean are our design. It
    is meant to be added, with weight 1, to the L1 distance of the images. Teacher and student may differ in channels.
    Memory is about three times (H W)^2 values per image and level, so train on patches: 64 x 64 pixels take 200 MiB.
    """

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Feature maps (B, C, H, W) per level, shallow to deep, to a scalar; the teacher's get no gradient.

        Raises:
            InputError: no lists, no levels, another number of them, or maps of other sizes.
        """
        if not all(isinstance(maps, list | tuple) for maps in (student, teacher)):
            raise InputError(
                "SpatialAffinity compares lists of feature maps of student and teacher; it is no loss of class scores"
            )
        ours, theirs = ([(len(m), *m.shape[2:]) for m in maps] for maps in (student, teacher))
        if not ours or ours != theirs:
            raise InputError(f"SpatialAffinity: the student has maps (B, H, W) {ours}, the teacher {theirs}")
        pairs = zip(student, teacher)
        return sum((affinity(t.detach()) - affinity(s)).abs().mean() for s, t in pairs) / len(ours)
