"""Class maps of whole scenes, of any size, in bounded memory."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..datasets.files import RASTERS, UnreadableImage
from ..errors import InputError, counted
from ..visualization.masks import default_palette
from ._geotiff import Scene, rasterio
from ._growing import GrowingMask, partial_path
from .bands import Bands, listed
from .tiles import MEMORY, Scorer, plan, say, score_tiles
from .windows import Grid


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
        shares: part of the pixels of each class that occurs, by its name.
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
    shares: dict[str, float] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The report for a person: the result, then what is unusual about it."""
        share = self.model_seconds / self.seconds if self.seconds else 0.0
        said = [
            f"wrote {self.out}: {self.width} x {self.height} pixels, {counted(self.tiles, 'tile')} of {self.tile} px, "
            f"{self.batch} at once, {self.seconds:.1f} s, {share:.0%} of it in the model",
            *self.notes,
        ]
        if self.crs is None:
            said.append("the scene has no coordinate system, and so has the mask")
        if self.nodata:
            said.append(f"{self.nodata:.2%} of the pixels have no class")
        if self.unscored:
            said.append(f"without a class because their scores are not finite: {counted(self.unscored, 'pixel')}")
        if self.unreadable:
            blocks = ", ".join(f"{w} x {h} at column {x}, row {y}" for x, y, w, h in self.unreadable[:5])
            more = f" and {len(self.unreadable) - 5} more" if len(self.unreadable) > 5 else ""
            said.append(f"without a class: {counted(len(self.unreadable), 'damaged block')}, {blocks}{more}")
        return said


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
    with rasterio.Env(GDAL_CACHEMAX=memory // 16):
        with closing(Scene(source, reading)) as scene:
            grid, batch = plan(scene.width, scene.height, channels, len(classes), tile, overlap, batch, memory)
            mask, scorer = GrowingMask(out, scene, classes, colors), Scorer(score, len(classes), batch)
            if said := mask.start(_settings(source, scene, grid, classes, colors, key), resume):
                say(said)
            resumed = mask.share("pixels")
            tiles = score_tiles(mask, scene, grid, scorer, progress)
            if mask.unreadable and mask.share("nodata") == 1:
                mask.discard()
                raise UnreadableImage(f"{source} is damaged: none of its pixels can be read")
        mask.publish()
        shares = mask.shares()
    return SceneReport(
        *(out, scene.width, scene.height, grid.tile, scorer.batch, scorer.halvings, tiles, resumed),
        *(mask.share("nodata"), mask.counts["unscored"], sorted(mask.unreadable), scene.crs),
        *(time.perf_counter() - start, scorer.seconds),
        [f"the scene does not name its bands; taken as {listed(scene.taken)}"] if scene.taken else [],
        shares,
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
    given = {"scene": file, "bands": scene.places}
    given |= {"tile": grid.tile, "overlap": grid.shared, "strips": [left for left, _ in grid.columns()]}
    for name, value in {"nodata": scene.bands.nodata, "fill": scene.bands.fill}.items():
        given[name] = None if value is None else str(value)  # a NaN is not equal to itself
    return given | {"classes": look, "model": key}
