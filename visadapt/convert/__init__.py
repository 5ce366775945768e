"""Checkpoints of published models in the layout of timm's models: one file per published layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from . import blip, clip, convnext, dinov2, dinov2_hf, dscf, timm
from .keymap import KeyMap, State, listed

# the plainest last: first match counts
LAYOUTS: tuple[KeyMap, ...] = (blip.MAP, clip.MAP, convnext.MAP, dinov2_hf.MAP, dinov2.MAP, dscf.MAP, timm.MAP)
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")  # averaged weights first, as timm does
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "dinov2.", "dinov2_with_registers.")


@dataclass(frozen=True)
class Converted:
    """A checkpoint in timm's layout.

    Attributes:
        state: tensors by timm's names, sizes as in the checkpoint.
        layout: name of the layout that was recognised.
        dropped: names in the checkpoint that have no place in an image backbone.
    """

    state: State
    layout: str
    dropped: tuple[str, ...]


def convert(checkpoint: Mapping[str, Any], model: nn.Module) -> Converted:
    """A published checkpoint in the layout of `model`, a model of timm, which is only looked at.

    Args:
        checkpoint: a state dict, or a training checkpoint that holds one under a usual name.

    Raises:
        InputError: no state dict in it, or a layout that none of `LAYOUTS` recognises.
    """
    state, dropped = _unwrapped(checkpoint)
    while (layout := next((m for m in LAYOUTS if m.matches(state)), None)) is None:
        prefix = next((p for p in PREFIXES if any(k.startswith(p) for k in state)), None)
        if prefix is None:
            known = "; ".join(f"{m.name} ({m.example})" for m in LAYOUTS)
            raise InputError(f"unknown checkpoint layout with keys {listed(state)}; known layouts: {known}")
        dropped += [k for k in state if not k.startswith(prefix)]
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    converted, left_out = layout.apply(state, model)
    return Converted(converted, layout.name, tuple(dropped + left_out))


def _unwrapped(checkpoint: Mapping[str, Any]) -> tuple[State, list[str]]:
    """The innermost state dict, and the names of what lay beside it."""
    dropped: list[str] = []
    while isinstance(checkpoint, Mapping) and (
        name := next((w for w in WRAPPERS if isinstance(checkpoint.get(w), Mapping)), None)
    ):
        dropped += [str(k) for k in checkpoint if k != name]
        checkpoint = checkpoint[name]
    if not isinstance(checkpoint, Mapping):
        raise InputError(f"no state dict, a {type(checkpoint).__name__}; save model.state_dict()")
    state = {k: v for k, v in checkpoint.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not state:
        raise InputError(f"no tensors under the keys {listed(checkpoint)}; save model.state_dict()")
    return state, dropped + [str(k) for k in checkpoint if k not in state]
