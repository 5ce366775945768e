"""A GeoTIFF, or whatever else rasterio opens, read tile by tile."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import InputError

try:
    import rasterio
    from rasterio.enums import ColorInterp, MaskFlags
    from rasterio.windows import Window
except ImportError as missing:
    raise InputError("scenes need rasterio: pip install 'visadapt[geo]'") from missing


def open_raster(path: Path, mode: str = "r", **profile):
    """`rasterio.open` that says nothing about files without coordinates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(path, mode, **profile)


class Scene:
    """A raster as tiles of values, with the pixels that hold none.

    A pixel is empty where the file's nodata value, mask or alpha band says so, or where a value is not finite. With a
    nodata value and several bands: unsigned types must hold it in all bands, since their 0 or 255 is also the value of
    dark or bright pixels in single bands; in other types one band suffices. The model sees 0 in empty pixels.

    Args:
        path: the file.
        channels: bands that the model takes.
        bands: their names. Where the file names its bands too, they are taken by name, in this order. Otherwise the
            file's bands are taken as they come, without an alpha band where that makes the count right.

    Attributes:
        crs: the coordinate system, None where the file has none.
        unreadable: damaged blocks met so far, each as (first column, first row, width, height).

    Raises:
        InputError: the file is missing or no raster, or its bands are not those of the model.
    """

    def __init__(self, path: Path, channels: int, bands: Sequence[str] | None) -> None:
        self.path = path
        try:
            self.raster = open_raster(path)
        except rasterio.errors.RasterioError as error:
            raise InputError(f"{path} is missing, damaged or not a raster") from error
        self.width, self.height = self.raster.width, self.raster.height
        self.crs = None if self.raster.crs is None else self.raster.crs.to_string()
        self.indexes = self._choose(channels, bands)
        kinds = {self.raster.dtypes[i - 1] for i in self.indexes}
        if any(kind.startswith("complex") for kind in kinds):
            raise InputError(f"{path} holds complex numbers; give the model whole or real ones")
        self.dtype = np.uint8 if kinds == {"uint8"} else np.float32
        unsigned = all(kind.startswith("uint") for kind in kinds)
        flags = {flag for i in self.indexes for flag in self.raster.mask_flag_enums[i - 1]}
        self.masked = flags != {MaskFlags.all_valid}
        self.one_suffices = MaskFlags.nodata in flags and not unsigned
        self.unreadable: set[tuple[int, int, int, int]] = set()

    def _choose(self, channels: int, bands: Sequence[str] | None) -> list[int]:
        names = self.raster.descriptions
        if bands and any(names):
            if missing := [name for name in bands if name not in names]:
                raise InputError(
                    f"{self.path} has the bands {_listed(names)} and the model takes {_listed(bands)}; "
                    f"missing: {_listed(missing)}"
                )
            return [names.index(name) + 1 for name in bands]
        found = [*self.raster.indexes]
        if len(found) != channels:
            found = [i for i in found if self.raster.colorinterp[i - 1] is not ColorInterp.alpha]
        if len(found) != channels:
            told = f" ({_listed(names)})" if any(names) else ""
            wanted = f" ({_listed(bands)})" if bands else ""
            raise InputError(f"{self.path} has {len(names)} bands{told} and the model takes {channels}{wanted}")
        return found

    def close(self) -> None:
        self.raster.close()

    def tile(self, x: int, y: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Values (C, side, side), uint8 or float32, and where they are empty (side, side).

        A scene that is smaller than the tile is mirrored at its right and lower edges.
        """
        window = Window(x, y, min(side, self.width - x), min(side, self.height - y))
        try:
            values, empty = self._read(window)
        except rasterio.errors.RasterioIOError:
            values, empty = self._read_blocks(window)
        missing = (0, side - window.height), (0, side - window.width)
        if missing != ((0, 0), (0, 0)):
            values = np.pad(values, ((0, 0), *missing), mode="reflect")
            empty = np.pad(empty, missing, mode="reflect")
        return values, empty

    def _read(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        values = self.raster.read(self.indexes, window=window, out_dtype=self.dtype)
        empty = np.zeros(values.shape[1:], bool)
        if self.masked:
            masks = self.raster.read_masks(self.indexes, window=window) == 0
            empty |= masks.any(0) if self.one_suffices else masks.all(0)
        if self.dtype == np.float32:
            empty |= ~np.isfinite(values).all(0)
        if empty.any():
            values[:, empty] = 0
        return values, empty

    def _read_blocks(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """What can be read of a window with damage: block by block of the file, the others empty."""
        high, wide = self.raster.block_shapes[0]
        values = np.zeros((len(self.indexes), window.height, window.width), self.dtype)
        empty = np.ones(values.shape[1:], bool)
        bottom, right = window.row_off + window.height, window.col_off + window.width
        for row in range(window.row_off // high * high, bottom, high):
            for col in range(window.col_off // wide * wide, right, wide):
                top, left = max(row, window.row_off), max(col, window.col_off)
                part = Window(left, top, min(col + wide, right) - left, min(row + high, bottom) - top)
                rows = slice(top - window.row_off, top - window.row_off + part.height)
                cols = slice(left - window.col_off, left - window.col_off + part.width)
                try:
                    values[:, rows, cols], empty[rows, cols] = self._read(part)
                except rasterio.errors.RasterioIOError:
                    block = col, row, min(wide, self.width - col), min(high, self.height - row)
                    self.unreadable.add(block)
        return values, empty


def _listed(names: Sequence[str | None]) -> str:
    return ", ".join(name or "unnamed" for name in names)
