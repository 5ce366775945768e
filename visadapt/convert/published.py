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
from .zeroi2v import zeroi2v_keys

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


def fill(task: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Fill the one adapter and the head of a task from a published file.

    Args:
        task: a task with one adapter of the published method and size, and the head.
        state: a state dict, or a checkpoint that holds one under "state_dict".

    Returns:
        What was filled, in words.

    Raises:
        InputError: another method, no such head in the file, or sizes that differ.
    """
    state = state.get("state_dict", state)
    if len(task.adapted.adapters) != 1:
        raise InputError(f"a published file has one adapter, the config {len(task.adapted.adapters)}")
    (adapter,) = task.adapted.adapters.values()
    name = type(adapter).__name__
    if name not in READERS:
        raise InputError(f"no published layout is known for '{name}'{hint(name, READERS)}")
    found = READERS[name](state, adapter)
    parts: dict[str, nn.Module] = {**adapter.pieces, "shared": adapter.common}
    for key, tensors in found.items():
        if key not in parts:
            raise InputError(f"the file has an adapter for {key}, the config has none there; mend its layers")
        _fill(parts[key], tensors, key)
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
