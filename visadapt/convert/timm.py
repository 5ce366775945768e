"""timm's own layout, which also DeiT, MAE and AugReg checkpoints have."""

from __future__ import annotations

from torch import nn

from .keymap import KeyMap, State


def matches(state: State) -> bool:
    return "patch_embed.proj.weight" in state and any(k.startswith("blocks.0.") for k in state)


def apply(state: State, model: nn.Module) -> tuple[State, list[str]]:
    return dict(state), []


MAP = KeyMap("timm", "patch_embed.proj.weight, blocks.0.norm1.weight", matches, apply)
