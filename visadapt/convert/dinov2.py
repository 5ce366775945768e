"""Official DINOv2 checkpoints (facebookresearch/dinov2), with and without registers, released or from training."""

from __future__ import annotations

import re

from torch import nn

from .keymap import KeyMap, State, timm_keys

TRAINING_HEADS = ("dino_head.", "ibot_head.")


def matches(state: State) -> bool:
    known = "mask_token" in state or "register_tokens" in state
    return known and "patch_embed.proj.weight" in state and any(".ls1.gamma" in k for k in state)


def apply(state: State, model: nn.Module) -> tuple[State, list[str]]:
    """Registers become `reg_token`; the class token takes its position, which timm's register models do not add."""
    dropped = [k for k in state if k == "mask_token" or k.startswith(TRAINING_HEADS)]
    # FSDP training stores blocks.<chunk>.<block>, where <block> counts through all chunks
    kept = {re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", k): v for k, v in state.items() if k not in dropped}
    kept["mask_token"] = state["pos_embed"]  # timm knows DINOv2 by this key and throws its value away
    return timm_keys(kept, "patch_embed.proj.weight", model), dropped


MAP = KeyMap("dinov2", "mask_token, blocks.0.ls1.gamma", matches, apply)
