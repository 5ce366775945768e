"""Adapters of Cloud-Adapter (Zou et al., 2024), arXiv 2411.13127, published as XavierJiezou/cloud-adapter-models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..core.sites import Site
from ..errors import InputError
from .keymap import listed

Pieces = dict[str, dict[str, Tensor]]

BESIDE = {"backbone.cloud_adapter.": ("backbone.", "decode_head."), "cloud_adapter.": ("",), "": ()}
"""Prefixes of the adapter in a whole model, in a backbone and alone, with those of what else such a file holds."""

UNIT = {"conv_dw": "spatial", "bn1": "norm1", "conv_pw": "pointwise", "bn2": "norm2"}
BLOCK = {"dwconv": "conv_dw", "norm": "norm", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"}
GATE = {"local_embedding": "local", "global_act": "gate", "global_embedding": "shift"}


def cloud_adapter_keys(state: Mapping[str, Any], layers: Sequence[int] | None = None, context: str = "sum") -> Pieces:
    """Tensors by the keys of our sites, {"trunk_03_block": {"q.0.weight": ...}, ...}, and under "shared" the network's.

    They fit `adapter.pieces[key].load_state_dict` and `adapter.common.load_state_dict`.

    Args:
        state: a published file, with or without the backbone and the head, or the state of a backbone or an adapter.
        layers: indices of the adapted blocks, in order; 0, 1, ... where None. The file numbers adapted blocks only.
        context: of `CloudAdapter`. With "last" norms of the earlier stages of a ConvNeXt are left out, which the
            official network stores and never uses.

    Raises:
        InputError: no adapter in it, other names, modules of blocks that are missing, or `layers` of another number.
    """
    nets: dict[int, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    for name, value in _adapter(state.get("state_dict", state)).items():
        if match := re.fullmatch(r"net\.(\d+)\.(.+)", name):
            nets.setdefault(int(match[1]), {})[_interaction(match[2], name)] = value
        else:
            shared[f"perception.net.{_perception(name)}"] = value
    if context == "last":
        norms = {k: int(k.split(".")[3]) for k in shared if k.startswith("perception.net.norms.")}
        shared = {k: v for k, v in shared.items() if norms.get(k) in (None, max(norms.values(), default=None))}
    if not nets or not shared or sorted(nets) != list(range(len(nets))):
        raise InputError(
            f"Cloud-Adapter file has the modules net.{{{listed(sorted(nets))}}} and {len(shared)} tensors cnn.*; "
            "expected net.0, net.1, ... without a gap and a network; it was cut off"
        )
    blocks = range(len(nets)) if layers is None else layers
    if len(blocks) != len(nets):
        raise InputError(f"Cloud-Adapter file has modules for {len(nets)} blocks, layers names {len(blocks)}")
    pieces = {Site("", "block", layer, 0, 0).key: nets[n] for n, layer in enumerate(blocks)}
    return pieces | {"shared": shared}


def _adapter(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What belongs to the adapter, without prefix."""
    prefix = next(p for p in BESIDE if any(k.startswith(p) for k in state) or not p)
    if unknown := [k for k in state if not k.startswith((prefix, *BESIDE[prefix]))]:
        raise InputError(f"Cloud-Adapter file has {listed(unknown)} beside {prefix}*")
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _perception(name: str) -> str:
    """Our name of a tensor of the network."""
    if match := re.fullmatch(r"cnn\.(?:proj_1x1|spp_dw\.(\d+))\.(\w+)\.(\w+)", name):
        number, part, leaf = match.groups()
        place = "lift" if number is None else "stem" if number == "0" else f"stages.{int(number) - 1}"
        if part in UNIT:
            return f"{place}.{UNIT[part]}.{leaf}"
    if match := re.fullmatch(r"cnn\.downsample_layers\.(\d+)\.([01])\.(\w+)", name):
        return "stages.{}.down.{}.{}".format(*match.groups())
    if match := re.fullmatch(r"cnn\.norm(\d+)\.(\w+)", name):
        return "norms.{}.{}".format(*match.groups())
    if match := re.fullmatch(r"cnn\.stages\.(\d+)\.0\.gamma", name):
        return f"stages.{match[1]}.block.gamma"
    match = re.fullmatch(r"cnn\.stages\.(\d+)\.0\.(\w+)\.(\w+)", name)
    if match and match[2] in BLOCK:
        return f"stages.{match[1]}.block.{BLOCK[match[2]]}.{match[3]}"
    raise InputError(f"Cloud-Adapter file has '{name}'; expected cnn.proj_1x1.*, cnn.stages.*, net.0.* and alike")


def _interaction(rest: str, name: str) -> str:
    """Our name of a tensor of a block's module."""
    if match := re.fullmatch(r"attn\.to_(q|k|v|out)\.(?:loramlp\.([01])\.)?weight", rest):
        return f"{match[1]}.weight" if match[2] is None else f"{match[1]}.{match[2]}.weight"
    match = re.fullmatch(r"(\w+)\.([01])\.(\w+)", rest)
    if match and match[1] in GATE:
        return f"{GATE[match[1]]}.{match[2]}.{match[3]}"
    raise InputError(f"Cloud-Adapter file has '{name}'; expected attn.to_q.*, local_embedding.* and alike below net.0")
