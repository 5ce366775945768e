"""Rasters with any number of bands, by name or by place, whole or a window at a time; and masks, as they are stored."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from ..errors import InputError
from .files import PICTURES, RASTERS, UnreadableImage, content, decode, read_array

# Pillow's modes, and the bands that OpenCV finds in such a picture; of others it makes what nobody asked for.
PICTURE_BANDS = {"1": 1, "L": 1, "I": 1, "I;16": 1, "P": 3, "RGB": 3, "RGBA": 4}
MASK_SUFFIXES = (".png", ".bmp", *RASTERS, ".npy")


@dataclass(frozen=True)
class Window:
    """A rectangle of pixels; a part of it may lie beyond the lower and the right edge of its image."""

    top: int
    left: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


@dataclass(frozen=True)
class Header:
    """What a raster says about itself.

    Attributes:
        size: (height, width).
        count: number of bands.
        names: of the bands, from the descriptions of a tif; None where not every band has one.
        nodata: the value of pixels without data, None if the file names none.
    """

    size: tuple[int, int]
    count: int
    names: tuple[str, ...] | None = None
    nodata: float | None = None


def read_header(path: str | Path) -> Header:
    """Size and bands of a file, without its pixels.

    Raises:
        UnreadableImage: it is missing or damaged.
        InputError: the format is unknown, or a tif is there but not rasterio.
    """
    path = Path(path)
    if path.suffix.lower() in RASTERS:
        with _raster(path) as raster:
            names = raster.descriptions if all(raster.descriptions) else None
            return Header(raster.shape, raster.count, names, raster.nodata)
    if path.suffix.lower() == ".npy":
        array = read_array(path, "r")
        return Header(array.shape[:2], array.shape[2] if array.ndim == 3 else 1)
    with _picture(path) as picture:
        mode, size = picture.mode, (picture.height, picture.width)
    if mode not in PICTURE_BANDS:
        raise InputError(f"{path} is a picture of mode {mode}; convert it to one of {', '.join(PICTURE_BANDS)}")
    return Header(size, PICTURE_BANDS[mode])


def read_bands(path: str | Path, rows: Sequence[int] | None = None, window: Window | None = None) -> np.ndarray:
    """Pixels of a tif, an npy (height, width, bands) or a picture, in the type of the file.

    Args:
        path: the file.
        rows: bands by their place from 0, in the order that is wanted; None takes all.
        window: the part to read; None takes the whole image.

    Returns:
        (H, W, bands); of a window that part which lies inside of the image.

    Raises:
        UnreadableImage: the file is missing or damaged.
        InputError: the format is unknown, or a tif is there but not rasterio.
    """
    path = Path(path)
    if path.suffix.lower() in RASTERS:
        place = None if window is None else tuple((part.start, part.stop) for part in window.slices)
        with _raster(path) as raster:  # which cuts the window at the edges
            return np.moveaxis(raster.read(None if rows is None else [row + 1 for row in rows], window=place), 0, -1)
    if path.suffix.lower() == ".npy":
        image = read_array(path, "r")
    else:
        image = decode(path, content(path), cv2.IMREAD_UNCHANGED)
    image = image[..., None] if image.ndim == 2 else image
    image = image if window is None else image[window.slices]
    return np.ascontiguousarray(image if rows is None else image[..., list(rows)])


def cleaned(pixels: np.ndarray, void: np.ndarray | bool, axis: int = -1) -> tuple[np.ndarray, np.ndarray]:
    """Values without data become 0; the one rule for the images of a training and the scenes of a prediction.

    Args:
        pixels: values of some bands, in the type of the file.
        void: which of them the file, or who knows it, says to be no data; broadcast to `pixels`.
        axis: that of the bands.

    Returns:
        The pixels with 0 for what is void or, as float32, not finite; and which pixels are empty: all their bands are
        void, or any value is not finite. They have no class.
    """
    void = np.broadcast_to(void, pixels.shape)
    if pixels.dtype.kind not in "f":
        return np.where(void, 0, pixels), void.all(axis)
    with np.errstate(over="ignore"):  # models take float32
        broken = ~np.isfinite(pixels.astype(np.float32, copy=False))
    return np.where(void | broken, 0, pixels), void.all(axis) | broken.any(axis)


def constant(fill: float, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """A band (H, W) that the file does not have, in the type of its others.

    Raises:
        InputError: the type has no such value.
    """
    limits = np.iinfo(dtype) if dtype.kind in "iu" else None
    if limits and not (fill == int(fill) and limits.min <= fill <= limits.max):
        raise InputError(f"fill={fill} is no value of {dtype} images")
    return np.full(shape, fill, dtype)


def read_mask(
    path: str | Path, colored: bool = False, window: Window | None = None
) -> tuple[np.ndarray, tuple[int, int]]:
    """What a mask file holds: indices, or colours. A png with a palette holds both.

    Args:
        path: png, bmp, tif or npy; jpg would smear labels.
        colored: read colours.
        window: the part to read; None takes the whole mask.

    Returns:
        (H, W) whole numbers as they stand in the file, or (H, W, 3) RGB; of a window that part which lies inside of the
        mask. And the (height, width) of the whole mask.

    Raises:
        UnreadableImage: the file is missing or damaged.
        InputError: it holds colours where indices are wanted or the other way round, or fractions.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in MASK_SUFFIXES:
        raise InputError(f"{path}: masks of type '{suffix}' are not read; use one of {', '.join(MASK_SUFFIXES)}")
    if suffix in PICTURES:
        mask = _mask_picture(path, colored)
        size = mask.shape[:2]
        mask = mask if window is None else mask[window.slices]
    else:
        mask, size = read_bands(path, None, window), read_header(path).size
        mask = mask[..., 0] if mask.shape[2] == 1 else mask
    bands = 1 if mask.ndim == 2 else mask.shape[2]
    if bands != (3 if colored else 1):
        advice = "leave out colors" if colored else "give colors=[...], or masks of class indices"
        raise InputError(f"mask {path} has {bands} band{'s' * (bands > 1)}, {3 if colored else 1} needed; {advice}")
    if mask.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            whole = mask.astype(np.int64)
        if not np.array_equal(whole, mask):
            raise InputError(f"mask {path} holds fractions or NaN; a mask holds class indices")
        mask = whole
    return mask, size


@contextmanager
def _picture(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as picture:
            yield picture
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} is too large for a picture ({error}); convert it to tif") from error
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        raise UnreadableImage(f"{path} is missing, damaged or not an image") from error


def _mask_picture(path: Path, colored: bool) -> np.ndarray:
    """OpenCV turns the indices of a palette into colours, so Pillow reads masks."""
    with _picture(path) as picture:
        if colored and picture.mode in ("P", "RGBA"):
            picture = picture.convert("RGB")
        mask = np.array(picture)
    return mask.astype(np.uint8) if mask.dtype == bool else mask


@contextmanager
def _raster(path: Path) -> Iterator[Any]:
    """A tif, opened by rasterio."""
    try:
        import rasterio
    except ImportError as error:
        raise InputError(f"{path}: bands of a tif are read by rasterio: pip install 'visadapt[geo]'") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(path) as raster:
                yield raster
    except rasterio.errors.RasterioIOError as error:
        raise UnreadableImage(f"{path} is missing, damaged or not a raster") from error
