"""Singular value decompositions of base weights, kept on disk: large ones take seconds each."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import atomic

CACHE = "VISADAPT_CACHE"
"""Environment variable with the folder of kept decompositions; `~/.cache/visadapt` where it is unset."""

WORTH_KEEPING = 512 * 512
"""Number of weights from which on reading a file is faster than decomposing again."""


def cache_folder() -> Path:
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "visadapt")


def svd(weight: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Exact thin decomposition weight = U diag(S) Vt in float32, with signs that do not depend on the machine.

    The entry of largest magnitude in every column of U is positive. Where singular values coincide, their vectors are
    one choice of many, on any machine.

    Args:
        weight: (o, i).
        rank: leading components that are returned; all min(o, i) where None.

    Returns:
        U (o, r), S (r,), Vt (r, i), on the device of the weight.
    """
    matrix = weight.detach().float().cpu().contiguous()
    if matrix.numel() < WORTH_KEEPING:
        return _to(_svd(matrix, rank), weight)
    digest = hashlib.sha256(matrix.numpy()).hexdigest()
    path = cache_folder() / f"svd_{digest[:32]}_{'x'.join(map(str, matrix.shape))}_{rank or 'full'}.safetensors"
    if path.is_file():
        kept = load_file(path)
        return _to((kept["u"], kept["s"], kept["vt"]), weight)
    found = _svd(matrix, rank)
    with atomic(path) as temporary:
        save_file(dict(zip(("u", "s", "vt"), found)), temporary)
    return _to(found, weight)


def _svd(matrix: Tensor, rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    columns = torch.arange(u.shape[1])
    sign = u[u.abs().argmax(0), columns].sign()
    u, vt = u * sign, vt * sign[:, None]
    return u[:, :rank].contiguous(), s[:rank].contiguous(), vt[:rank].contiguous()


def _to(factors: tuple[Tensor, Tensor, Tensor], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(f.to(like.device) for f in factors)
