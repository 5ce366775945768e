"""Adapters of Earth-Adapter (arXiv 2504.06220) from checkpoints of the official code."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..core.sites import Site
from ..errors import InputError
from .keymap import listed

LINEARS = {"0": "down", "2": "up"}

Pieces = dict[str, dict[str, Tensor]]


def earth_adapter_keys(
    state: Mapping[str, Tensor], fft_layers: Sequence[int], layers: Sequence[int] | None = None
) -> Pieces:
    """Tensors by the keys of our sites: {"trunk_03_block": {"alpha": (), "experts.0.down.weight": (r, D), ...}, ...}.

    The files do not say which blocks have three experts. They hold experts, routers and, in the published ones, norms
    for all blocks; those that the official code never uses are left.

    Args:
        state: a published state dict. Of a whole model what stands under "backbone.refine_feat." is taken; backbone,
            head and the teacher of domain adaptation ("ema_model.") are left. Also that part alone, with or without
            the prefix.
        fft_layers: blocks with three experts, negative from the end, as the run's config says.
        layers: adapted blocks, likewise; all where None.

    Raises:
        InputError: no Earth-Adapter in it, other names, a block that is not there, or missing tensors.
    """
    state = state.get("state_dict", state)
    prefix = next((p for p in ("backbone.refine_feat.", "refine_feat.") if any(k.startswith(p) for k in state)), "")
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if "scale" not in own:
        raise InputError(f"no Earth-Adapter (backbone.refine_feat.scale and alike) among {listed(state)}")
    depth = len(own["scale"])
    adapted = set(range(depth)) if layers is None else _numbers(layers, depth)
    mixed = _numbers(fft_layers, depth)
    found: Pieces = {}
    for layer in sorted(adapted):
        piece = {"alpha": own["scale"][layer].clone()}
        if "refine_token" in own:
            piece["tokens"] = own["refine_token"][layer].clone()
        found[Site("", "block", layer, 0, 0).key] = piece
    for name, value in own.items():
        if name in ("scale", "refine_token") or name.startswith("layer_norm."):
            continue
        layer, ours = _placed(name)
        if layer in adapted and (layer in mixed or ours.startswith("experts.0.")):
            found[Site("", "block", layer, 0, 0).key][ours] = value
    for layer in sorted(adapted):
        _check_whole(found[Site("", "block", layer, 0, 0).key], layer, 3 if layer in mixed else 1)
    return found


def _numbers(layers: Sequence[int], depth: int) -> set[int]:
    if wrong := [n for n in layers if not -depth <= n < depth]:
        raise InputError(f"Earth-Adapter file has the blocks 0 to {depth - 1}, not {wrong}")
    return {n % depth for n in layers}


def _placed(name: str) -> tuple[int, str]:
    """Block and our name of a tensor of an expert or router."""
    if match := re.fullmatch(r"mlp_list([123])\.(\d+)\.([02])\.(weight|bias)", name):
        expert, layer, linear, leaf = match.groups()
        return int(layer), f"experts.{int(expert) - 1}.{LINEARS[linear]}.{leaf}"
    if match := re.fullmatch(r"router\.(\d+)\.(weight|bias)", name):
        return int(match[1]), f"router.{match[2]}"
    raise InputError(f"Earth-Adapter file has '{name}'; expected mlp_list1.0.0.weight, router.0.bias and alike")


def _check_whole(piece: dict[str, Tensor], layer: int, experts: int) -> None:
    leaves = ("weight", "bias")
    wanted = {f"experts.{n}.{part}.{leaf}" for n in range(experts) for part in ("down", "up") for leaf in leaves}
    wanted |= {f"router.{leaf}" for leaf in leaves if experts > 1}
    if missing := sorted(wanted - piece.keys()):
        raise InputError(f"Earth-Adapter file lacks {listed(missing)} of block {layer}; it was cut off")
