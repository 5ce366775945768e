"""A GeoTIFF, or whatever else rasterio opens, read tile by tile."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from ..datasets.files import UnreadableImage
from ..datasets.raster_files import cleaned
from ..errors import InputError
from .bands import Bands, UnsuitableImage
from .tiles import mirrored

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

    Values without data are those that equal the nodata value, or that a mask of the file leaves out. What `cleaned`
    says of them holds, as in training: they become 0, and a pixel is empty where all its bands have none.

    Args:
        path: the file.
        bands: those that the model takes.

    Attributes:
        crs: the coordinate system, None where the file has none.
        taken: names that the file does not give and its bands were taken to have, None where there are none.
        unreadable: damaged blocks met so far, each as (first column, first row, width, height).

    Raises:
        UnreadableImage: the file is missing or no raster.
        UnsuitableImage: its bands are not those of the model.
    """

    def __init__(self, path: Path, bands: Bands) -> None:
        self.path, self.bands = path, bands
        try:
            self.raster = open_raster(path)
        except rasterio.errors.RasterioError as error:
            raise UnreadableImage(f"{path} is missing, damaged or not a raster") from error
        self.width, self.height = self.raster.width, self.raster.height
        self.crs = None if self.raster.crs is None else self.raster.crs.to_string()
        alpha = [i for i, kind in enumerate(self.raster.colorinterp) if kind is ColorInterp.alpha]
        self.places, self.taken = bands.places(path, self.raster.descriptions, alpha)
        self.indexes = [place + 1 for place in self.places if place is not None]
        kinds = {self.raster.dtypes[i - 1] for i in self.indexes}
        if any(kind.startswith("complex") for kind in kinds):
            raise UnsuitableImage(f"{path} holds complex numbers; give the model whole or real ones")
        self.dtype = np.uint8 if kinds == {"uint8"} else np.float32
        self.file_dtype = np.result_type(*kinds)
        bands.filled(np.empty((len(self.indexes), 0, 0), self.file_dtype), self.places)  # an error now, not in a tile
        told = self.raster.nodatavals
        self.nodata = [told[i - 1] if bands.nodata is None else bands.nodata for i in self.indexes]
        self.masked = self._is_masked(alpha)
        self.unreadable: set[tuple[int, int, int, int]] = set()

    def _is_masked(self, alpha: list[int]) -> bool:
        """The file masks pixels, and not by a nodata value alone.

        An alpha band is data where the model takes it or where it has another name: GDAL calls the fourth of four 8-bit
        bands so, whatever it is.
        """
        names = self.taken if self.taken and len(self.taken) == self.raster.count else self.raster.descriptions
        hiding = [i for i in alpha if i not in self.places and (names[i] or "alpha").lower() == "alpha"]
        flags = [{*self.raster.mask_flag_enums[i - 1]} for i in self.indexes]
        plain = {MaskFlags.all_valid}, {MaskFlags.nodata}
        return any(f not in plain and (hiding or MaskFlags.alpha not in f) for f in flags)

    def close(self) -> None:
        self.raster.close()

    def tile(self, x: int, y: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Values (C, side, side), uint8 or float32, and where they are empty (side, side).

        A scene that is smaller than the tile is mirrored at its right and lower edges.
        """
        window = Window(x, y, min(side, self.width - x), min(side, self.height - y))
        with rasterio.Env():  # GDAL reports errors per thread
            try:
                values, empty = self._read(window)
            except rasterio.errors.RasterioIOError:
                values, empty = self._read_blocks(window)
        return mirrored(values, empty, side)

    def _read(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        values = self.raster.read(self.indexes, window=window, out_dtype=self.file_dtype)
        void = np.zeros(values.shape, bool)
        for plane, band, nodata in zip(void, values, self.nodata):
            if nodata is not None:
                np.equal(band, nodata, out=plane)
        if self.masked:
            void |= self.raster.read_masks(self.indexes, window=window) == 0
        values, empty = cleaned(values, void, axis=0)
        return self.bands.filled(values, self.places).astype(self.dtype, copy=False), empty

    def _read_blocks(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """What can be read of a window with damage: block by block of the file, the others empty."""
        high, wide = self.raster.block_shapes[0]
        values = np.zeros((len(self.places), window.height, window.width), self.dtype)
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
