"""The pictures and tables that a training run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import broadcast_object_list
from torch.utils.data import DataLoader

from .checkpoint import unwrap
from .core.io import load_adapter, read_manifest
from .files import atomic
from .run_pictures import write_pictures
from .tasks.segment import Segmenter
from .visualization.confusion import plot_confusion
from .visualization.curves import plot_curves


def write_report(runner: Any) -> list[Path]:
    """Curves, and with a validation set the sheet of predictions, the confusion matrix and the per-class report.

    The best adapter file is loaded first, so that figures and pictures show what users get. In a distributed run every
    process calls this, as each of them measures its share of the images; the main one alone writes.

    Returns:
        What this process wrote, the adapter files among it.
    """
    folder, main_process = Path(runner.work_dir), runner.rank == 0
    written = [folder / "curves.png"]
    best = folder / "adapter_best.safetensors"
    if main_process:
        plot_curves(folder / "metrics.jsonl", written[0])
    again = needs_evaluation(runner, best)
    if again is not None:
        task, loop = unwrap(runner.model), runner.val_loop
        load_adapter(task.adapted, best, heads=task.heads)
        if again:
            evaluate(task, loop.dataloader, loop.evaluator)
        if main_process:
            dataset = loop.dataloader.dataset
            written += evaluation_files(task, loop.evaluator.metrics[0], getattr(dataset, "source", dataset), folder)
    return [*written, *sorted(folder.glob("adapter_*.safetensors"))] if main_process else []


def needs_evaluation(runner: Any, best: Path) -> bool | None:
    """Whether the best adapter file is older than the last validation; None where there is no such file or validation.

    The main process decides for all: one that took the other branch would leave the rest waiting for its share.
    """
    found = [None]
    if runner.rank == 0 and runner.val_loop is not None and best.exists():
        found = [read_manifest(best)["iter"] != runner.iter]
    broadcast_object_list(found)
    return found[0]


@torch.no_grad()
def evaluate(task: Any, loader: DataLoader, evaluator: Any) -> dict[str, float]:
    """Metrics of a task over a loader, in eval mode."""
    task.eval()
    for batch in loader:
        evaluator.process(task(**task.data_preprocessor(batch), mode="predict"), batch)
    return evaluator.evaluate(len(loader.dataset))


def evaluation_files(task: Any, metric: Any, dataset: Any, folder: Path) -> list[Path]:
    """report.json and confusion.png of the metric's last evaluation, and pictures of some predictions."""
    report, confusion = folder / "report.json", folder / "confusion.png"
    with atomic(report) as temporary:
        temporary.write_text(json.dumps(metric.report, indent=1))
    written = [report]
    if "confusion" in metric.report:  # there is none where an image may have several classes
        unit = "pixels" if isinstance(task, Segmenter) else f"{getattr(dataset, 'unit', 'image')}s"
        plot_confusion(metric.report["confusion"], dataset.classes, confusion, unit)
        written.append(confusion)
    return [*written, *write_pictures(task, metric, dataset, folder)]
