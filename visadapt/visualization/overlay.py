"""A prediction written onto its image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from .picture import as_picture, enlarge, fit, font

SIDE = 256  # smaller images are enlarged to about this before text is put on them


def label_overlay(image: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    """Write lines of text on a dark band at the lower edge.

    Args:
        image: (H, W, C) of any size and type; tiny ones are enlarged without blur.
        lines: such as "cat 0.93"; what is too long is shortened in the middle.

    Returns:
        (H', W', 3) uint8.
    """
    picture = enlarge(as_picture(image), SIDE)
    if not lines:
        return picture
    height, width = picture.shape[:2]
    size = max(12, min(height, width) // 22)
    step, margin = size + size // 3, size // 2
    band = min(height, step * len(lines) + margin)
    picture = picture.copy()
    picture[height - band :] = picture[height - band :] * 0.35
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    for n, line in enumerate(lines):
        at = margin, height - band + margin // 2 + n * step
        draw.text(at, fit(line, width - 2 * margin, size), fill="white", font=font(size))
    return np.asarray(canvas)
