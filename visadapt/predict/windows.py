"""Tiles over a scene, the weights that blend them, and the sums of what is not finished.

Tiles of side t start every t - s pixels, s being what neighbours share. Of one that would reach beyond the scene, what
lies within counts; it is read further back, so that the model sees a whole tile. A pixel's class is the highest of the
weighted sums over its tiles, sum_i w_i(y) w_i(x) score_i(y, x). The average would divide all classes of a pixel by the
same sum of weights, which changes no order, and is not formed.

What is held is a tile, and the rows that one row of tiles shares with the next. A scene that is too wide for the
memory is cut into strips of columns, one after the other. Tiles that cross the border of two strips are scored once
for each: one or two columns of tiles per border where neighbours share up to half a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


def starts(size: int, tile: int, shared: int) -> list[int]:
    """First pixels of the tiles along one side of the scene; 0 alone where the scene is no longer than a tile."""
    return [*range(0, max(1, size - shared), tile - shared)]


def ramp(tile: int, shared: int) -> Tensor:
    """Weights along one side of a tile: 1 inside, falling as a squared sine over the shared pixels, above 0.

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
        top: first row.
        until: rows of the scene above this one are complete after the last tile of the row.
        lefts: first columns.
        ends: columns of the strip before these are complete after the tile, as far down as `until`.
        last: no tile of the same row follows.
    """

    strip: tuple[int, int]
    top: int
    until: int
    lefts: list[int]
    ends: list[int]
    last: bool


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

    def read_at(self, left: int, top: int) -> tuple[int, int]:
        """Column and row at which the tile is read that starts there."""
        return min(left, max(0, self.width - self.tile)), min(top, max(0, self.height - self.tile))

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
        tops = starts(self.height, self.tile, self.shared)
        for left, right in self.columns():
            finished = done.get(left, 0)
            xs = [x for x in starts(self.width, self.tile, self.shared) if x < right and x + self.tile > left]
            ends = [max(x, left) for x in xs[1:]] + [right]
            for top, until in zip(tops, [*tops[1:], self.height]):
                if finished < self.height and top + self.tile > finished:
                    for i in range(0, len(xs), batch):
                        part = slice(i, i + batch)
                        yield Job((left, right), top, until, xs[part], ends[part], i + batch >= len(xs))


class RowBlend:
    """Blends rows of tiles, one after the other, within one strip of columns.

    A window of a tile's size slides along the row and holds the sums of the columns that the tile at hand covers.
    Columns that no later tile of the row reaches leave it: the rows that no lower tile reaches are complete and get
    their classes, the sums of the others are pending until the next row of tiles. Sums are on the device of the scores.

    Args:
        classes: K.
        weights: (t,) of a tile along one side.
        shared: rows that a row of tiles shares with the next.
        strip: first and past-the-end column.
        nodata: the value of pixels without a class.

    Attributes:
        labels: classes (t, width of the strip); as many rows hold as the row of tiles completes.
        unscored: the pixels without a class because their scores are not finite, likewise.
    """

    def __init__(self, classes: int, weights: Tensor, shared: int, strip: tuple[int, int], nodata: int) -> None:
        self.classes, self.weights, self.shared, self.strip, self.nodata = classes, weights, shared, strip, nodata
        self.window: Tensor | None = None  # made with the first scores, where they are, as are the pending sums
        self.pending: Tensor | None = None
        self.loaded = strip[0]  # columns before this one are in the window, or have left it
        side, width = len(weights), strip[1] - strip[0]
        self.labels = np.empty((side, width), np.min_scalar_type(nodata))
        self.unscored = np.empty((side, width), bool)

    @staticmethod
    def sizes(tile: int, classes: int, shared: int) -> tuple[int, int]:
        """Bytes that are held, and further ones per column of the strip; those of writing its classes included."""
        return tile**2 * (4 * classes + 16), 4 * classes * shared + 8 * tile

    def add(self, x: int, end: int, complete: int, scores: Tensor | None, empty: Tensor) -> None:
        """Take the next tile of the row, or what of it counts.

        Args:
            x: its first column.
            end: columns before this one are covered by no later tile.
            complete: rows of the tile, from its first, that are covered by no lower one.
            scores: (K, h, w), None where all of the tile is empty.
            empty: (h, w), the pixels that get no class.
        """
        (first, last), (height, width) = self.strip, empty.shape
        left, right = max(x, first), min(x + width, last)
        if scores is not None and self.window is None:
            self._allocate(scores.device)
        here, there = slice(left - first, end - first), slice(left - x, end - x)
        self.labels[:complete, here], self.unscored[:complete, here] = self.nodata, False
        if self.window is not None:
            self._load(left, right)
            if scores is not None:
                weights = self.weights[:height, None] * self.weights[left - x : right - x]
                covered = self.window[:, :height, : right - left]
                covered.addcmul_(scores[:, :, left - x : right - x].float(), weights)
            if end > left:
                self._classify(here, complete, empty[:complete, there])
                self._pass_on(here, complete)
                self._slide(end - left, right - left)
        self.loaded = right if end < last else first

    def _allocate(self, device: torch.device) -> None:
        side, width = self.labels.shape
        self.window = torch.zeros(self.classes, side, side, device=device)
        self.pending = torch.zeros(self.classes, self.shared, width, device=device)
        self.weights = self.weights.to(device)

    def _load(self, left: int, right: int) -> None:
        """Put the pending sums of columns up to `right` into the window, which starts at `left`."""
        new = self.window[:, :, self.loaded - left : right - left]
        new[:, : self.shared] = self.pending[:, :, self.loaded - self.strip[0] : right - self.strip[0]]
        new[:, self.shared :] = 0

    def _classify(self, here: slice, complete: int, empty: Tensor) -> None:
        """Give the complete pixels at the window's upper left their classes."""
        best, labels = (found.cpu() for found in self.window[:, :complete, : empty.shape[1]].max(0))
        unscored = ~best.isfinite() & ~empty  # a NaN is the highest of its pixel
        labels[empty | unscored] = self.nodata
        self.labels[:complete, here], self.unscored[:complete, here] = labels.numpy(), unscored.numpy()

    def _pass_on(self, here: slice, complete: int) -> None:
        """Make the sums below the complete rows pending."""
        below = self.window[:, complete : complete + self.shared, : here.stop - here.start]
        self.pending[:, : below.shape[1], here] = below
        self.pending[:, below.shape[1] :, here] = 0

    def _slide(self, by: int, width: int) -> None:
        """Move the columns in use to the left, in parts that do not overlap with where they go."""
        for start in range(by, width, by):
            stop = min(start + by, width)
            self.window[:, :, start - by : stop - by] = self.window[:, :, start:stop]
