"""Accuracy, calibration and the worst mistakes of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from torchmetrics.functional.classification import binary_calibration_error

from ..errors import InputError
from ..registry import METRICS


class Outcome(NamedTuple):
    """One prediction, in plain values so that ranks can exchange it."""

    label: int
    predicted: int
    confidence: float
    in_top5: bool
    path: str
    valid: bool


@METRICS.register_module()
class ClassificationMetric(BaseMetric):
    """top1, top5, mean_class_accuracy and ece, all in [0, 1]; invalid samples are left out.

    top5 counts the min(5, K) highest scores. mean_class_accuracy is the mean over the classes that occur. ece is the
    expected calibration error of the winning score in 15 bins.

    After `evaluate` the main process holds in `report`: "per_class" (name, count, accuracy or None where the class does
    not occur), "confusion" (rows are the true classes), "worst" (the most confident mistakes: path, label, predicted,
    confidence) and "invalid", the number of samples left out.

    Args:
        worst: how many mistakes are kept.

    Attributes:
        figures: names of the metrics; a subclass that adds some adds their names.
    """

    figures: ClassVar[tuple[str, ...]] = ("top1", "top5", "mean_class_accuracy", "ece")
    default_prefix = ""  # an empty one keeps the keys bare; None would be warned about

    def __init__(self, worst: int = 20):
        super().__init__(collect_device="gpu")  # gathers objects over any backend; "cpu" leaves a folder behind
        self.worst = worst
        self.num_classes = 0
        self.report: dict[str, Any] = {}

    def process(self, data_batch: dict[str, Any], data_samples: Sequence[dict[str, Any]]) -> None:
        """Take in one batch.

        Args:
            data_batch: from `collate`: "labels", "path" and "valid".
            data_samples: one dict per image with "scores" (K,), probabilities.

        Raises:
            InputError: scores that are not finite.
        """
        scores = torch.stack([s["scores"] for s in data_samples]).detach().float().cpu()
        labels, valid = data_batch["labels"].cpu(), data_batch["valid"].tolist()
        self.num_classes = scores.shape[1]
        broken = [
            p for p, ok, fine in zip(data_batch["path"], scores.isfinite().all(1).tolist(), valid) if fine and not ok
        ]
        if broken:
            raise InputError(
                f"the scores of {broken[0]} are not finite: training has diverged; lower the learning rate"
            )
        top = scores.topk(min(5, self.num_classes))
        hits = (top.indices == labels[:, None]).any(1)
        columns = labels, top.indices[:, 0], top.values[:, 0], hits
        rows = zip(*(c.tolist() for c in columns), data_batch["path"], valid)
        self.results.extend(Outcome(*row) for row in rows)

    def compute_metrics(self, results: list[Outcome]) -> dict[str, float]:
        """Figures of all samples of all ranks; fills `report`.

        Raises:
            InputError: no valid sample, or another number of classes than the data set has.
        """
        kept = [Outcome(*r) for r in results if r[-1]]
        if not kept:
            raise InputError(f"none of the {len(results)} samples is valid: there is nothing to measure")
        names = (self.dataset_meta or {}).get("classes") or [str(i) for i in range(self.num_classes)]
        if len(names) != self.num_classes:
            raise InputError(f"the model gives {self.num_classes} scores, the data set has {len(names)} classes")
        labels, predicted = (np.array([getattr(o, key) for o in kept]) for key in ("label", "predicted"))
        right = labels == predicted
        confusion = np.zeros((len(names), len(names)), dtype=int)
        np.add.at(confusion, (labels, predicted), 1)
        counts = confusion.sum(1)
        recall = confusion.diagonal()[counts > 0] / counts[counts > 0]
        self.report = {
            "per_class": [
                {"name": n, "count": int(c), "accuracy": float(confusion[i, i] / c) if c else None}
                for i, (n, c) in enumerate(zip(names, counts))
            ],
            "confusion": confusion.tolist(),
            "worst": worst_mistakes(kept, names, self.worst),
            "invalid": len(results) - len(kept),
        }
        return {
            "top1": float(right.mean()),
            "top5": float(np.mean([o.in_top5 for o in kept])),
            "mean_class_accuracy": float(recall.mean()),
            "ece": calibration_error([o.confidence for o in kept], right),
        }


def worst_mistakes(outcomes: Sequence[Outcome], names: Sequence[str], limit: int) -> list[dict[str, Any]]:
    """The wrong predictions with the highest confidence, as path, label, predicted (class names) and confidence."""
    wrong = sorted((o for o in outcomes if o.label != o.predicted), key=lambda o: (-o.confidence, o.path))
    return [
        {"path": o.path, "label": names[o.label], "predicted": names[o.predicted], "confidence": o.confidence}
        for o in wrong[:limit]
    ]


def calibration_error(confidences: Sequence[float], right: np.ndarray) -> float:
    """Expected calibration error in 15 equal bins.

    Args:
        confidences: (N,) winning scores.
        right: (N,) bool.
    """
    # rounding may lift a probability above 1, and torchmetrics would then take all of them for logits
    confidences = torch.tensor(confidences).clamp(0, 1)
    return float(binary_calibration_error(confidences, torch.from_numpy(right).long(), n_bins=15))
