"""The published DSCF super-resolution network (Yaozzz666/DSCF-SR), its low-rank updates merged."""

from __future__ import annotations

from torch import nn

from .keymap import KeyMap, State

WRAPPED = "eval_conv."
"""Level of the official convolutions of 3 x 3, which have another one for training beside it."""


def matches(state: State) -> bool:
    return any(f"block_1.c1_r.{inner}weight" in state for inner in (WRAPPED, ""))


def apply(state: State, model: nn.Module) -> tuple[State, list[str]]:
    return {k.replace(WRAPPED, ""): v for k, v in state.items()}, []


MAP = KeyMap("dscf", "block_1.c1_r.eval_conv.weight", matches, apply)
