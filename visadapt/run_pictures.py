"""Pictures of what a task predicts: a sheet of labelled images, or a page of class maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .datasets.base import collate
from .datasets.masks import collate_masks
from .errors import counted
from .tasks.segment import Segmenter
from .visualization.masks import comparison, default_palette, legend
from .visualization.page import figure, table, write_page
from .visualization.picture import four_frames
from .visualization.sheet import SIDE, prediction_sheet

SHOWN = 40
"""Samples on the sheet of predictions."""

WORST, SPACED = 12, 8
"""Samples on the page of class maps: those with the most mistakes, and evenly spaced ones."""


def write_pictures(task: Any, metric: Any, dataset: Any, folder: Path) -> list[Path]:
    """Predictions of some samples of a data set that the metric has just seen all of."""
    write = mask_page if isinstance(task, Segmenter) else label_sheet
    return write(task, metric, dataset, folder)


def _spaced(dataset: Any, count: int) -> list[dict[str, Any]]:
    """Readable samples at equal distances."""
    places = sorted({round(i * (len(dataset) - 1) / (count - 1)) for i in range(count)})
    return [s for s in (dataset[i] for i in places) if s["valid"]]


@torch.no_grad()
def predict_samples(task: Any, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Predictions for some samples, in eval mode; class maps one by one, as images may differ in size."""
    task.eval()
    batches = [collate_masks([s]) for s in samples] if "mask" in samples[0] else [collate(samples)]
    found = [o for batch in batches for o in task(**task.data_preprocessor(batch), mode="predict")]
    return [{k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in o.items()} for o in found]


def label_sheet(task: Any, metric: Any, dataset: Any, folder: Path) -> list[Path]:
    """predictions.png: images with their predicted labels."""
    sheet, names = folder / "predictions.png", dataset.classes
    samples = _spaced(dataset, SHOWN)
    outputs = predict_samples(task, samples)
    if outputs and "probabilities" in outputs[0]:
        chosen = [[int(p > 0.5) for p in o["probabilities"]] for o in outputs]
        correct = [row == o["label"] for row, o in zip(chosen, outputs)]
        titles, truth = ([listed(row, names) for row in rows] for rows in (chosen, [o["label"] for o in outputs]))
    else:
        correct = [int(o["scores"].argmax()) == o["label"] for o in outputs]
        titles = [f"{names[o['scores'].argmax()]} {o['scores'].max():.0%}" for o in outputs]
        truth = [names[o["label"]] for o in outputs]
    titles = [t if right else f"{t}\ntrue: {true}" for t, true, right in zip(titles, truth, correct)]
    clips = bool(samples) and samples[0]["inputs"].ndim == 4
    shown = [
        four_frames(s["inputs"][: task.num_frames].numpy(), 2, SIDE) if clips else dataset.load(s["index"])
        for s in samples
    ]
    prediction_sheet(shown, titles, correct, sheet)
    return [sheet]


def listed(row: list[int], names: tuple[str, ...]) -> str:
    """Names of the classes of a multi-hot row."""
    return ", ".join(n for n, value in zip(names, row) if value) or "none"


def mask_page(task: Any, metric: Any, dataset: Any, folder: Path) -> list[Path]:
    """predictions.html: figures per class, the confusion matrix, and class maps beside the truth, worst first."""
    page, classes = folder / "predictions.html", list(dataset.classes)
    palette = getattr(dataset, "palette", None) or default_palette(len(classes))
    key = figure(legend(classes, palette))
    by_path = {dataset.name(i): i for i in range(len(dataset))}
    worst = [w for w in metric.report["worst"][:WORST] if w["path"] in by_path]
    shown = {
        "Worst images": [(dataset[by_path[w["path"]]], f"{w['path']}, mIoU {w['miou']:.3f}") for w in worst],
        "Evenly spaced images": [(s, s["path"]) for s in _spaced(dataset, SPACED)],
    }
    sections = {
        "Classes": [table(metric.report["per_class"], palette)],
        "Confusion": [figure((folder / "confusion.png").read_bytes())],
    }
    for heading, chosen in shown.items():
        outputs = predict_samples(task, [s for s, _ in chosen]) if chosen else []
        pictures = [
            comparison(s["inputs"].permute(1, 2, 0).numpy(), o["mask"].numpy(), o["pred"].numpy(), palette)
            for (s, _), o in zip(chosen, outputs)
        ]
        sections[heading] = [key, *(figure(p, caption) for p, (_, caption) in zip(pictures, chosen))]
    write_page(page, f"Predictions on {counted(len(dataset), getattr(dataset, 'unit', 'image'))}", sections)
    return [page]
