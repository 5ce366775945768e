"""Singular value decompositions of base weights, kept on disk: large ones take seconds each."""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import InputError, Notice
from ..files import atomic

CACHE = "VISADAPT_CACHE"
"""Environment variable with the folder of kept decompositions; `~/.cache/visadapt` where it is unset."""

WORTH_KEEPING = 512
"""Smaller side of a matrix from which on reading a file is much faster than decomposing again. The time goes with its
cube, the file's size with its square: all linears of a ViT-S take three seconds and are not kept, those of a ViT-L take
a minute or two and fill 1.7 GB, less where `rank` is given."""

LIMIT = 8 * 2**30
"""Bytes that the kept decompositions may take together; those that were not used for longest go first."""

WELL_CONDITIONED = 1e-4
"""Smallest over largest singular value from which on the Gram matrix in float64 gives vectors exact to float32."""

WRITING = threading.Lock()
"""Equal weights have one file."""


def cache_folder() -> Path:
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "visadapt")


def one_core_each(function: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
    """[function(*a) for a in zip(*arguments)], as many at once as torch uses threads, each with one thread.

    Decompositions gain little from several threads, and lose a lot by waiting for each other where cores are shared.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, *arguments))
    finally:
        torch.set_num_threads(threads)  # it also is what threads made later start from


Rank = int | Callable[[Tensor], int] | None
"""Leading components: their number, what tells it from all singular values (under its own `str`), or all."""


def svd(weight: Tensor, rank: Rank = None, keep: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Exact thin decomposition weight = U diag(S) Vt in float32, with signs that do not depend on the machine.

    The entry of largest magnitude in every column of U is positive. It is computed in float64, since in float32 the
    vectors of neighbouring singular values depend on the library and its threads. Where singular values coincide, their
    vectors are one choice of many, on any machine.

    Args:
        weight: (o, i).
        rank: leading components that are returned; all min(o, i) where None. A function that tells the number from all
            singular values saves half the time where it leaves out those that are close to zero.
        keep: on disk, if large; False for matrices that will not come again, as those made from gradients.

    Returns:
        U (o, r), S (r,), Vt (r, i), on the device of the weight.
    """
    matrix = weight.detach().float().cpu().contiguous()
    if not keep or min(matrix.shape) < WORTH_KEEPING:
        return _to(_svd(matrix, rank), weight)
    name = f"{hashlib.sha256(matrix.numpy()).hexdigest()[:32]}_{'x'.join(map(str, matrix.shape))}"
    folder = cache_folder() / "svd"
    part, whole = (folder / f"{name}_{size}.safetensors" for size in (rank or "full", "full"))
    found = _load(part, None) or _load(whole, rank)
    if found is None:
        found = _svd(matrix, rank)
        _keep(part, found)
    return _to(found, weight)


def _load(path: Path, rank: Rank) -> tuple[Tensor, Tensor, Tensor] | None:
    """Kept factors; None where there are none. They are copied: a mapped file must not go away while it is in use."""
    try:
        kept = load_file(path)
    except (OSError, SafetensorError):
        return None
    with suppress(OSError):  # a folder that belongs to someone else
        os.utime(path)
    rank = _number(rank, kept["s"])
    return (
        kept["u"][:, :rank].clone(memory_format=torch.contiguous_format),
        kept["s"][:rank].clone(),
        kept["vt"][:rank].clone(),
    )


def _keep(path: Path, factors: tuple[Tensor, Tensor, Tensor]) -> None:
    """Write a file, and say so where that cannot be done."""
    folder = path.parent
    try:
        with WRITING, atomic(path) as temporary:
            save_file(dict(zip(("u", "s", "vt"), factors)), temporary)
    except (InputError, OSError):
        warnings.warn(
            f"{folder} cannot be written, so that every run decomposes the weights anew; free some space there or set "
            f"{CACHE} to another folder",
            Notice,
            stacklevel=3,
        )
    else:
        _tidy(folder)


def _tidy(folder: Path) -> None:
    """Delete the files that were not used for longest where all together exceed the limit."""
    used = []
    for kept in folder.glob("*.safetensors"):
        with suppress(FileNotFoundError):  # by another process that tidies up
            used.append((kept.stat().st_mtime, kept.stat().st_size, kept))
    total = 0
    for _, size, kept in sorted(used, reverse=True):
        total += size
        if total > LIMIT:
            kept.unlink(missing_ok=True)


def _number(rank: Rank, s: Tensor) -> int:
    return rank(s) if callable(rank) else len(s) if rank is None else min(rank, len(s))


def _svd(matrix: Tensor, rank: Rank) -> tuple[Tensor, Tensor, Tensor]:
    wide = matrix.shape[0] < matrix.shape[1]
    tall = (matrix.T if wide else matrix).double()
    u = None
    # The Gram matrix takes half the time. Square weights are seldom well-conditioned, but their leading components are.
    if tall.shape[0] >= 2 * tall.shape[1] or callable(rank):
        squares, v = torch.linalg.eigh(tall.T @ tall)
        s, v = squares.flip(0).clamp(min=0).sqrt(), v.flip(1)
        count = _number(rank, s)
        whole = count if callable(rank) else len(s)  # a number gives the same bits as all do
        if s[whole - 1] > WELL_CONDITIONED * s[0]:
            s, v = s[:whole], v[:, :whole]
            u = tall @ v / s
    if u is None:
        u, s, vt = torch.linalg.svd(tall, full_matrices=False)
        v = vt.T
        count = _number(rank, s)
    u, v = (v, u) if wide else (u, v)
    sign = u[u.abs().argmax(0), torch.arange(u.shape[1])].sign()
    factors = (u * sign)[:, :count], s[:count], (v * sign).T[:count]
    return tuple(f.float().contiguous() for f in factors)


def _to(factors: tuple[Tensor, Tensor, Tensor], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(f.to(like.device) for f in factors)
