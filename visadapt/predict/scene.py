"""Class maps of whole scenes, of any size, in bounded memory."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..datasets.files import RASTERS, UnreadableImage
from ..errors import InputError
from ..visualization.masks import default_palette
from ._geotiff import Scene, rasterio
from ._growing import GrowingMask, partial_path
from .bands import Bands, listed
from .windows import Grid, Job, RowBand, ramp

MEMORY = 1 << 30
"""Bytes for everything but the model's weights, where nothing else is said."""
PIXEL = 1024
"""Bytes that a model is taken to need per pixel of a tile, beside its input and its scores."""


@dataclass
class SceneReport:
    """What was done.

    Attributes:
        out: the mask.
        width: in pixels.
        height: in pixels.
        tile: side of a tile.
        batch: tiles that were scored together at the end.
        halvings: how often memory ran out and the batch was halved.
        tiles: number of tiles that this run went through, the skipped ones without any data included.
        resumed: share of the scene that an earlier run had finished.
        nodata: share of the pixels without a class.
        unscored: pixels without a class because their scores were not finite.
        unreadable: damaged blocks of the file, each as (first column, first row, width, height).
        crs: the coordinate system, None where the file has none.
        seconds: of the whole run.
        model_seconds: of these, inside the model.
        notes: lines about how the scene was read.
    """

    out: Path
    width: int
    height: int
    tile: int
    batch: int
    halvings: int
    tiles: int
    resumed: float
    nodata: float
    unscored: int
    unreadable: list[tuple[int, ...]]
    crs: str | None
    seconds: float
    model_seconds: float
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report for a person: the result, then what is unusual about it."""
        share = self.model_seconds / self.seconds if self.seconds else 0.0
        said = [
            f"wrote {self.out}: {self.width} x {self.height} pixels, {self.tiles} tiles of {self.tile} px, "
            f"{self.batch} at once, {self.seconds:.1f} s, {share:.0%} of it in the model",
            *self.notes,
        ]
        if self.crs is None:
            said.append("the scene has no coordinate system, and so has the mask")
        if self.nodata:
            said.append(f"{self.nodata:.2%} of the pixels have no class")
        if self.unscored:
            said.append(f"{self.unscored} pixels have no class because their scores are not finite")
        if self.unreadable:
            blocks = ", ".join(f"{w} x {h} at column {x}, row {y}" for x, y, w, h in self.unreadable[:5])
            more = f" and {len(self.unreadable) - 5} more" if len(self.unreadable) > 5 else ""
            said.append(f"{len(self.unreadable)} damaged blocks have no class: {blocks}{more}")
        return said


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
    fits is one tile) and the batch (up to 16). Half is for the band of rows, which decides on the strips of columns.
    An eighth is for the cache of the file's blocks, and the rest is slack.

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
    row = tile * (4 * classes + RowBand.PER_PIXEL)  # bytes per column of the band
    if tile * row > memory // 2:
        raise InputError(
            f"{memory / 1e6:.0f} MB of memory are not enough for tiles of {tile} px with {classes} classes; "
            f"allow {2 * tile * row / 1e6:.0f} MB or use a smaller tile"
        )
    if batch is None:
        batch = max(1, min(16, int(memory / 4 / per_pixel / tile**2)))
    shared = min(int(overlap * tile), tile - 1)
    return Grid(width, height, tile, shared, strips=-(-width * row // (memory // 2))), batch


@torch.inference_mode()
def predict_scene(
    source: str | os.PathLike,
    out: str | os.PathLike,
    score: Callable[[Tensor], Tensor],
    classes: Sequence[str],
    *,
    channels: int,
    bands: Sequence[str] | None = None,
    file_bands: Sequence[str] | None = None,
    nodata: float | None = None,
    fill: float | None = None,
    tile: int | None = None,
    overlap: float = 0.25,
    batch: int | None = None,
    memory: int = MEMORY,
    key: str = "",
    progress: bool = True,
    resume: bool = True,
    colors: Sequence[Sequence[int]] | None = None,
) -> SceneReport:
    """Write the class map of a scene as a cloud-optimised GeoTIFF with the scene's coordinates.

    Tiles overlap, their scores are blended smoothly, and each pixel gets the class with the highest blended score; 255
    (65535 where there are more than 255 classes) stands where the scene has no data, see `Scene`, where its file is
    damaged, or where scores are not finite. The scene is never in memory as a whole; see `plan` for the budget. The
    mask grows in `<name>.partial.tif` beside `out`; after a kill the same call goes on from there.

    Args:
        source: any raster that rasterio opens.
        out: the mask, a .tif.
        score: values as in the file (B, C, t, t), uint8 or else float32, on the CPU, to scores (B, K, t, t), on any
            device.
        classes: K names.
        channels: C.
        bands: names of the C bands; see `Bands`, as are the arguments down to `fill`.
        file_bands: names of the bands in scenes that do not name them.
        nodata: the value without data; what the scene says where None.
        fill: the value of bands that the scene does not have; None makes that an error.
        tile: side in pixels; as `plan` says where None.
        overlap: share of a tile's side that neighbours have in common.
        batch: tiles at once; as `plan` says where None. Halved when memory runs out.
        memory: bytes for everything but the model's weights.
        key: names the model, so that another one does not go on with its partial file.
        progress: show a bar on a terminal.
        resume: go on where an earlier call with the same arguments was cut off.
        colors: red, green and blue per class, 0 to 255; easily told apart ones where None.

    Raises:
        UnreadableImage: the scene is missing or no raster, or none of its pixels can be read.
        UnsuitableImage: its bands are not those of the model.
        InputError: something about the files, the arguments or the free space is wrong, which is found
            before the first call of the model; or memory, or the disk, does not suffice later on.
    """
    start = time.perf_counter()
    source, out = Path(source), Path(out)
    check_places(source, out)
    colors = default_palette(len(classes)) if colors is None else [tuple(map(int, color)) for color in colors]
    if not classes or len(colors) != len(classes):
        raise InputError(f"{len(classes)} classes and {len(colors)} colours; a colour for each class is needed")
    reading = Bands(channels, bands, file_bands, nodata, fill)
    with rasterio.Env(GDAL_CACHEMAX=memory // 8), closing(Scene(source, reading)) as scene:
        grid, batch = plan(scene.width, scene.height, channels, len(classes), tile, overlap, batch, memory)
        mask, scorer = GrowingMask(out, scene, classes, colors), Scorer(score, len(classes), batch)
        if said := mask.start(_settings(source, scene, grid, classes, colors, key), resume):
            say(said)
        resumed = mask.share("pixels")
        tiles = _fill(mask, scene, grid, scorer, progress)
        if mask.unreadable and mask.share("nodata") == 1:
            mask.discard()
            raise UnreadableImage(f"{source} is damaged: none of its pixels can be read")
        mask.publish()
    return SceneReport(
        *(out, scene.width, scene.height, grid.tile, scorer.batch, scorer.halvings, tiles, resumed),
        *(mask.share("nodata"), mask.counts["unscored"], sorted(mask.unreadable), scene.crs),
        *(time.perf_counter() - start, scorer.seconds),
        [f"the scene does not name its bands; taken as {listed(scene.taken)}"] if scene.taken else [],
    )


def check_places(source: Path, out: Path) -> None:
    """Refuse a result that is no GeoTIFF, is a folder, or would overwrite the scene."""
    if out.suffix.lower() not in RASTERS:
        raise InputError(f"the mask of a scene is a GeoTIFF; give a name that ends in .tif, not {out}")
    if out.is_dir():
        raise InputError(f"cannot write {out}: it is a folder")
    for place in (out, partial_path(out)):
        if place.exists() and source.exists() and place.samefile(source):
            raise InputError(f"{source} would be overwritten; write the mask to another place than {out}")


def _settings(
    source: Path, scene: Scene, grid: Grid, classes: Sequence[str], colors: Sequence[Sequence[int]], key: str
) -> dict[str, Any]:
    """What the partial file depends on, each under the name by which a person knows it."""
    about = source.stat()
    file = f"{source.resolve()} {about.st_size} {about.st_mtime_ns}"
    look = hashlib.sha256(repr(([*classes], [tuple(c) for c in colors])).encode()).hexdigest()
    given = {"scene": file, "bands": scene.places, "tile": grid.tile, "overlap": grid.shared, "strips": grid.strips}
    for name, value in {"nodata": scene.bands.nodata, "fill": scene.bands.fill}.items():
        given[name] = None if value is None else str(value)  # a NaN is not equal to itself
    return given | {"classes": look, "model": key}


def _fill(mask: GrowingMask, scene: Scene, grid: Grid, scorer: Scorer, progress: bool) -> int:
    """Score all tiles that are missing in the mask, and write it band by band; the number of tiles."""

    def read(job: Job) -> tuple[Tensor, Tensor]:
        with rasterio.Env():  # GDAL reports errors per thread
            values, empty = zip(*(scene.tile(x, job.y, grid.tile) for x in job.xs))
        return torch.from_numpy(np.stack(values)), torch.from_numpy(np.stack(empty))

    jobs = [*grid.jobs(scorer.batch, mask.done)]
    weights, band, count = ramp(grid.tile, grid.shared), None, sum(len(job.xs) for job in jobs)
    bar = tqdm(total=count, unit="tile", disable=not (progress and sys.stderr.isatty()), leave=False)
    # closed here, also when the model fails: the thread must not read on from a file that is closed next
    with bar, closing(ahead(read, jobs)) as batches:
        for job, (tiles, empty) in batches:
            if band is None or band.strip != job.strip:
                band = RowBand(scorer.classes, weights, job.strip, job.y)
            for x, nothing in zip(job.xs, empty):
                band.mark(x, nothing)
            full = [i for i, nothing in enumerate(empty) if not nothing.all()]
            for i, scores in zip(full, scorer(tiles[full])):
                band.add(job.xs[i], scores)
            if job.until is not None:
                top = band.top
                labels, unscored = band.finish(job.until, mask.nodata)
                mask.write(labels.numpy(), unscored.numpy(), job.strip[0], top)
            bar.update(len(job.xs))
    return count
