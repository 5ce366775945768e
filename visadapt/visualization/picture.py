"""What all pictures share: values to show, text that fits, and whole files."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from einops import rearrange
from PIL import Image, ImageFont

from ..errors import InputError
from ..files import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP = 2
"""Pixels between the frames of a clip."""


def as_picture(image: np.ndarray) -> np.ndarray:
    """An image of any bands and type as (H, W, 3) uint8.

    8-bit RGB is returned unchanged. Grey is repeated; of more bands the first three are shown. Values that are not
    8-bit are stretched between their 2nd and 98th percentile.

    Args:
        image: (H, W) or (H, W, C).

    Raises:
        InputError: another shape.
    """
    image = image[..., None] if image.ndim == 2 else image
    if image.ndim != 3:
        raise InputError(f"a picture is (height, width, bands), got {image.shape}")
    image = image[..., :3] if image.shape[2] >= 3 else image[..., [0, 0, 0]]
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    low, high = np.nanpercentile(image, (2, 98))
    scaled = (image - low) / max(high - low, 1e-12)
    return (np.nan_to_num(scaled).clip(0, 1) * 255).astype(np.uint8)


def enlarge(image: np.ndarray, side: int) -> np.ndarray:
    """Repeat the pixels of a small picture (H, W, 3) as often as its longer side stays within `side` pixels."""
    factor = max(side // max(image.shape[:2]), 1)
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def to_side(image: np.ndarray, side: int) -> np.ndarray:
    """A picture (H, W, 3) whose longer side is `side` pixels; small ones keep hard pixel edges."""
    scale = side / max(image.shape[:2])
    size = max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1)
    return cv2.resize(image, size, interpolation=cv2.INTER_NEAREST_EXACT if scale > 1 else cv2.INTER_AREA)


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: it knows accents, Greek and Cyrillic."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def fit(text: str, width: int, size: int) -> str:
    """The text, or what fits of it into `width` pixels; its end, where a score stands, is kept."""
    measure = font(size).getlength
    if measure(text) <= width:
        return text
    head, tail = text[:-5].rstrip(), text[-5:]
    while head and measure(f"{head}…{tail}") > width:
        head = head[:-1]
    return f"{head}…{tail}"


def save_picture(path: str | Path, image: np.ndarray) -> None:
    """Write (H, W, 3) or (H, W) uint8 as PNG."""
    with atomic(path) as temporary:
        Image.fromarray(image).save(temporary, "PNG")


def save_figure(path: str | Path, figure: Figure) -> None:
    """Write a matplotlib figure as PNG."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, facecolor="white")


def four_frames(clip: np.ndarray, columns: int = 4, side: int | None = None) -> np.ndarray:
    """The first frame, two from between and the last, in reading order, with white gaps.

    Args:
        clip: (T, C, H, W), 8-bit.
        columns: 4 for a strip, 2 for a square.
        side: pixels of the longer side of the whole; None leaves frames as they are.

    Returns:
        (H', W', C).
    """
    frames = rearrange(clip[np.linspace(0, len(clip) - 1, 4).round().astype(int)], "t c h w -> t h w c")
    if side is not None:
        frames = np.stack([to_side(frame, (side - (columns - 1) * GAP) // columns) for frame in frames])
    padded = np.pad(frames, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    return rearrange(padded, "(row col) h w c -> (row h) (col w) c", col=columns)[:-GAP, :-GAP]
