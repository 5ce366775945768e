"""Adapters of ZeroI2V (Li et al., 2023), arXiv 2310.01324, from checkpoints of the official code, merged ones too.

Beside them the files hold the image tower in CLIP's layout, which `TimmViT(weights=file)` reads, with a last norm that
was trained, and a head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ..core.sites import Site
from ..errors import InputError
from .keymap import listed

PLACES = {
    **{"T_Adapter_in": "attn_in", "S_Adapter": "attn_out"},
    **{"MLP_Adapter": "mlp_in", "MLP_Adapter_out": "mlp_out"},
}
LINEARS = {"D_fc1": "down", "D_fc2": "up"}
EMBEDDING = "temporal_embedding"
OWN = re.compile(rf"(?:.*\.)?resblocks\.(\d+)\.({'|'.join(PLACES)})\.({'|'.join(LINEARS)})\.(weight|bias)")

Pieces = dict[str, dict[str, Tensor]]


def is_own(name: str) -> bool:
    """Whether a name in a checkpoint belongs to the method and not to the image tower."""
    return OWN.fullmatch(name) is not None or name.rpartition(".")[2] == EMBEDDING


def zeroi2v_keys(state: Mapping[str, Tensor]) -> Pieces:
    """Tensors by the keys of our sites: "trunk_xx_stem" has the embedding (T, D), "shared" the linear adapters.

    A merged file has the embedding alone; it fits `ZeroI2V(ratio=None)`.

    Args:
        state: a published state dict, or a checkpoint that holds one under "state_dict".

    Raises:
        InputError: no ZeroI2V in it, or blocks that lack one of the four adapters.
    """
    state = state.get("state_dict", state)
    shared, embedding = {}, None
    for name, value in state.items():
        if match := OWN.fullmatch(name):
            block, place, linear, leaf = match.groups()
            shared[f"{int(block):02d}_{PLACES[place]}.{LINEARS[linear]}.{leaf}"] = value
        elif is_own(name):
            embedding = value
    if embedding is None:
        raise InputError(f"no {EMBEDDING} in it; that is no checkpoint of ZeroI2V")
    blocks = {name[:2] for name in shared}
    wanted = {
        f"{b}_{place}.{linear}.{leaf}"
        for b in blocks
        for place in PLACES.values()
        for linear in LINEARS.values()
        for leaf in ("weight", "bias")
    }
    if missing := sorted(wanted - shared.keys()):
        raise InputError(f"ZeroI2V file lacks {listed(missing)}; it was cut off")
    found = {Site("", "stem", -1, 0, 0).key: {"embedding": embedding[0]}}
    return found | ({"shared": shared} if shared else {})
