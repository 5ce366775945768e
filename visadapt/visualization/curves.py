"""Loss, metrics and learning rate of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .picture import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = dict[int, float]  # step -> value


def read_metrics(metrics_jsonl: str | Path) -> dict[str, Series]:
    """The series of a file with one JSON object per line.

    Each object has "step" and any number of figures. Of two lines with the same step the later one counts, so that a
    resumed run overwrites what it repeats. A last line that was cut off is left out.

    Returns:
        series by name, each in order of its steps.

    Raises:
        InputError: no such file, a broken line, or no figures.
    """
    path = Path(metrics_jsonl)
    if not path.is_file():
        raise InputError(f"no metrics file {path}; give the metrics.jsonl of a run")
    lines = [(n, line) for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if line.strip()]
    series: dict[str, Series] = {}
    for n, line in lines:
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError) as error:
            if n == lines[-1][0]:
                break
            raise InputError(f"{path}:{n}: not a JSON object with a 'step'") from error
        for name, value in entry.items():
            if name not in ("step", "epoch") and isinstance(value, int | float):
                series.setdefault(name, {})[step] = float(value)
    if not series:
        raise InputError(f"{path} holds no figures yet")
    return {name: dict(sorted(values.items())) for name, values in series.items()}


def plot_curves(metrics_jsonl: str | Path, png: str | Path) -> None:
    """Draw the losses, the metrics of validation and the learning rate over the steps.

    Args:
        metrics_jsonl: see `read_metrics`. "loss..." and "val/loss..." share a panel, other "val/..." figures have one,
            "lr" has one; other names are left out.
        png: the picture.

    Raises:
        InputError: as of `read_metrics`, or nothing of these to draw.
    """
    from matplotlib.figure import Figure

    series = read_metrics(metrics_jsonl)
    panels = {
        "loss": {n: s for n, s in series.items() if n.removeprefix("val/").startswith("loss")},
        "validation": {
            n.removeprefix("val/"): s for n, s in series.items() if n.startswith("val/") and "loss" not in n
        },
        "learning rate": {n: s for n, s in series.items() if n == "lr"},
    }
    panels = {title: group for title, group in panels.items() if group}
    if not panels:
        raise InputError(f"{metrics_jsonl} has neither loss, nor val/..., nor lr; it has {', '.join(sorted(series))}")
    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    for axes, (title, group) in zip(figure.subplots(1, len(panels), squeeze=False, sharex=True)[0], panels.items()):
        _draw(axes, title, group)
    save_figure(png, figure)


def _draw(axes: Axes, title: str, group: dict[str, Series]) -> None:
    from matplotlib.ticker import MaxNLocator

    for name, values in group.items():
        few = len(values) <= 30
        axes.plot(
            list(values), list(values.values()), label=name, marker="o" if few else None, markersize=3, linewidth=1.2
        )
    values = [v for s in group.values() for v in s.values() if math.isfinite(v)]
    if title == "loss" and values and min(values) > 0 and max(values) > 50 * min(values):
        axes.set_yscale("log")
    if title == "learning rate":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    if len(group) > 1:
        axes.legend(fontsize=8)
