"""MixUp and CutMix on a whole batch.

torchvision's versions draw from torch's global generator, whose state a checkpoint keeps; timm's draw from numpy's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2

from ..errors import InputError
from ..losses.classify import as_shares
from ..registry import TRANSFORMS


@TRANSFORMS.register_module()
class BatchMix:
    """Mix each image of a batch with its neighbour, and the labels in the same proportion.

    Where both are given, each batch is either mixed up or cut and mixed, with equal chances.

    Args:
        mixup: alpha of MixUp's Beta distribution; 0 leaves it out.
        cutmix: alpha of CutMix's Beta distribution; 0 leaves it out.
        prob: chance that a batch is mixed at all.
    """

    def __init__(self, mixup: float = 0.0, cutmix: float = 0.0, prob: float = 1.0):
        if mixup < 0 or cutmix < 0 or mixup == cutmix == 0:
            raise InputError(
                f"BatchMix: mixup and cutmix must be 0 or more and one of them above 0, got {mixup}, {cutmix}"
            )
        if not 0 < prob <= 1:
            raise InputError(f"BatchMix: prob must be in (0, 1], got {prob}")
        self.mixup, self.cutmix, self.prob = mixup, cutmix, prob
        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        self._mixes = [mix(alpha=float(alpha)) for mix, alpha in kinds if alpha > 0]

    def __call__(
        self, inputs: Tensor, labels: Tensor, num_classes: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mix one batch.

        Args:
            inputs: (B, C, H, W) float, that is after normalisation.
            labels: (B,) int64.
            num_classes: K.
            generator: a CPU generator to draw from; None draws from torch's global one.

        Returns:
            inputs (B, C, H, W), and targets (B, K) whose rows sum to 1.

        Raises:
            InputError: a label is none of the K classes.
        """
        targets = as_shares(labels, num_classes)
        if generator is None:
            return self._mix(inputs, targets)
        with torch.random.fork_rng(devices=[]):  # torchvision takes no generator
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            return self._mix(inputs, targets)

    def _mix(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if torch.rand(()) >= self.prob:
            return inputs, targets
        return self._mixes[int(torch.randint(len(self._mixes), ()))](inputs, targets)
