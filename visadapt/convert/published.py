"""Published adapters and heads (Cloud-Adapter, Rein, Earth-Adapter, ZeroI2V) into a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..core.adapter import Adapter
from ..errors import InputError, hint
from .cloud_adapter import cloud_adapter_keys
from .earth_adapter import earth_adapter_keys
from .keymap import listed
from .rein import rein_keys
from .zeroi2v import is_own, zeroi2v_keys

READERS: dict[str, Callable[[Mapping[str, Any], Adapter], dict[str, dict[str, Tensor]]]] = {
    "CloudAdapter": lambda state, adapter: cloud_adapter_keys(state, adapter.layers, adapter.context),
    "Rein": lambda state, adapter: rein_keys(state),
    "EarthAdapter": lambda state, adapter: earth_adapter_keys(state, adapter.fft_layers, adapter.layers),
    "ZeroI2V": lambda state, adapter: zeroi2v_keys(state),
}
"""By method: a published state dict, and the adapter it is for, to tensors by our keys."""

HEADS = {"decode_head.": "", "cls_head.fc_cls.": "fc."}
"""How names in a published head begin, and in ours."""

BUFFERS = ("loss_cls.", "loss_decode.")
"""Of losses, which published heads carry along."""

NORMS = "LayerNormTuning"
"""What trains norms beside a method; a file that holds the image tower has their values there."""


def has_tower(state: Mapping[str, Any]) -> bool:
    """Whether a published file holds an image tower that was trained, or merged into, and is the base to build on."""
    return any(is_own(name) for name in state.get("state_dict", state))


def fill(task: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Fill the adapter and the head of a task from a published file.

    Args:
        task: a task with one adapter of the published method and size, and the head. Beside files that hold the image
            tower, which must be the task's backbone, it may tune norms; that starts from the file's norms.
        state: a state dict, or a checkpoint that holds one under "state_dict".

    Returns:
        What was filled, in words.

    Raises:
        InputError: another method, no such head in the file, or sizes that differ.
    """
    state = state.get("state_dict", state)
    adapters = {name: type(adapter).__name__ for name, adapter in task.adapted.adapters.items()}
    norms = [name for name, kind in adapters.items() if kind == NORMS and has_tower(state)]
    methods = [name for name in adapters if name not in norms]
    if len(methods) != 1:
        beside = f" beside {NORMS}" if norms else ""
        raise InputError(f"a published file has one adapter, the config {len(methods)}{beside}")
    adapter, name = task.adapted.adapters[methods[0]], adapters[methods[0]]
    if name not in READERS:
        raise InputError(f"no published layout is known for '{name}'{hint(name, READERS)}")
    found = READERS[name](state, adapter)
    parts: dict[str, nn.Module] = {**adapter.pieces, "shared": adapter.common}
    for key, tensors in found.items():
        if key not in parts:
            raise InputError(f"the file has an adapter for {key}, the config has none there; mend its layers")
        _fill(parts[key], tensors, key)
    if unfilled := [key for key, part in parts.items() if key not in found and part.state_dict()]:
        raise InputError(
            f"the file has nothing for {listed(unfilled)} of the config's {name}; mend its layers, or for a merged "
            "file leave out what was merged (ZeroI2V: ratio=None)"
        )
    head = {
        ours + k.removeprefix(theirs): v
        for k, v in state.items()
        for theirs, ours in HEADS.items()
        if k.startswith(theirs)
    }
    head = {k: v for k, v in head.items() if not k.startswith(BUFFERS)}
    if not head:
        raise InputError(f"the file has no head ({', '.join(f'{name}*' for name in HEADS)}); it cannot predict")
    _fill(task.head, head, type(task.head).__name__)
    return [
        f"{name}: {sum(len(t) for t in found.values())} tensors",
        f"{type(task.head).__name__}: {len(head)} tensors",
        *(f"{NORMS} '{name}': at its start, trained norms are in the image tower" for name in norms),
    ]


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Fill a module completely.

    Raises:
        InputError: names or shapes differ.
    """
    own = module.state_dict()
    counters = {k for k in own if k.endswith("num_batches_tracked")}
    missing, surplus = sorted(own.keys() - tensors.keys() - counters), sorted(tensors.keys() - own.keys())
    wrong = [f"{k} {tuple(v.shape)}" for k, v in tensors.items() if k in own and v.shape != own[k].shape]
    if missing or surplus or wrong:
        said = {"lacks": missing, "has also": surplus, "has other shapes for": wrong}
        told = ", ".join(f"{verb} {listed(names)}" for verb, names in said.items() if names)
        raise InputError(f"the file does not fit {what} of the config: it {told}")
    module.load_state_dict(tensors, strict=False)
