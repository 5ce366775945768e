"""Features of a frozen backbone on disk, for all runs that would compute the same ones.

A file is named by a hash of all that decides what it holds, so that it is never out of date: the images themselves as
the backbone is given them, behind whatever reads and transforms them; its weights and arguments; where in it the
features are taken; and what decides the last digits of the sums: versions, device, threads and batches.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core.io import fingerprint
from ..environment import environment
from ..errors import Notice
from ..files import atomic


def file_of(folder: Path, task: Any, place: str, images: str) -> Path:
    """Where features are kept.

    Args:
        folder: for all of them.
        task: whose backbone makes them.
        place: where in the network they are taken.
        images: sha256 of all images, batch by batch.
    """
    backbone, made = task.adapted.backbone, environment()
    parameter = next(backbone.parameters())
    said = {
        **{"place": place, "images": images, "weights": fingerprint(task.adapted)},
        **{"backbone": type(backbone).__name__, "arguments": backbone.arguments()},
        **{"dtype": str(parameter.dtype), "device": parameter.device.type},
        **{key: made[key] for key in ("visadapt", "packages", "threads", "cuda", "devices")},
        "processor": torch.backends.cpu.get_cpu_capability(),
    }
    return folder / f"{hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]}.safetensors"


def load(path: Path) -> Tensor | None:
    """Kept features, mapped from the file; None where there are none. Of a damaged file it is said that it is one."""
    try:
        with safe_open(path, "pt") as file:
            written = (file.metadata() or {}).get("sha256")
        features = load_file(path)["features"]
        if _digest(features) == written:
            return features
        reason = "its checksum is wrong"
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError) as error:
        reason = str(error)
    warnings.warn(f"features in {path} are damaged ({reason}); they are computed again", Notice, stacklevel=2)
    return None


def keep(path: Path, features: Tensor) -> Tensor:
    """The features as `load` gives them; as they are where they cannot be written, which is said.

    Whoever else computes the same ones at this time writes the same file, and the last one stays.
    """
    try:
        with atomic(path) as temporary:
            save_file({"features": features}, temporary, {"sha256": _digest(features)})
        return load_file(path)["features"]
    except (OSError, ValueError) as error:  # InputError is a ValueError
        warnings.warn(f"{error}; every run computes its features anew", Notice, stacklevel=2)
        return features


def _digest(features: Tensor) -> str:
    return hashlib.sha256(features.numpy()).hexdigest()
