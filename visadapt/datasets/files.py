"""Where data lie on disk and how one image file is read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..errors import InputError, counted

REPOSITORY = Path(__file__).resolve().parents[2]
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
RASTERS = (".tif", ".tiff")
IMAGE_SUFFIXES = (*PICTURES, *RASTERS, ".npy")
RESIZABLE = (np.uint8, np.uint16, np.int16, np.float32, np.float64)
"""Types of arrays that OpenCV resizes; others become float32, as every image does on its way into a model."""

# OpenCV writes decoder complaints to stderr without the name of the file; the errors raised here carry it.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class UnreadableImage(InputError):
    """The file is missing or damaged. Wrong band counts and unknown formats are plain InputErrors."""


def _first_existing(what: str, candidates: Iterable[Path], advice: str) -> Path:
    places = list(dict.fromkeys(candidates))
    for place in places:
        if place.exists():
            return place
    raise InputError(f"{what} not found; looked at {', '.join(map(str, places))}; {advice}")


def data_root(name: str | Path) -> Path:
    """Folder of a data set.

    An absolute path, or one that exists as it stands, is returned unchanged. A plain name is looked for below
    `VISADAPT_DATA`; where that is not set, below `data/` and then `../shared/data`, each seen from the working
    directory and from the repository.

    Raises:
        InputError: there is no such folder; every place that was looked at is named.
    """
    name = Path(name).expanduser()
    root = os.environ.get("VISADAPT_DATA")
    if name.is_absolute():
        candidates = [name]
    elif root:
        candidates = [name, Path(root).expanduser() / name]
    else:
        homes = (Path.cwd(), REPOSITORY)
        bases = [*(home / "data" for home in homes), *(home.parent / "shared" / "data" for home in homes)]
        candidates = [name, *(base / name for base in bases)]
    place = _first_existing(f"data folder '{name}'", candidates, "set VISADAPT_DATA to the folder that holds it")
    if not place.is_dir():
        raise InputError(f"data folder '{name}': {place} is a file, a folder is needed")
    return place


def find_list(list_file: str | Path, root: Path) -> Path:
    """A list file as it stands, below the data set's root, or below the repository.

    Raises:
        InputError: it is in none of these places.
    """
    list_file = Path(list_file).expanduser()
    candidates = [list_file, root / list_file, REPOSITORY / list_file]
    below = "the data set's root" if root == Path() else root
    found = _first_existing(f"list file '{list_file}'", candidates, f"give its path, or its path below {below}")
    if not found.is_file():
        raise InputError(f"list file '{list_file}': {found} is a folder, a file is needed")
    return found


def read_text(path: Path) -> str:
    """The text of a list or a table.

    Raises:
        InputError: it cannot be read, or is not text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"list file {path} is not UTF-8 text; give a text file with one image per line") from error
    except OSError as error:
        raise InputError(f"list file {path} cannot be read: {(error.strerror or str(error)).lower()}") from error


def read_json(path: Path) -> Any:
    """What a json file holds.

    Raises:
        InputError: it is not json.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not json: {error.msg.lower()}") from error


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(line number from 1, text) of every line that is neither empty nor a `#` comment.

    Raises:
        InputError: the file is not text, or nothing is left.
    """
    lines = [(n, line.strip()) for n, line in enumerate(read_text(path).splitlines(), 1)]
    lines = [(n, line) for n, line in lines if line and not line.startswith("#")]
    if not lines:
        raise InputError(f"list file {path} names no image")
    return lines


def read_image(path: str | Path, channels: int = 3, advice: str = "set channels or convert it") -> np.ndarray:
    """Read one image.

    jpg, png, webp and bmp are decoded in RGB order; with `channels=3` grey is repeated to three bands, alpha is
    dropped, 16 bits become 8 and a camera's orientation tag is obeyed. npy holds (height, width, bands). tif with three
    8-bit bands is read as a picture, any other tif needs rasterio.

    Args:
        path: the file; its suffix decides how it is read.
        channels: the number of bands the caller needs.
        advice: what to do about an image with another number of bands, for the error.

    Returns:
        (H, W, channels), in the values and the type of the file; rarer types of arrays as float32.

    Raises:
        UnreadableImage: the file is missing or damaged, or holds values that are not finite.
        InputError: the format is unknown, or the number of bands is another one.
    """
    path = Path(path)
    suffix, data = path.suffix.lower(), content(path)
    if suffix == ".npy":
        image = read_array(path)
        image = image if image.dtype in RESIZABLE else image.astype(np.float32)
    elif suffix in RASTERS:
        image = _read_raster(path, data)
    else:
        image = decode(path, data, cv2.IMREAD_COLOR_RGB if channels == 3 else cv2.IMREAD_UNCHANGED)
    if image.size == 0 or (image.dtype.kind == "f" and not np.isfinite(image).all()):
        raise UnreadableImage(f"{path} has {'values that are not finite' if image.size else 'no pixels'}")
    if image.ndim == 2:
        image = image[..., None]
    if image.shape[2] == 1 and channels == 3:
        image = np.repeat(image, 3, axis=2)
    if image.shape[2] != channels:
        layout = f" (its array is {image.shape}, read as height, width, bands)" if suffix == ".npy" else ""
        raise InputError(f"{path} has {counted(image.shape[2], 'band')}{layout}, {channels} are needed; {advice}")
    return image


def content(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        UnreadableImage: it is missing.
        InputError: its suffix is none of an image.
    """
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        known = ", ".join(IMAGE_SUFFIXES)
        raise InputError(f"{path}: images of type '{path.suffix.lower()}' are not read; use one of {known}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImage(f"{path} cannot be read: {error.strerror}") from error


def _imdecode(data: bytes, flags: int) -> np.ndarray | None:
    """What OpenCV decodes; None for damaged data, and for the sizes beyond its limits that damaged headers give."""
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error:
        return None


def decode(path: Path, data: bytes, flags: int) -> np.ndarray:
    """The pixels of a picture, (H, W) or (H, W, C) in RGB or RGBA order.

    Raises:
        UnreadableImage: the data are damaged.
    """
    image = _imdecode(data, flags)
    if image is None:
        raise UnreadableImage(f"{path} is damaged or not an image")
    if flags == cv2.IMREAD_UNCHANGED and image.ndim == 3:
        return image[..., [2, 1, 0, 3][: image.shape[2]]]
    return image


def read_array(path: Path, mmap_mode: str | None = None) -> np.ndarray:
    """An npy of shape (height, width) or (height, width, bands); with `mmap_mode` it stays on disk.

    Raises:
        UnreadableImage: it is damaged.
        InputError: it is something else.
    """
    try:
        image = np.load(path, mmap_mode, allow_pickle=False)
    except Exception as error:  # a damaged header can fail in any way
        raise UnreadableImage(f"{path} is damaged or not an array of numbers") from error
    if image.ndim not in (2, 3) or image.dtype.kind not in "buif":
        raise InputError(f"{path} holds {image.dtype} {image.shape}; an image is numbers (height, width, bands)")
    return image


def _read_raster(path: Path, data: bytes) -> np.ndarray:
    image = _imdecode(data, cv2.IMREAD_UNCHANGED)
    if image is not None and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return image[..., ::-1]
    try:
        import rasterio
    except ImportError as error:
        raise InputError(
            f"{path} is {'damaged or ' if image is None else ''}not a tif of three 8-bit bands; reading others needs "
            "rasterio: pip install 'visadapt[geo]'"
        ) from error
    try:
        with rasterio.open(path) as raster:
            return np.moveaxis(raster.read(), 0, -1)
    except rasterio.errors.RasterioIOError as error:
        raise UnreadableImage(f"{path} is damaged or not a raster") from error
