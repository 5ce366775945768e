"""Accuracy against a cost, with the methods that no other beats in both, as an inline SVG picture."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, SOFT, LINE, ACCENT = "#010203", "#010204", "#010205", "#010206"
COLOURS = {INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)", ACCENT: "var(--accent)"}
"""Colours of the page in place of those drawn, so that a picture follows light and dark."""
FONT = 8.5
WIDTH, HEIGHT = 6.2, 4.6
"""Inches; 72 points each."""


class Point(NamedTuple):
    """A method: its cost, its accuracy in percent, and what to say when one points at it."""

    name: str
    x: float
    y: float
    tip: str


def front(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats in cost without being worse in accuracy, or the reverse; by rising cost."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


def pareto(points: Sequence[Point], across: str, upwards: str, name: str, size_axis: bool) -> str:
    """An SVG element.

    Args:
        points: at least one.
        across, upwards: what the axes show.
        name: a word that sets the ids in this picture apart from those of others on the page.
        size_axis: the cost is in bytes: a log axis.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    best = front(points)
    # text stays text: smaller, searchable, and in the font of the page
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, HEIGHT))
        axes = figure.add_axes((0.09, 0.11, 0.895, 0.865))
        _axes(axes, points, across, upwards, size_axis)
        axes.step([p.x for p in best], [p.y for p in best], where="post", color=ACCENT, linewidth=1.1, alpha=0.7)
        for number, point in enumerate(points):
            on_front = point in best
            (mark,) = axes.plot(point.x, point.y, "o", ms=6.5 if on_front else 5, color=ACCENT if on_front else SOFT)
            mark.set_markeredgewidth(0)
            mark.set_gid(f"{name}-{number}")
        _labels(axes, points, best)
        held = io.StringIO()
        figure.savefig(held, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(held.getvalue(), points, name, f"{upwards} against {across}")


def _axes(axes: Axes, points: Sequence[Point], across: str, upwards: str, size_axis: bool) -> None:
    """Ranges with room for labels, a light grid, no frame."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    xs, ys = np.array([p.x for p in points]), np.array([p.y for p in points])
    if size_axis:
        axes.set_xscale("log")
        axes.set_xlim(xs.min() / 1.6, xs.max() * 2.2)
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1,) if xs.max() > 30 * xs.min() else (1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: as_bytes(value, 1)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        room = 0.06 * (np.ptp(xs) or 1.0)
        axes.set_xlim(xs.min() - room, xs.max() + 2 * room)
    room = 0.05 * (np.ptp(ys) or 1.0)
    axes.set_ylim(ys.min() - 2 * room, ys.max() + 1.6 * room)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", color=LINE, labelcolor=SOFT, labelsize=FONT, length=0)
    axes.set_xlabel(across, fontsize=FONT + 0.5, color=INK, parse_math=False)
    axes.set_ylabel(upwards, fontsize=FONT + 0.5, color=INK, parse_math=False)


def _labels(axes: Axes, points: Sequence[Point], best: Sequence[Point]) -> None:
    """A name beside each point where there is room, those of the front first; a thin line where it is far off.

    Widths are estimated rather than measured, so that places do not hang on the fonts of a machine.
    """
    low, high, *spots = _on_page(axes, points)
    taken = [(x - 3.5, y - 3.5, x + 3.5, y + 3.5) for x, y in spots]  # boxes: left, bottom, right, top
    for (x, y), (x_next, y_next) in pairwise(_on_page(axes, best)[2:]):  # the steps of the front
        taken += [(x, y - 1, x_next, y + 1), (x_next - 1, y, x_next + 1, y_next)]
    for n in sorted(range(len(points)), key=lambda n: (points[n] not in best, -points[n].y)):
        bold = points[n] in best
        width, height = len(points[n].name) * FONT * (0.68 if bold else 0.62), 1.15 * FONT
        for angle, reach in _PLACES[bold]:
            x, y = spots[n] + reach * np.array([np.cos(angle), np.sin(angle)])
            left = x if np.cos(angle) > 0.3 else x - width if np.cos(angle) < -0.3 else x - width / 2
            box = np.array([left, y - height / 2, left + width, y + height / 2])
            others = np.array(taken)
            clear = (box[2:] <= others[:, :2]) | (others[:, 2:] <= box[:2])
            if clear.any(axis=1).all() and (box[:2] >= low).all() and (box[2:] <= high).all():
                break
        else:
            continue  # no room: the name is shown when one points at the mark
        taken.append(tuple(box))
        at = axes.transData.inverted().transform(np.array([box[0], y]) * axes.figure.dpi / 72)
        axes.text(
            *at,
            points[n].name,
            fontsize=FONT,
            color=ACCENT if bold else INK,
            fontweight="bold" if bold else "normal",
            va="center_baseline",
            parse_math=False,
        )
        if reach > _NEAR:
            end = axes.transData.inverted().transform(spots[n].clip(box[:2], box[2:]) * axes.figure.dpi / 72)
            axes.plot([points[n].x, end[0]], [points[n].y, end[1]], color=SOFT, linewidth=0.5, alpha=0.6, zorder=1)


_NEAR = 8.0
_ANGLES = {False: (0, 180, 90, 270, 40, -40, 140, -140), True: (180, 140, 90, 40, 270, -40, 0, -140)}
"""Degrees, in the order of trial, by whether the point is on the front, whose steps lead to the right."""
_PLACES = {
    bold: [(angle, reach) for reach in (_NEAR, 16.0, 26.0, 38.0) for angle in np.radians(angles)]
    for bold, angles in _ANGLES.items()
}


def _on_page(axes: Axes, points: Sequence[Point]) -> np.ndarray:
    """Places in points of a font, 72 to the inch: the lower left and upper right of the axes, then the points."""
    corners = axes.transAxes.transform([(0, 0), (1, 1)])
    return np.vstack([corners, axes.transData.transform([(p.x, p.y) for p in points])]) * 72 / axes.figure.dpi


def _inline(svg: str, points: Sequence[Point], name: str, title: str) -> str:
    """The SVG element in the colours of the page, with a tip for each point."""
    box = re.search(r'viewBox="([^"]*)"', svg)[1]
    inner = svg[svg.index(">", svg.index("<svg")) + 1 :]
    svg = f'<svg viewBox="{box}" role="img" aria-label="{html.escape(title)}">{inner}'
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ?[^;\"]*?(\d[\d.]*)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(rf'<g id="(?!{name}-)[^"]*"', "<g", svg)  # the same in every picture, and nothing refers to them
    svg = re.sub(r"\n\s*", "\n", svg).replace("xlink:href", "href")
    for drawn, shown in COLOURS.items():
        svg = svg.replace(drawn, shown)
    for number, point in enumerate(points):
        mark = f'<g id="{name}-{number}">'
        svg = svg.replace(mark, f"{mark}<title>{html.escape(point.tip)}</title>")
    return svg


def as_bytes(value: float, digits: int = 3) -> str:
    """A size for a person, to some digits: "31.0 kB", "2.72 MB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            whole = len(str(int(value / size)))
            return f"{value / size:.{max(digits - whole, 0)}f} {unit}"
    return f"{value:.0f} B"
