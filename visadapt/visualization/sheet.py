"""A contact sheet of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..errors import InputError
from .picture import as_picture, fit, font, save_picture, to_side

SIDE, FRAME, TEXT = 128, 4, 12  # pixels
WIDTH, LINE, MARGIN = SIDE + 36, TEXT + 4, 8
COLOURS = {True: (20, 140, 70), False: (205, 40, 40), None: (150, 150, 150)}


def prediction_sheet(
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    correct: Sequence[bool | None],
    path: str | Path,
    columns: int = 8,
) -> None:
    """Write a PNG with one framed picture and caption per image.

    Args:
        images: (H, W, C) each, of any size and type; tiny ones are enlarged without blur.
        titles: captions; a newline starts a second line. What is too long for the cell is shortened in the middle.
        correct: a green frame for True, a red one for False, a grey one for None.
        path: the PNG.
        columns: pictures in a row.

    Raises:
        InputError: no images, lists of different length, or fewer than one column.
    """
    if not images or not len(images) == len(titles) == len(correct):
        raise InputError(
            f"a sheet needs as many titles and marks as images, got {len(titles)}, {len(correct)}, {len(images)}"
        )
    if columns < 1:
        raise InputError(f"a sheet needs 1 column or more, got {columns}")
    lines = max(title.count("\n") + 1 for title in titles)
    height = SIDE + 2 * FRAME + lines * LINE + MARGIN
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * WIDTH, rows * height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, title, mark) in enumerate(zip(images, titles, correct)):
        middle, bottom = i % columns * WIDTH + WIDTH // 2, i // columns * height + MARGIN + 2 * FRAME + SIDE
        picture = to_side(as_picture(image), SIDE)
        high, wide = picture.shape[:2]
        x, y = middle - wide // 2, bottom - FRAME - high
        frame = x - FRAME, y - FRAME, x + wide + FRAME - 1, bottom - 1
        draw.rectangle(frame, fill=COLOURS[None if mark is None else bool(mark)])
        sheet.paste(Image.fromarray(picture), (x, y))
        for n, line in enumerate(title.split("\n")):
            at = middle, bottom + 3 + n * LINE
            draw.text(at, fit(line, WIDTH - 8, TEXT), fill=(20, 20, 20), font=font(TEXT), anchor="ma")
    save_picture(path, np.asarray(sheet))
