"""Adapters of Rein (Wei et al., 2024), arXiv 2312.04265, from checkpoints of the official code."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..core.sites import Site
from ..errors import InputError
from .keymap import listed

TOKENS = {"learnable_tokens": "a", "learnable_tokens_a": "a", "learnable_tokens_b": "b"}
SHARED = {"scale": "refiner.strength"} | {
    f"{theirs}.{leaf}": f"{ours}.{leaf}"
    for theirs, ours in {
        "mlp_token2feat": "refiner.value",
        "mlp_delta_f": "refiner.out",
        "transform": "link.project",
        "merge": "link.merge",
    }.items()
    for leaf in ("weight", "bias")
}

Pieces = dict[str, dict[str, Tensor]]


def rein_keys(state: Mapping[str, Tensor]) -> Pieces:
    """Tensors by the keys of our sites, {"trunk_03_block": {"a": (m, r), "b": (r, D)}, ...}, and under "shared".

    A file with full tokens has no "b", one without queries nothing of the link, one with a fixed strength no strength:
    they fit `Rein(rank=None)`, `Rein(query_dim=None)` and `Rein(zero_start=True)`.

    Args:
        state: a published state dict. Of a whole model what stands under "backbone.reins." is taken; backbone and head
            are left. Also that part alone, with or without the prefix.

    Raises:
        InputError: no Rein in it, other names, missing tensors, or factors of different numbers of blocks.
    """
    state = state.get("state_dict", state)
    prefix = next((p for p in ("backbone.reins.", "reins.") if any(k.startswith(p) for k in state)), "")
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if unknown := [k for k in own if k not in TOKENS and k not in SHARED]:
        raise InputError(f"Rein file has {listed(unknown)}; expected learnable_tokens_a, mlp_delta_f.weight and alike")
    needed = {"learnable_tokens"} if "learnable_tokens" in own else {"learnable_tokens_a", "learnable_tokens_b"}
    needed |= {k for k in SHARED if k.startswith("mlp_")}
    link = {k for k in SHARED if k.startswith(("transform.", "merge."))}
    needed |= link if link & own.keys() else set()
    if missing := sorted(needed - own.keys()):
        raise InputError(f"Rein file lacks {listed(missing)}; it was cut off, or is no Rein")
    tokens = {TOKENS[k]: v for k, v in own.items() if k in TOKENS}
    blocks = {len(v) for v in tokens.values()}
    if len(blocks) > 1:
        raise InputError(f"Rein file has factors for {sorted(blocks)} blocks; both must have as many")
    found = {
        Site("", "block", n, 0, 0).key: {name: value[n].clone() for name, value in tokens.items()}
        for n in range(blocks.pop())
    }
    return found | {"shared": {SHARED[k]: v for k, v in own.items() if k in SHARED}}
