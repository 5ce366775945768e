"""timm's own layouts, which also DeiT, MAE and AugReg checkpoints have, and torchvision's of ResNets."""

from __future__ import annotations

from torch import nn

from .keymap import KeyMap, State

FAMILIES = {
    "blocks.0.": ("patch_embed.proj.weight",),
    "layer1.0.": ("conv1.weight", "conv1.0.weight"),
    "stages.0.blocks.0.": ("stem.0.weight",),
}
"""How names in the first block begin, and one of which names must be there as well."""


def matches(state: State) -> bool:
    return any(
        any(k in state for k in first) and any(k.startswith(block) for k in state) for block, first in FAMILIES.items()
    )


def apply(state: State, model: nn.Module) -> tuple[State, list[str]]:
    return dict(state), []


MAP = KeyMap("timm", "patch_embed.proj.weight, blocks.0.norm1.weight", matches, apply)
