"""Checkpoints for resuming: what trains, every state of the run, and nothing of the frozen base.

A resumed run ends with the same weights as an uninterrupted one, bit for bit on a CPU.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn

from .core.adapted import Adapted
from .core.io import fingerprint
from .errors import InputError
from .files import atomic

HISTORY = 256
"""Logged values that are kept per scalar; no smoothing window is longer."""

CONTENT = {"meta": dict, "fingerprint": str, "state_dict": dict, "optimizer": dict, "gradients": dict}
CONTENT |= {"param_schedulers": list, "log": dict, "hooks": dict}
"""What a checkpoint holds."""


def unwrap(model: nn.Module) -> nn.Module:
    """The task inside a distributed wrapper."""
    return getattr(model, "module", model)


def _adapted(model: nn.Module) -> Adapted:
    return next(m for m in model.modules() if isinstance(m, Adapted))


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The task's state without the frozen base: adapters with their buffers, heads, and base values that train."""
    frozen = {f"adapted.backbone.{n}" for n, p in _adapted(model).backbone.named_parameters() if not p.requires_grad}
    frozen |= {f"adapted.backbone.{n}" for n, _ in _adapted(model).backbone.named_buffers()}
    return {k: v.cpu().clone() for k, v in model.state_dict().items() if k not in frozen}


def _plain(value: Any) -> Any:
    """Numbers of numpy as Python's own, which weights-only loading lets pass."""
    return value.item() if hasattr(value, "item") else value


def _stateful(runner) -> Iterator[tuple[str, Any]]:
    """The hooks that have a state, by class name; a second one of a class is numbered."""
    seen: Counter[str] = Counter()
    for hook in (h for h in runner.hooks if hasattr(h, "load_state_dict")):
        name = type(hook).__name__
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name}_{seen[name]}", hook


def save(runner, path: Path, epoch: int, step: int) -> None:
    """Write everything that a resumed run needs; the file appears whole or not at all.

    While the loss is no number nothing is written: the weights are not worth going on from.
    """
    if getattr(runner.optim_wrapper, "bad_steps", 0):
        return
    model = unwrap(runner.model)
    hub = runner.message_hub
    scalars = {k: tuple([_plain(x) for x in part[-HISTORY:]] for part in v.data) for k, v in hub.log_scalars.items()}
    infos = {k: _plain(v) for k, v in hub.runtime_info.items()}
    infos = {k: v for k, v in infos.items() if isinstance(v, int | float | str | bool | None)}
    pending = getattr(runner.optim_wrapper, "_inner_count", 0) % runner.optim_wrapper._accumulative_counts
    gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None} if pending else {}
    content = {
        "meta": {"epoch": epoch, "iter": step, "seed": runner.seed, "world_size": runner.world_size},
        "fingerprint": fingerprint(_adapted(model)),
        "state_dict": trained_state(model),
        "optimizer": runner.optim_wrapper.state_dict(),
        "gradients": gradients,
        "param_schedulers": [s.state_dict() for s in runner.param_schedulers or ()],
        "log": {"scalars": scalars, "infos": infos},
        "hooks": {name: hook.state_dict() for name, hook in _stateful(runner)},
    }
    with atomic(path) as temporary:
        torch.save(content, temporary)


def read(path: str | os.PathLike) -> dict[str, Any]:
    """A checkpoint's content.

    Raises:
        InputError: missing, damaged, with code in it, or no checkpoint of a run.
    """
    if not Path(path).is_file():
        raise InputError(f"no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # what torch.save writes; torch.load leaves its checksums unread
            if (broken := archive.testzip()) is not None:
                raise zipfile.BadZipFile(broken)
        with warnings.catch_warnings(action="ignore"):  # about files that are refused just below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors and plain values; it may carry code and is not loaded"
        ) from error
    except PermissionError as error:
        raise InputError(f"checkpoint {path} cannot be read: permission denied") from error
    except Exception as error:  # a damaged file can fail in any way
        raise InputError(f"{path} is damaged or cut off, or no checkpoint; name another with --resume FILE") from error
    if not isinstance(content, dict) or any(not isinstance(content.get(k), kind) for k, kind in CONTENT.items()):
        raise InputError(f"{path} is no checkpoint of a training run; adapter files go to visadapt test or predict")
    return content


def numbered(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, fewest steps first."""
    found = [p for p in folder.glob("*.pth") if re.fullmatch(r"(epoch|iter)_\d+\.pth", p.name)]
    return sorted(found, key=lambda p: int(p.stem.split("_")[1]))


def restore(runner, path: Path) -> None:
    """Put a run back to where the checkpoint was written.

    Raises:
        InputError: another base, another model, other optimizer settings, or another number of processes.
    """
    content = read(path)
    meta, model = content["meta"], unwrap(runner.model)
    if meta["world_size"] != runner.world_size:
        raise InputError(f"{path} was written by {meta['world_size']} processes, this run has {runner.world_size}")
    if content["fingerprint"] != (here := fingerprint(_adapted(model))):
        raise InputError(
            f"{path} was made for the base with fingerprint {content['fingerprint'][:12]}; this backbone has "
            f"{here[:12]}. Load the same base weights"
        )
    state, own = content["state_dict"], trained_state(model)
    different = sorted(set(state) ^ set(own)) or [k for k in own if own[k].shape != state[k].shape]
    if different:
        raise InputError(f"{path} belongs to another model: {len(different)} tensors differ, first {different[0]}")
    model.load_state_dict(state, strict=False)
    for name, gradient in content["gradients"].items():
        parameter = model.get_parameter(name)
        parameter.grad = torch.empty_like(parameter).copy_(gradient)  # laid out as the parameter, as autograd does it
    if meta["seed"] is not None:
        runner._randomness_cfg.update(seed=meta["seed"])
        runner.set_randomness(**runner._randomness_cfg)
    runner.train_loop._epoch, runner.train_loop._iter = meta["epoch"], meta["iter"]
    schedulers, saved = runner.param_schedulers or (), content["param_schedulers"]
    try:
        runner.optim_wrapper.load_state_dict(content["optimizer"])
        for scheduler, state in zip(schedulers, saved, strict=True):
            scheduler.load_state_dict(state)
    except ValueError as error:
        raise InputError(f"{path} was written with other optimizer settings ({error}); resume with those") from error
    hub = runner.message_hub
    hub.log_scalars.update({k: HistoryBuffer(*v) for k, v in content["log"]["scalars"].items()})
    hub.runtime_info.update(content["log"]["infos"])
    for name, hook in _stateful(runner):
        if name in content["hooks"]:
            hook.load_state_dict(content["hooks"][name], runner)
