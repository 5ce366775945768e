"""Class maps as pictures: overlays, mistakes and legends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw

from ..errors import InputError
from ..files import atomic
from ..ignored import IGNORED
from .picture import as_picture, fit, font

WRONG = (230, 30, 30)
SIDE, TEXT = 320, 13  # pixels

Colour = tuple[int, int, int]


def default_palette(count: int) -> list[Colour]:
    """Colours that are easy to tell apart, from matplotlib's "tab10" and "tab20"; they repeat after 20 classes."""
    import matplotlib

    table = matplotlib.colormaps["tab10" if count <= 10 else "tab20"].colors
    return [tuple(round(255 * v) for v in table[i % len(table)]) for i in range(count)]


def save_mask(path: str | Path, mask: np.ndarray, palette: Sequence[Colour]) -> None:
    """Write class indices (H, W) uint8 as a PNG that shows them in colours; 255 is black.

    Args:
        path: the file.
        mask: class indices, or 255.
        palette: a colour per class, 255 at most.
    """
    table = np.zeros((IGNORED + 1, 3), np.uint8)  # a shorter one has Pillow store fewer bits, which do not hold 255
    table[: len(palette)] = palette
    picture = Image.fromarray(mask)
    picture.putpalette(table.tobytes())
    with atomic(path) as temporary:
        picture.save(temporary, "PNG")


def mask_overlay(image: np.ndarray, mask: np.ndarray, palette: Sequence[Colour], opacity: float = 0.5) -> np.ndarray:
    """Classes in colour over an image; pixels of 255 show the image alone.

    Args:
        image: (H, W, C) of any bands and type.
        mask: (H, W) class indices, or 255.
        palette: a colour per class.
        opacity: of the colours.

    Returns:
        (H, W, 3) uint8.

    Raises:
        InputError: sizes differ, or a class has no colour.
    """
    picture = as_picture(image)
    if picture.shape[:2] != mask.shape:
        raise InputError(f"an overlay needs a mask of the image's size {picture.shape[:2]}, got {mask.shape}")
    known = mask != IGNORED
    if known.any() and mask[known].max() >= len(palette):
        raise InputError(f"the mask has the class {mask[known].max()} and the palette {len(palette)} colours")
    colours = np.array([*palette, (0, 0, 0)], np.float32)[np.where(known, mask, len(palette))]
    share = np.where(known, opacity, 0)[..., None]
    return (picture * (1 - share) + colours * share).round().astype(np.uint8)


def mistakes(image: np.ndarray, mask: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """The image in grey with the pixels in red where the prediction (H, W) is not the truth; 255 in the truth is none.

    Returns:
        (H, W, 3) uint8.
    """
    grey = cv2.cvtColor(as_picture(image), cv2.COLOR_RGB2GRAY)
    picture = np.repeat((grey * 0.6 + 90).astype(np.uint8)[..., None], 3, axis=2)
    picture[(mask != IGNORED) & (mask != pred)] = WRONG
    return picture


def comparison(
    image: np.ndarray, mask: np.ndarray | None, pred: np.ndarray, palette: Sequence[Colour], side: int = SIDE
) -> np.ndarray:
    """Image, truth, prediction and mistakes side by side with captions; image and prediction alone without a truth.

    Args:
        image: (H, W, C) of any bands and type; brought to the size of the prediction.
        mask: (H, W) class indices or 255, or None.
        pred: (H, W) class indices or 255.
        palette: a colour per class.
        side: the longer side of every part, in pixels.

    Returns:
        (H', W', 3) uint8.
    """
    picture = as_picture(image)
    if picture.shape[:2] != pred.shape:
        picture = cv2.resize(picture, pred.shape[::-1], interpolation=cv2.INTER_AREA)
    parts = {"image": picture}
    if mask is not None:
        parts["truth"] = mask_overlay(picture, mask, palette)
    parts["prediction"] = mask_overlay(picture, pred, palette)
    if mask is not None:
        parts["mistakes"] = mistakes(picture, mask, pred)
    scale = side / max(pred.shape)
    width, height = (max(round(n * scale), 1) for n in pred.shape[::-1])
    gap, caption = 6, TEXT + 8
    canvas = Image.new("RGB", (len(parts) * (width + gap) - gap, height + caption), "white")
    draw = ImageDraw.Draw(canvas)
    for n, (name, part) in enumerate(parts.items()):
        small = cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
        canvas.paste(Image.fromarray(small), (n * (width + gap), caption))
        draw.text((n * (width + gap), 2), fit(name, width, TEXT), fill=(20, 20, 20), font=font(TEXT))
    return np.asarray(canvas)


def legend(classes: Sequence[str], palette: Sequence[Colour], width: int = 640) -> np.ndarray:
    """A patch of colour and the name for every class, in as many lines as it takes: (H, width, 3) uint8."""
    places, x, y, line = [], 4, 4, TEXT + 10
    for name in classes:
        needed = TEXT + 6 + round(font(TEXT).getlength(name)) + 16
        if x > 4 and x + needed > width:
            x, y = 4, y + line
        places.append((x, y))
        x += needed
    canvas = Image.new("RGB", (width, y + line), "white")
    draw = ImageDraw.Draw(canvas)
    for (x, y), name, colour in zip(places, classes, palette):
        draw.rectangle((x, y, x + TEXT, y + TEXT), fill=colour, outline=(90, 90, 90))
        text = fit(name, width - x - TEXT - 6, TEXT)
        draw.text((x + TEXT + 6, y - 1), text, fill=(20, 20, 20), font=font(TEXT))
    return np.asarray(canvas)
