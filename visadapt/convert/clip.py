"""Image towers of OpenAI CLIP and open_clip, alone or inside the whole model."""

from __future__ import annotations

from timm.layers import QuickGELU
from torch import nn

from ..errors import InputError
from .keymap import KeyMap, State, timm_keys
from .zeroi2v import is_own

PATCHES = {"class_embedding": "conv1.weight", "trunk.blocks.0.norm1.weight": "trunk.patch_embed.proj.weight"}
OPENAI = {"input_resolution", "context_length", "vocab_size"}  # numbers that only OpenAI's own files carry


def _mark(state: State) -> tuple[str, str] | None:
    """("visual." or "", the key by which the tower is known), None for another layout."""
    found = [(p, m) for p in ("visual.", "") for m in PATCHES if p + m in state and p + PATCHES[m] in state]
    return found[0] if found else None


def matches(state: State) -> bool:
    return _mark(state) is not None


def apply(state: State, model: nn.Module) -> tuple[State, list[str]]:
    """The image tower; its projection becomes `head`.

    Raises:
        InputError: weights trained with QuickGELU for a model without it, which would run and be wrong.
    """
    prefix, mark = _mark(state)
    openai = not OPENAI.isdisjoint(state) or any(map(is_own, state))  # which ZeroI2V was trained on
    if openai and not any(isinstance(m, QuickGELU) for m in model.modules()):
        raise InputError("OpenAI's CLIP is trained with QuickGELU and the model has none; use a vit_*_clip_quickgelu_*")
    inside = "visual." if mark == "class_embedding" else "visual.trunk."
    tower = {k if prefix else f"visual.{k}": v for k, v in state.items() if k.startswith(prefix)}
    projection = "visual.head.proj.weight"  # where the tower itself is a timm model
    used = {k for k in tower if k.startswith(inside) or (k == projection and isinstance(model.head, nn.Linear))}
    used = {k for k in used if not is_own(k)}  # adapters for clips that were stored inside the tower
    dropped = [k for k in state if (k if prefix else f"visual.{k}") not in used]
    kept = {k: v for k, v in tower.items() if k in used}
    return timm_keys(kept, "visual." + PATCHES[mark], model), dropped


MAP = KeyMap("clip", "visual.class_embedding, visual.conv1.weight", matches, apply)
