"""DINOv2 as the Hugging Face hub stores it, with and without registers: separate query, key and value."""

from __future__ import annotations

import re

import torch
from torch import nn

from . import dinov2
from .keymap import KeyMap, State

OURS = ("embeddings.", "encoder.", "layernorm.")
RENAMED = (
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.", ""),
    ("encoder.layer.", "blocks."),
    (".attention.output.dense.", ".attn.proj."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
    (".mlp.weights_in.", ".mlp.w12."),
    (".mlp.weights_out.", ".mlp.w3."),
)
QUERY = re.compile(r"^encoder\.layer\.(\d+)\.attention\.attention\.query\.(weight|bias)$")
FUSED = re.compile(r"\.attention\.attention\.(query|key|value)\.")


def matches(state: State) -> bool:
    return "embeddings.position_embeddings" in state and any(".layer_scale1.lambda1" in k for k in state)


def apply(state: State, model: nn.Module) -> tuple[State, list[str]]:
    """To the official layout first; its map does the rest."""
    dropped = [k for k in state if not k.startswith(OURS) or k == "embeddings.mask_token"]
    official = {}
    for key in (k for k in state if k not in dropped):
        if match := QUERY.match(key):
            parts = [state.get(key.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
            if all(p is not None for p in parts):
                official["blocks.{}.attn.qkv.{}".format(*match.groups())] = torch.cat(parts)
        elif not FUSED.search(key):
            official[_renamed(key)] = state[key]
    return dinov2.apply(official, model)[0], dropped


def _renamed(key: str) -> str:
    if key.startswith("layernorm."):
        return key.removeprefix("layer")
    for old, new in RENAMED:
        key = key.replace(old, new)
    return key


MAP = KeyMap("dinov2_hf", "embeddings.position_embeddings, encoder.layer.0.layer_scale1.lambda1", matches, apply)
