"""BLIP with its text decoder: as its authors (salesforce/BLIP) and the Hugging Face hub store it, and our own names.

The authors' vision transformer has timm's epsilon of 1e-6 in its norms, transformers' has 1e-5 unless it is told.
"""

from __future__ import annotations

import torch
from torch import nn

from ..errors import InputError
from .keymap import KeyMap, State

WORDS = "text_decoder.bert.embeddings.word_embeddings.weight"
OWN = "text.words.weight"
SCORES = "text_decoder.cls.predictions."

RENAMED = (
    ("visual_encoder.", "vision."),
    ("vision_model.embeddings.class_embedding", "vision.cls_token"),
    ("vision_model.embeddings.position_embedding", "vision.pos_embed"),
    ("vision_model.embeddings.patch_embedding.", "vision.patch_embed.proj."),
    ("vision_model.encoder.layers.", "vision.blocks."),
    ("vision_model.post_layernorm.", "vision.norm."),
    (".self_attn.projection.", ".attn.proj."),
    (".self_attn.", ".attn."),
    (".layer_norm", ".norm"),
    (WORDS, OWN),
    ("text_decoder.bert.embeddings.position_embeddings.", "text.positions."),
    ("text_decoder.bert.embeddings.LayerNorm.", "text.norm."),
    ("text_decoder.bert.encoder.layer.", "text.blocks."),
    *(
        (f".{long}.self.{name}.", f".{short}.{name[0]}.")
        for long, short in (("crossattention", "xattn"), ("attention", "attn"))
        for name in ("query", "key", "value")
    ),
    (".crossattention.output.dense.", ".xattn.proj."),
    (".crossattention.output.LayerNorm.", ".xnorm."),
    (".attention.output.dense.", ".attn.proj."),
    (".attention.output.LayerNorm.", ".norm1."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    (".output.LayerNorm.", ".norm2."),
    (f"{SCORES}transform.dense.", "text.answer."),
    (f"{SCORES}transform.LayerNorm.", "text.answer_norm."),
    (f"{SCORES}bias", "text.bias"),
)
"""In order: what comes first has taken its names before the next looks."""


def matches(state: State) -> bool:
    return WORDS in state or OWN in state


def apply(state: State, model: nn.Module) -> tuple[State, list[str]]:
    """Image tower and text decoder.

    Raises:
        InputError: scores that are not tied to the word embeddings.
    """
    if OWN in state:
        return dict(state), []
    tied = state.get(f"{SCORES}decoder.weight")
    if tied is not None and not torch.equal(tied, state[WORDS]):
        raise InputError(f"{SCORES}decoder.weight differs from the word embeddings, to which BLIP ties it")
    renamed = {key: _renamed(key) for key in state}
    dropped = [key for key, new in renamed.items() if not new.startswith(("vision.", "text."))]
    found = {new: state[key] for key, new in renamed.items() if key not in dropped}
    if (bias := state.get(f"{SCORES}decoder.bias")) is not None:  # the same values under another name
        found.setdefault("text.bias", bias)
    return found, dropped


def _renamed(key: str) -> str:
    for old, new in RENAMED:
        key = key.replace(old, new)
    return key


MAP = KeyMap("blip", "visual_encoder.cls_token, text_decoder.bert.embeddings.word_embeddings.weight", matches, apply)
