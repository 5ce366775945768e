"""Scores tile by tile within a memory budget, whatever the tiles are of and wherever the classes go."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from .windows import Grid, Job, RowBlend, ramp

MEMORY = 1 << 30
"""Bytes for everything but the model's weights, where nothing else is said."""
STRIP = 8192
"""Pixels that a strip of columns is wide at most."""
PIXEL = 1024
"""Bytes that a model is taken to need per pixel of a tile, beside its input and its scores."""


def say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


class Scorer:
    """Scores tiles in batches, which are halved when memory runs out, and keeps the time.

    Args:
        score: tiles (B, C, t, t) to scores (B, K, t, t).
        classes: K.
        batch: tiles at once.
    """

    def __init__(self, score: Callable[[Tensor], Tensor], classes: int, batch: int) -> None:
        self.score, self.classes, self.batch = score, classes, batch
        self.halvings, self.seconds = 0, 0.0

    def __call__(self, tiles: Tensor) -> Iterator[Tensor]:
        """Scores (K, t, t) of one tile after the other.

        Raises:
            InputError: memory does not suffice for a single tile, or the scores have another shape.
        """
        at = 0
        while at < len(tiles):
            scores = self._try(tiles[at : at + self.batch])
            if scores is None:
                self._halve(tiles.shape[-1])
                continue
            yield from scores
            at += len(scores)

    def _try(self, tiles: Tensor) -> Tensor | None:
        """Scores, or None where memory ran out."""
        start = time.perf_counter()
        try:
            scores = self.score(tiles)
            if scores.is_cuda:
                torch.cuda.synchronize(scores.device)
        except (RuntimeError, MemoryError) as error:
            words = "can't allocate memory", "not enough memory"  # of torch's allocator for CPUs
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(w in str(error) for w in words):
                raise
            return None
        finally:
            self.seconds += time.perf_counter() - start
        wanted = len(tiles), self.classes, *tiles.shape[2:]
        if scores.shape != wanted:
            raise InputError(f"the model gives scores {tuple(scores.shape)} for tiles; {wanted} are needed")
        return scores

    def _halve(self, side: int) -> None:
        if self.batch == 1:
            raise InputError(f"memory does not suffice for one tile of {side} px; use a smaller tile")
        self.batch //= 2
        self.halvings += 1
        say(f"out of memory; going on with {self.batch} tiles at once")


def ahead(function: Callable, items: Iterable) -> Iterator[tuple[Any, Any]]:
    """(item, function(item)) in order, the next one being computed in a thread while the caller works on this one."""
    with ThreadPoolExecutor(1) as pool:
        waiting: tuple[Any, Future] | None = None
        for item in items:
            coming = item, pool.submit(function, item)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = coming
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def plan(
    width: int,
    height: int,
    channels: int,
    classes: int,
    tile: int | None,
    overlap: float,
    batch: int | None,
    memory: int,
) -> tuple[Grid, int]:
    """Tiles and batch for a memory budget.

    Of the budget a quarter is the model's, which is taken to need 1024 + 8 C + 8 K bytes per pixel of its batch: this
    gives the tile where none is set (a multiple of 32, up to 1024, and no longer than the scene, so that a scene that
    fits is one tile) and the batch (up to 16). Half is for the sums over a tile and what is held of a strip of columns,
    which decides on their number; strips are no wider than `STRIP` either, so that a larger scene takes no more memory.
    A sixteenth is for the cache of the file's blocks, and the rest is slack.

    Returns:
        The grid, and the batch.

    Raises:
        InputError: a value out of range, or a budget that is too small for the tile.
    """
    if not 0 <= overlap < 1:
        raise InputError(f"overlap must be in [0, 1), got {overlap}")
    for name, value in {"tile": tile, "batch": batch}.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be 1 or more, got {value}")
    per_pixel = PIXEL + 8 * (channels + classes)
    if tile is None:
        fits = int((memory / 4 / per_pixel) ** 0.5) // 32 * 32
        tile = max(32, min(fits, 1024, -(-max(width, height) // 32) * 32))
    shared = min(int(overlap * tile), tile - 1)
    held, column = RowBlend.sizes(tile, classes, shared)
    narrowest, room = -(-tile // 4), memory // 2 - held
    if narrowest * column > room:
        raise InputError(
            f"{memory / 1e6:.0f} MB of memory are not enough for tiles of {tile} px with {classes} classes; "
            f"allow {2 * (held + narrowest * column) / 1e6:.0f} MB or use a smaller tile"
        )
    if batch is None:
        batch = max(1, min(16, int(memory / 4 / per_pixel / tile**2)))
    return Grid(width, height, tile, shared, strips=-(-width // min(STRIP, room // column))), batch


def named_shares(counts: np.ndarray, pixels: int, classes: Sequence[str]) -> dict[str, float]:
    """Part of all pixels of each class that occurs, by its name.

    Args:
        counts: (K,) pixels of each class.
        pixels: of the whole image, those without a class included.
        classes: K names.
    """
    return {name: round(count / pixels, 6) for name, count in zip(classes, counts.tolist()) if count}


class Source(Protocol):
    """What is mapped."""

    def tile(self, x: int, y: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Values (C, side, side), uint8 or float32, and where they are empty (side, side); see `mirrored`."""


class Target(Protocol):
    """Where classes go.

    Attributes:
        done: finished rows, by the first column of the strip.
        nodata: the value of pixels without a class.
    """

    done: dict[int, int]
    nodata: int

    def write(self, labels: np.ndarray, unscored: np.ndarray, column: int, top: int) -> None:
        """Take finished rows (rows, width) of a strip; see `GrowingMask.write`."""


def mirrored(values: np.ndarray, empty: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A tile (C, h, w) of what is smaller than a tile, and its empty pixels, mirrored at the right and lower edges."""
    missing = (0, side - empty.shape[0]), (0, side - empty.shape[1])
    if missing == ((0, 0), (0, 0)):
        return values, empty
    return np.pad(values, ((0, 0), *missing), mode="reflect"), np.pad(empty, missing, mode="reflect")


def score_tiles(target: Target, source: Source, grid: Grid, scorer: Scorer, progress: bool = True) -> int:
    """Score all tiles that are missing in the target, and write it by rows of tiles; the number of tiles."""

    def read(job: Job) -> tuple[Tensor, Tensor]:
        values, empty = zip(*(source.tile(*grid.read_at(left, job.top), grid.tile) for left in job.lefts))
        return torch.from_numpy(np.stack(values)), torch.from_numpy(np.stack(empty))

    jobs = partial(grid.jobs, scorer.batch, target.done)  # no list, it would be long
    weights, blend, count = ramp(grid.tile, grid.shared), None, sum(len(job.lefts) for job in jobs())
    bar = tqdm(total=count, unit="tile", disable=not (progress and sys.stderr.isatty()), leave=False)
    # closed here, also when the model fails: the thread must not read on from a file that is closed next
    with bar, closing(ahead(read, jobs())) as batches:
        for job, (tiles, empty) in batches:
            if blend is None or blend.strip != job.strip:
                blend = RowBlend(scorer.classes, weights, grid.shared, job.strip, target.nodata)
            complete, full = job.until - job.top, [not nothing.all() for nothing in empty]
            scores = scorer(tiles[full])
            for left, end, nothing, scored in zip(job.lefts, job.ends, empty, full):
                x, y = grid.read_at(left, job.top)
                counts = slice(job.top - y, None), slice(left - x, None)
                blend.add(left, end, complete, next(scores)[:, *counts] if scored else None, nothing[counts])
            if job.last:
                target.write(blend.labels[:complete], blend.unscored[:complete], job.strip[0], job.top)
            bar.update(len(job.lefts))
    return count
