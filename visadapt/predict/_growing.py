"""A class map on disk while it grows, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.shutil import copy
from rasterio.windows import Window

from ..errors import InputError
from ..files import atomic
from ._geotiff import Scene, open_raster
from .tiles import named_shares


def partial_path(out: Path) -> Path:
    return out.with_name(f"{out.stem}.partial.tif")


class GrowingMask:
    """A mask beside its final place: `<name>.partial.tif` and the journal `<name>.partial.jsonl`.

    The file has its full size from the start and is not compressed, so that blocks are changed in place and a kill
    harms nothing that the journal calls finished. `publish` makes a cloud-optimised GeoTIFF of it.

    Args:
        out: final place.
        scene: where size, coordinates and transform come from.
        classes: names; they go into the tag `classes` as a JSON list.
        colors: red, green and blue per class.

    Attributes:
        nodata: the value of pixels without a class, 255, or 65535 where there are more than 255 classes.
        done: finished rows, by the first column of the strip.
        counts: finished pixels, those without a class, and those of them whose scores were not finite.
        unreadable: damaged blocks that the journal names.
    """

    def __init__(self, out: Path, scene: Scene, classes: Sequence[str], colors: Sequence[Sequence[int]]) -> None:
        self.out, self.scene, self.classes, self.colors = out, scene, classes, colors
        self.dtype, self.nodata = ("uint8", 255) if len(classes) <= 255 else ("uint16", 65535)
        self.partial = partial_path(out)
        self.journal = self.partial.with_suffix(".jsonl")
        self.size = scene.width * scene.height * np.dtype(self.dtype).itemsize
        self.done: dict[int, int] = {}
        self.counts = {"pixels": 0, "nodata": 0, "unscored": 0}
        self.unreadable: set[tuple[int, ...]] = set()

    def start(self, settings: dict[str, Any], resume: bool) -> str:
        """Go on with the partial file where it was made with the same settings; make a new one otherwise.

        Returns:
            What there is to say about it, or "".

        Raises:
            InputError: there is no room, or the folder cannot be written.
        """
        said, entries = "", self._entries()
        if resume and entries and self.partial.exists():
            other = [key for key, value in settings.items() if entries[0].get(key) != value]
            if not other:
                for entry in entries[1:]:
                    self._count(entry)
                with atomic(self.journal) as temporary:  # without the rest of a line that a kill cut off
                    temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
                return f"going on with {self.partial}: {self.share('pixels'):.0%} is there"
            said = f"{self.partial} is of other settings ({', '.join(other)}); starting anew"
        try:
            self._create()
            self.journal.write_text(json.dumps(settings) + "\n")
        except OSError as error:  # rasterio's own errors are OSErrors too
            raise InputError(f"cannot write {self.partial}: {error.strerror or error}") from error
        return said

    def _create(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        for old in (self.journal, self.partial):
            old.unlink(missing_ok=True)
        raster = self.scene.raster
        profile = dict(driver="GTiff", width=raster.width, height=raster.height, count=1, dtype=self.dtype)
        profile |= dict(crs=raster.crs, transform=raster.transform, nodata=self.nodata, bigtiff="if_safer")
        with open_raster(self.partial, "w", **profile, tiled=True, blockxsize=256, blockysize=256) as mask:
            mask.update_tags(classes=json.dumps([*self.classes]))
            mask.set_band_description(1, "class")
            mask.write_colormap(1, {i: (*color, 255) for i, color in enumerate(self.colors)})
        if self.partial.stat().st_size < self.size:  # GDAL does not say so when it closes a file on a full disk
            self.partial.unlink()
            raise InputError(f"no space left for {self.partial}: {self.room()}")

    def room(self) -> str:
        """What is needed and what there is, in words."""
        free = shutil.disk_usage(self.out.parent).free
        return f"it takes {self.size / 1e6:.1f} MB, and up to as much again at the end; {free / 1e6:.1f} MB are free"

    def _entries(self) -> list[dict[str, Any]]:
        """Lines of the journal up to the first that a kill cut off."""
        entries = []
        with suppress(OSError, ValueError):
            for line in self.journal.read_text().splitlines():
                entries.append(json.loads(line))
        return entries

    def _count(self, entry: dict[str, Any]) -> None:
        self.done[entry["column"]] = entry["rows"]
        for key in self.counts:
            self.counts[key] += entry[key]
        self.unreadable |= {tuple(block) for block in entry["unreadable"]}

    def share(self, of: str) -> float:
        """Share of the scene that is finished ("pixels"), or finished without a class ("nodata")."""
        return self.counts[of] / (self.scene.width * self.scene.height)

    def write(self, labels: np.ndarray, unscored: np.ndarray, column: int, top: int) -> None:
        """Write a finished band of rows (rows, width) of a strip; one that was finished before is left alone.

        Args:
            labels: classes.
            unscored: where the scores were not finite.
            column: first column of the strip.
            top: row of the scene that `labels` starts with.

        Raises:
            InputError: the disk takes no more.
        """
        if top < self.done.get(column, 0):  # scored again for the rows below, which share tiles with these
            return
        window = Window(column, top, labels.shape[1], labels.shape[0])
        entry = {"column": column, "rows": top + len(labels), "pixels": labels.size}
        entry |= {"nodata": int((labels == self.nodata).sum()), "unscored": int(unscored.sum())}
        entry |= {"unreadable": sorted(self.scene.unreadable)}
        try:
            with open_raster(self.partial, "r+") as mask:
                mask.write(labels, 1, window=window)
            with open_raster(self.partial) as mask:  # GDAL closes a file without a word about blocks it could not write
                if not np.array_equal(mask.read(1, window=window), labels):
                    raise OSError("the disk did not take it")
            with open(self.journal, "a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.partial}: {error.strerror or error}; {self.room()}") from error
        self._count(entry)

    def publish(self) -> None:
        """Put the finished mask in its place, and take the partial file away.

        Raises:
            InputError: there is no room; the partial file stays, and the next run has only this to do.
        """
        with atomic(self.out) as temporary:
            try:
                copy(self.partial, temporary, driver="COG", compress="deflate", overview_resampling="mode")
                with open_raster(self.partial) as grown, open_raster(temporary) as copied:
                    if grown.checksum(1) != copied.checksum(1):
                        raise OSError("the disk did not take it")
            except Exception as error:  # GDAL's errors have no public base
                raise InputError(
                    f"cannot write {self.out}: {error}; {self.room()}; {self.partial} is complete, the next run goes on"
                ) from error
        self.discard()

    def shares(self) -> dict[str, float]:
        """Part of the pixels of each class that occurs in the finished mask, by its name."""
        counts = np.zeros(len(self.classes), np.int64)
        with open_raster(self.out) as mask:
            for _, window in mask.block_windows(1):
                counts += np.bincount(mask.read(1, window=window).ravel(), minlength=self.nodata + 1)[: len(counts)]
        return named_shares(counts, self.size // np.dtype(self.dtype).itemsize, self.classes)

    def discard(self) -> None:
        """Take the partial file away."""
        for finished in (self.journal, self.partial):
            os.unlink(finished)
