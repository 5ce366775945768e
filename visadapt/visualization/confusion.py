"""The confusion matrix of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import InputError
from .picture import save_figure


def plot_confusion(
    matrix: Sequence[Sequence[int]], classes: Sequence[str], png: str | Path, unit: str = "images"
) -> None:
    """Draw a confusion matrix; colour is the share of the true class, numbers are counts.

    Up to 20 classes carry their counts in the cells; of many classes only every n-th is named.

    Args:
        matrix: (K, K) counts, rows are the true classes.
        classes: K names.
        png: the picture.
        unit: what was counted.

    Raises:
        InputError: the matrix does not belong to the classes.
    """
    from matplotlib.figure import Figure

    counts = np.asarray(matrix)
    k = len(classes)
    if k == 0 or counts.shape != (k, k):
        raise InputError(f"a confusion matrix of {k} classes is ({k}, {k}), got {counts.shape}")
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(2.5 + 0.42 * k, 14)
    figure = Figure(figsize=(side + 1.6, side + 0.8), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes, fraction=0.04, pad=0.02, label="share of the true class")
    every = -(-k // 40)
    ticks = range(0, k, every)
    names = [name if len(name) <= 24 else name[:23] + "…" for name in map(str, classes)]
    axes.set_xticks(ticks, [names[i] for i in ticks], rotation=90 if max(map(len, names)) > 3 else 0, fontsize=8)
    axes.set_yticks(ticks, [names[i] for i in ticks], fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    total = counts.sum()
    axes.set_title(f"{total:,} {unit}, {counts.trace() / max(total, 1):.1%} right", fontsize=10)
    if k <= 20:
        for i, j in zip(*counts.nonzero()):
            axes.text(
                j, i, counts[i, j], ha="center", va="center", fontsize=8, color="white" if shares[i, j] > 0.5 else "0.2"
            )
    save_figure(png, figure)
