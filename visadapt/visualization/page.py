"""A page in one HTML file that opens without a network: figures, tables and pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files import atomic

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 24px auto; max-width: 1360px; padding: 0 16px; color: #1c1c1c }
h1 { font-size: 22px } h2 { font-size: 17px; margin-top: 28px }
table { border-collapse: collapse } th, td { padding: 3px 12px; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left } th { font-weight: 600 }
figure { margin: 0 0 18px } figcaption { margin-bottom: 4px } img { max-width: 100%; height: auto }
i.patch { display: inline-block; width: 12px; height: 12px; border: 1px solid #777; margin-right: 7px }
"""


def _data(picture: np.ndarray | bytes) -> str:
    """A picture, or the bytes of a PNG file, as the source of an img tag."""
    if isinstance(picture, bytes):
        return f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    held = io.BytesIO()
    Image.fromarray(picture).save(held, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"


def figure(picture: np.ndarray | bytes, caption: str = "") -> str:
    """A picture (H, W, 3) uint8, or the bytes of a PNG, with a caption."""
    said = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure>{said}<img alt="{html.escape(caption)}" src="{_data(picture)}"></figure>'


def table(rows: Sequence[Mapping[str, Any]], colours: Sequence[tuple[int, int, int]] = ()) -> str:
    """Rows with the keys of the first as columns; `colours` puts a patch before the first cell of each row."""

    def cell(value: Any) -> str:
        shown = "-" if value is None else f"{value:.3f}" if isinstance(value, float) else value
        return f"{shown:,}" if isinstance(shown, int) else html.escape(str(shown))

    lines = ["<tr>" + "".join(f"<th>{html.escape(key)}</th>" for key in rows[0]) + "</tr>"]
    for n, row in enumerate(rows):
        cells = [cell(value) for value in row.values()]
        if n < len(colours):
            cells[0] = f'<i class="patch" style="background: rgb{tuple(colours[n])}"></i>{cells[0]}'
        lines.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def write_page(path: str | Path, title: str, sections: Mapping[str, Sequence[str]]) -> None:
    """Write the page; it appears whole or not at all.

    Args:
        path: the .html file.
        title: its heading.
        sections: pieces of HTML made by `figure` and `table`, by heading.
    """
    body = [f"<h1>{html.escape(title)}</h1>"]
    for heading, pieces in sections.items():
        body += [f"<h2>{html.escape(heading)}</h2>", *pieces]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    with atomic(Path(path)) as temporary:
        Path(temporary).write_text(f"<!doctype html><html><head>{head}</head><body>{''.join(body)}</body></html>")
