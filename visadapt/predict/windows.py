"""Tiles over a scene, the weights that blend them, and the sums of one band of rows.

Tiles of side t start every t - s pixels, s being what neighbours share; the last of a row or column is moved back into
the scene. A pixel's class is the highest of the weighted sums over its tiles, sum_i w_i(y) w_i(x) score_i(y, x). The
average would divide all classes of a pixel by the same sum of weights, which changes no order, and is not formed.

What is held is one band of t rows. A scene that is too wide for the memory is cut into strips of columns, one after
the other. Tiles that cross the border of two strips are scored once for each: one or two columns of tiles per
border where neighbours share up to half a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


def starts(size: int, tile: int, shared: int) -> list[int]:
    """First pixels of the tiles along one side of the scene; 0 alone where the scene is no longer than a tile."""
    return [*range(0, size - tile, tile - shared), max(0, size - tile)]


def ramp(tile: int, shared: int) -> Tensor:
    """Weights along one side of a tile: 1 inside, falling as a squared sine over the shared pixels, above 0 throughout.

    Those of two neighbours sum to 1 where no third tile reaches.
    """
    edge = min(shared, tile // 2)
    weights = torch.ones(tile)
    rise = torch.sin((torch.arange(edge) + 0.5) * (math.pi / 2 / max(1, edge))) ** 2
    weights[:edge] = rise
    weights[tile - edge :] = rise.flip(0)
    return weights


@dataclass(frozen=True)
class Job:
    """Tiles that are read and scored together: neighbours in one row of tiles.

    Attributes:
        strip: first and past-the-end column of the strip that they are for.
        y: first row.
        xs: first columns.
        until: rows of the strip above this one are complete afterwards; None where tiles of the same row follow.
    """

    strip: tuple[int, int]
    y: int
    xs: list[int]
    until: int | None


@dataclass(frozen=True)
class Grid:
    """The tiles of a scene.

    Attributes:
        width: of the scene, in pixels.
        height: likewise.
        tile: side of a tile.
        shared: pixels that neighbours share.
        strips: number of strips of columns.
    """

    width: int
    height: int
    tile: int
    shared: int
    strips: int = 1

    def columns(self) -> list[tuple[int, int]]:
        """First and past-the-end column of every strip."""
        edges = [round(i * self.width / self.strips) for i in range(self.strips + 1)]
        return list(pairwise(edges))

    def jobs(self, batch: int, done: dict[int, int]) -> Iterator[Job]:
        """All tiles, strip by strip and row by row.

        Args:
            batch: tiles of a job at most.
            done: rows that are finished already, by the first column of the strip. Work starts with the first row of
                tiles that reaches below them, so that the sums are those of an unbroken run.
        """
        ys = starts(self.height, self.tile, self.shared)
        for left, right in self.columns():
            finished = done.get(left, 0)
            xs = [x for x in starts(self.width, self.tile, self.shared) if x < right and x + self.tile > left]
            for y, below in zip(ys, [*ys[1:], self.height]):
                if finished < self.height and y + self.tile > finished:
                    for i in range(0, len(xs), batch):
                        last = i + batch >= len(xs)
                        yield Job((left, right), y, xs[i : i + batch], below if last else None)


class RowBand:
    """Weighted sums of scores over the rows of one row of tiles, within one strip of columns.

    It takes tile * width * (4 K + `PER_PIXEL`) bytes, on the device of the scores.

    Args:
        classes: K.
        weights: (t,) of a tile along one side.
        strip: first and past-the-end column.
        top: row of the scene at which the band starts.
    """

    PER_PIXEL = 16
    """Bytes beside the sums: what is empty, and the highest score and its class when rows are finished."""

    def __init__(self, classes: int, weights: Tensor, strip: tuple[int, int], top: int) -> None:
        self.classes, self.weights, self.strip, self.top = classes, weights, strip, top
        self.sums: Tensor | None = None  # made with the first scores, where they are
        self.empty = torch.ones(len(weights), strip[1] - strip[0], dtype=torch.bool)

    def _columns(self, x: int) -> tuple[slice, slice]:
        """Columns of the band that the tile at column x covers, and those of the tile that lie in the band."""
        left, right = max(x, self.strip[0]), min(x + len(self.weights), self.strip[1])
        return slice(left - self.strip[0], right - self.strip[0]), slice(left - x, right - x)

    def mark(self, x: int, empty: Tensor) -> None:
        """Say which pixels (t, t) of the tile at column x get no class; every tile of a row has to be marked."""
        here, there = self._columns(x)
        self.empty[:, here] = empty[:, there]

    def add(self, x: int, scores: Tensor) -> None:
        """Add the scores (K, t, t) of the tile at column x."""
        if self.sums is None:
            self.sums = torch.zeros(self.classes, *self.empty.shape, device=scores.device)
            self.weights = self.weights.to(scores.device)
        here, there = self._columns(x)
        weights = self.weights[:, None] * self.weights[there]
        self.sums[:, :, here].addcmul_(scores[:, :, there].float(), weights)

    def finish(self, until: int, nodata: int) -> tuple[Tensor, Tensor]:
        """Take the rows of the scene above `until`, and move the band down to there.

        Returns:
            Classes (rows, width) int64 with `nodata` where there is none, and where that is so because the scores are
            not finite.
        """
        rows = until - self.top
        empty = self.empty[:rows].clone()
        unscored = torch.zeros_like(empty)
        if self.sums is None:
            labels = torch.full(empty.shape, nodata)
        else:
            best, labels = (found.cpu() for found in self.sums[:, :rows].max(0))
            unscored = ~best.isfinite() & ~empty  # a NaN is the highest of its pixel
            labels[empty | unscored] = nodata
            kept = self.sums.shape[1] - rows
            for plane in self.sums:  # one class at a time, for the memory of the copy
                plane[:kept] = plane[rows:].clone()
                plane[kept:] = 0
        self.top = until
        return labels, unscored
