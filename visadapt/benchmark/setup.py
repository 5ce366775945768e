"""What the speed benchmark is run on."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import collect_env

from ..backbones.timm_vit import TimmViT
from ..errors import InputError
from ..optim.groups import fused_on_cpu
from ..predict.from_file import available


@dataclass(frozen=True)
class Setup:
    """What is measured.

    Attributes:
        model: timm name.
        size: image side in pixels.
        batch: images per training step.
        mixed: images, and adapters, of the mixed batch.
        rounds: measured rounds.
        device: cpu or cuda.
    """

    model: str = "vit_small_patch16_224"
    size: int = 224
    batch: int = 8
    mixed: int = 32
    rounds: int = 9
    device: str = "cpu"

    def check(self) -> None:
        """Refuse a device or a model that is not there, and images that are too small for it, before anything is timed.

        Raises:
            InputError: one of these.
        """
        available(self.device)
        patch = self.backbone().patch
        if self.size < 2 * patch:
            raise InputError(f"--size {self.size} is too small: half of it must hold a patch of {patch} pixels")

    def machine(self) -> str:
        """The GPU, or the processor with the vector units that torch found: libraries differ in how they use them."""
        if self.device == "cuda":
            return torch.cuda.get_device_name()
        named = re.search(r"^Model name:\s*(.+)$", collect_env.get_cpu_info(collect_env.run), re.MULTILINE)
        return f"{named[1] if named else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"

    def backbone(self) -> TimmViT:
        torch.manual_seed(0)
        return TimmViT(self.model).to(self.device)

    def images(self, count: int) -> Tensor:
        return torch.randn(count, 3, self.size, self.size, device=self.device)


def adamw(module: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW over what trains, with the steps that training takes."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr, **fused_on_cpu(torch.optim.AdamW, trainable))
