"""Weights from a file, or from the offline model of the `weights` extra, into a model of timm."""

from __future__ import annotations

import argparse
import math
import os
import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import nn
from torch.nn.functional import interpolate

from ..convert import convert
from ..convert.focus_onnx import focus_path, read_focus
from ..convert.keymap import State, listed
from ..errors import InputError
from .patch_embed import expand_patch_embed, first_conv

FOCUS = "dinov2_vits14_focus"
SUFFIXES = (".safetensors", ".pth", ".pt")
HEAD = ("head.", "head_dist.", "fc.", "fc_norm.", "pre_logits.")
COUNTER = "num_batches_tracked"
"""Of batch norms; old files lack it, and only training with a momentum of None reads it."""


@dataclass(frozen=True)
class WeightReport:
    """What `load_weights` did.

    Attributes:
        source: as it was asked for.
        layout: published layout that was recognised.
        loaded: number of tensors.
        dropped: names of the file that have no place in the model.
        missing: names of the model's classifier, or of the norm before it, that the file lacks; they keep their values.
        positions: (rows, columns) of the position embedding in the file and in the model, None where it fitted.
        bands: how the first convolution was widened, None where it fitted.
        patch: side of the patches in the file and in the model, None where it fitted.
    """

    source: str
    layout: str
    loaded: int
    dropped: tuple[str, ...]
    missing: tuple[str, ...]
    positions: tuple[tuple[int, int], tuple[int, int]] | None
    bands: str | None
    patch: tuple[int, int] | None = None

    def __str__(self) -> str:
        parts = [f"{self.loaded} tensors from {self.source} (layout {self.layout})"]
        if self.positions:
            parts.append("positions resampled from {}x{} to {}x{}".format(*self.positions[0], *self.positions[1]))
        if self.patch:
            parts.append("patches resampled from {} to {} pixels".format(*self.patch))
        if self.bands:
            parts.append(f"first convolution widened by '{self.bands}'")
        if self.dropped:
            parts.append(f"left out {listed(self.dropped)}")
        if self.missing:
            parts.append(f"not in the file {listed(self.missing)}")
        return "; ".join(parts)


def is_local(source: str) -> bool:
    """True if `load_weights` is meant: the offline model, a path, or a name that ends like a weights file."""
    separators = [s for s in (os.sep, os.altsep) if s]
    return source == FOCUS or source.endswith(SUFFIXES) or any(s in source for s in separators)


def load_weights(model: nn.Module, source: str, bands: str = "repeat", resize_patch: bool = False) -> WeightReport:
    """Fill a model of timm; it is left as it was where this fails.

    Args:
        model: the network; its classifier is filled where the file has one of the same size.
        source: a .safetensors, .pth or .pt file in a layout of `visadapt.convert`, or "dinov2_vits14_focus".
        bands: mode of `expand_patch_embed`, for a model of other bands than the RGB of the file.
        resize_patch: resample the patch embedding where the file has patches of another size.

    Raises:
        InputError: the file is missing, damaged, holds code, has an unknown layout, or does not fit the model.
    """
    try:
        converted = convert(read_focus(focus_path()) if source == FOCUS else read_file(source), model)
        wanted, state = model.state_dict(), dict(converted.state)
        dropped = [*converted.dropped, *_drop_head(state, wanted)]
        missing = _check_names(state, wanted)
        first = f"{first_conv(model)}.weight"
        patch = _fit_patch(state, wanted, first) if resize_patch else None
        positions = _fit_positions(state, model, antialias=patch is None)
        widened = _fit_bands(state, wanted, first, bands)
        _check_shapes(state, wanted)
    except InputError as error:
        raise InputError(f"weights '{source}': {error}") from error
    model.load_state_dict(state, strict=False)  # names and shapes are known to fit
    left_out, not_there = tuple(dropped), tuple(missing)
    return WeightReport(source, converted.layout, len(state), left_out, not_there, positions, widened, patch)


def read_file(source: str) -> Any:
    """What is stored in a weights file. Nothing in it is executed.

    Raises:
        InputError: no such file, another type of file, a damaged one, or one that holds code.
    """
    path = Path(source).expanduser()
    if path.suffix not in SUFFIXES:
        raise InputError(f"not a weights file; give one that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise InputError(f"there is no file {path.absolute()}")
    if not os.access(path, os.R_OK):
        raise InputError("it cannot be read: permission denied")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with (
            torch.serialization.safe_globals([argparse.Namespace]),  # plain values that DeiT and MAE files carry along
            warnings.catch_warnings(action="ignore"),  # about files that are refused just below
        ):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise nearly anything: OSError, KeyError, EOFError, RuntimeError, ...
        raise InputError(_unreadable(error)) from error


def _unreadable(error: Exception) -> str:
    text = str(error)
    code = re.search(r"GLOBAL (\S+)", text)
    if "TorchScript" in text or (isinstance(error, pickle.UnpicklingError) and code):
        name = code[1] if code else "TorchScript"
        return f"the file contains code ({name}) and is refused; ask for its state dict, best as .safetensors"
    reason = text.split("\n")[0].split(". ")[0] or type(error).__name__
    if isinstance(error, pickle.UnpicklingError):
        reason = "no checkpoint of torch.save, and a pickle might contain code"
    return f"the file is truncated, damaged or of another type ({reason}); fetch it again"


def _drop_head(state: State, wanted: State) -> list[str]:
    """Take out classifier tensors that have no place in the model."""
    names = [k for k in state if k.startswith(HEAD) and (k not in wanted or state[k].shape != wanted[k].shape)]
    for name in names:
        del state[name]
    return names


def _check_names(state: State, wanted: State) -> list[str]:
    """Names of the model's classifier that are missing; any other difference is an error."""
    missing = [k for k in wanted if k not in state and not k.endswith(COUNTER)]
    wrong = [k for k in missing if not k.startswith(HEAD)]
    surplus = [k for k in state if k not in wanted]
    if wrong or surplus:
        parts = [f"it lacks {listed(wrong)}"] * bool(wrong) + [f"it has also {listed(surplus)}"] * bool(surplus)
        raise InputError(f"made for another architecture: {' and '.join(parts)}; choose the model it was made for")
    return missing


def _check_shapes(state: State, wanted: State) -> None:
    wrong = [
        f"{k} {tuple(v.shape)} instead of {tuple(wanted[k].shape)}"
        for k, v in state.items()
        if v.shape != wanted[k].shape
    ]
    if wrong:
        raise InputError(f"made for another architecture: {listed(wrong)}; choose the model it was made for")
    if broken := [k for k, v in state.items() if not v.isfinite().all()]:
        raise InputError(f"it holds values that are not finite in {listed(broken)}; fetch it again")


def _fit_patch(state: State, wanted: State, key: str) -> tuple[int, int] | None:
    """Resample the patch embedding to patches of another size; gives both sizes if it was.

    By plain bicubic interpolation, and the positions likewise: the published heads of Rein, Cloud-Adapter and
    Earth-Adapter were trained on a DINOv2 that was brought from patches of 14 to 16 pixels in this way.
    """
    have, need = state[key].shape[-2:], wanted[key].shape[-2:]
    if state[key].ndim != 4 or have == need or key != "patch_embed.proj.weight":
        return None
    state[key] = interpolate(state[key].float(), tuple(need), mode="bicubic", align_corners=False)
    return have[0], need[0]


def _fit_positions(state: State, model: nn.Module, antialias: bool) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Resample the position embedding to the model's grid; gives the grids if it was."""
    within = first_conv(model).rpartition("patch_embed.")[0]  # "" where the model is the transformer itself
    key, model = f"{within}pos_embed", model.get_submodule(within.rstrip("."))
    pos = state.get(key)
    if pos is None or pos.ndim != 3:
        return None
    grid = tuple(model.patch_embed.grid_size)
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    count = pos.shape[1] - prefix
    side = math.isqrt(max(count, 0))
    square = side > 0 and side**2 == count
    if count == grid[0] * grid[1]:
        if square and grid[0] != grid[1]:
            raise InputError(
                f"its {count} positions may be {side}x{side} or the model's {grid[0]}x{grid[1]}; give the model a"
                " square img_size, the positions are resampled to every image"
            )
        return None
    if not square:
        raise InputError(
            f"its {count} positions are neither a square nor the model's {grid[0]}x{grid[1]}; build the model with the"
            " img_size of the file"
        )
    state[key] = resample_abs_pos_embed(
        pos, new_size=list(grid), old_size=[side, side], num_prefix_tokens=prefix, antialias=antialias
    )
    return (side, side), grid


def _fit_bands(state: State, wanted: State, key: str, mode: str) -> str | None:
    """Widen the first convolution to the model's bands; gives the mode if it was."""
    have, need = state[key].shape[1], wanted[key].shape[1]
    if have == need or state[key].ndim != 4:
        return None
    if have != 3:
        raise InputError(f"made for {have} bands, the model takes {need}; set in_chans={have}")
    state[key] = expand_patch_embed(state[key], need, mode)
    return mode
