"""Adapters of CLIP-LoRA (Zanella and Ben Ayed, 2024), arXiv 2405.18541.

Their update is scaled by alpha / sqrt(r), which the files do not say: load them into `LoRA(scaling="sqrt")`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core.sites import Site
from ..errors import InputError
from .keymap import listed

ROLES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "proj": "proj"}
FACTORS = {"w_lora_A": "a", "w_lora_B": "b"}
TEXT_LAYERS = 12
"""Blocks of the text encoder in every CLIP of OpenAI."""

Pieces = dict[str, dict[str, Tensor]]


def clip_lora_keys(state: Mapping[str, Any]) -> Pieces:
    """Factors by the keys of our sites: {"trunk_03_q": {"a": (r, in), "b": (out, r)}, ...}; "text_..." for text.

    Args:
        state: a published file {"weights": {"layer_0": {"q_proj": {"w_lora_A", "w_lora_B"}}}, "metadata"}, where the
            text encoder's layers come first; or the state of one attention ("q_proj.w_lora_A"), which becomes layer 0.

    Raises:
        InputError: a layer with half a pair, other names, or layers whose place in the encoders the file does not tell.
    """
    if "weights" not in state:
        return _attention({k: v for k, v in state.items() if "w_lora" in k}, "trunk", 0)
    weights, metadata = state["weights"], state.get("metadata", {})
    if (position := metadata.get("position", "all")) != "all":
        raise InputError(f"CLIP-LoRA file with position '{position}': its blocks are not numbered; only 'all' is known")
    found: Pieces = {}
    for name, projections in weights.items():
        match = re.fullmatch(r"layer_(\d+)", name)
        if not match:
            raise InputError(f"CLIP-LoRA file has the layer '{name}'; expected layer_0, layer_1, …")
        part, layer = _place(int(match[1]), metadata.get("encoder", "both"))
        flat = {f"{projection}.{k}": v for projection, pair in projections.items() for k, v in pair.items()}
        found |= _attention(flat, part, layer)
    return found


def _place(number: int, encoder: str) -> tuple[str, int]:
    """Part of the model and block index of the n-th adapted layer."""
    if encoder not in ("both", "text", "vision"):
        raise InputError(f"CLIP-LoRA file for the encoder '{encoder}'; it is one of: both, text, vision")
    if encoder == "text" or (encoder == "both" and number < TEXT_LAYERS):
        return "text", number
    return "trunk", number - (TEXT_LAYERS if encoder == "both" else 0)


def _attention(state: Mapping[str, Tensor], part: str, layer: int) -> Pieces:
    found: Pieces = {}
    for name, value in state.items():
        projection, _, factor = name.rpartition(".")
        if projection not in ROLES or factor not in FACTORS:
            raise InputError(f"CLIP-LoRA file has '{name}' in {part} {layer}; expected q_proj.w_lora_A and alike")
        key = Site("", ROLES[projection], layer, 0, 0, part=part).key
        found.setdefault(key, {})[FACTORS[factor]] = value
    if half := [key for key, pair in found.items() if len(pair) != 2]:
        raise InputError(f"CLIP-LoRA file has only one of the two factors for {listed(half)}; it was cut off")
    if not found:
        raise InputError("no CLIP-LoRA factors (q_proj.w_lora_A and alike) in it")
    return found
