"""Average precision and F1 of images with any number of classes each."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, ClassVar, NamedTuple

import torch
from mmengine.evaluator import BaseMetric
from torch import Tensor
from torchmetrics.functional.classification import binary_average_precision, binary_f1_score

from ..errors import InputError
from ..registry import METRICS


class Outcome(NamedTuple):
    """One prediction, in plain values so that ranks can exchange it."""

    labels: list[int]
    probabilities: list[float]
    path: str
    valid: bool


@METRICS.register_module()
class MultilabelMetric(BaseMetric):
    """map_macro, map_micro, f1_macro and f1_micro, all in [0, 1]; invalid samples are left out.

    Macro is the mean of the classes' own figures, micro the figure of all pairs of image and class together. Average
    precision has no threshold; F1 takes a class as predicted where its probability is above 0.5. map_macro leaves out
    classes that no image has, f1_macro those that are neither in the labels nor predicted.

    After `evaluate` the main process holds in `report`: "per_class" (name, count, and average_precision and f1, or None
    where they are not defined), "worst" (the images with the most wrong classes: path, missed and added, as class
    names) and "invalid", the number of samples left out.

    Args:
        worst: how many images are kept.

    Attributes:
        figures: names of the metrics; a subclass that adds some adds their names.
    """

    figures: ClassVar[tuple[str, ...]] = ("map_macro", "map_micro", "f1_macro", "f1_micro")
    default_prefix = ""  # an empty one keeps the keys bare; None would be warned about

    def __init__(self, worst: int = 20):
        super().__init__(collect_device="gpu")  # gathers objects over any backend; "cpu" leaves a folder behind
        self.worst = worst
        self.report: dict[str, Any] = {}

    def process(self, data_batch: dict[str, Any], data_samples: Sequence[dict[str, Any]]) -> None:
        """Take in one batch.

        Args:
            data_batch: from `collate`: "labels" (B, K) of 0 and 1, "path" and "valid".
            data_samples: one dict per image with "probabilities" (K,), each class by itself.

        Raises:
            InputError: a task whose classes exclude each other, labels that are class indices or of another number of
                classes, or probabilities that are not finite.
        """
        if "probabilities" not in data_samples[0]:
            raise InputError(
                "MultilabelMetric: the model's scores are shares of classes that exclude each other; take the task "
                "MultilabelClassifier"
            )
        probabilities = torch.stack([s["probabilities"] for s in data_samples]).detach().float().cpu()
        labels, valid = data_batch["labels"].cpu(), data_batch["valid"].tolist()
        if labels.shape != probabilities.shape:
            raise InputError(
                f"MultilabelMetric: the model gives {tuple(probabilities.shape)} probabilities, the labels are "
                f"{tuple(labels.shape)}; take a data set with multi-hot labels, or set num_classes"
            )
        finite = probabilities.isfinite().all(1).tolist()
        broken = [p for p, ok, fine in zip(data_batch["path"], finite, valid) if fine and not ok]
        if broken:
            raise InputError(
                f"the scores of {broken[0]} are not finite: training has diverged; lower the learning rate"
            )
        rows = zip(labels.tolist(), probabilities.tolist(), data_batch["path"], valid)
        self.results.extend(Outcome(*row) for row in rows)

    def compute_metrics(self, results: list[Outcome]) -> dict[str, float]:
        """Figures of all samples of all ranks; fills `report`.

        Raises:
            InputError: no valid sample, no sample with a class, or another number of classes than the data set has.
        """
        kept = [o for o in (Outcome(*r) for r in results) if o.valid]
        if not any(any(o.labels) for o in kept):
            raise InputError(
                f"{len(kept)} of {len(results)} samples are valid and none has a class: there is nothing to measure"
            )
        labels = torch.tensor([o.labels for o in kept])
        probabilities = torch.tensor([o.probabilities for o in kept])
        names = (self.dataset_meta or {}).get("classes") or [str(i) for i in range(labels.shape[1])]
        if len(names) != labels.shape[1]:
            raise InputError(f"the model gives {labels.shape[1]} scores, the data set has {len(names)} classes")
        predicted = probabilities > 0.5
        rows = [
            {
                "name": name,
                "count": int(t.sum()),
                "average_precision": float(binary_average_precision(p, t)) if t.any() else None,
                "f1": float(binary_f1_score(p, t)) if t.any() or y.any() else None,
            }
            for name, p, t, y in zip(names, probabilities.T, labels.T, predicted.T)
        ]
        self.report = {
            "per_class": rows,
            "worst": worst_images(kept, predicted, names, self.worst),
            "invalid": len(results) - len(kept),
        }
        every_pair = probabilities.flatten(), labels.flatten()
        return {
            "map_macro": mean_of(rows, "average_precision"),
            "map_micro": float(binary_average_precision(*every_pair)),
            "f1_macro": mean_of(rows, "f1"),
            "f1_micro": float(binary_f1_score(*every_pair)),
        }


def mean_of(rows: Sequence[dict[str, Any]], key: str) -> float:
    """Mean over the classes where a figure is defined."""
    return fmean(row[key] for row in rows if row[key] is not None)


def worst_images(
    outcomes: Sequence[Outcome], predicted: Tensor, names: Sequence[str], limit: int
) -> list[dict[str, Any]]:
    """The images with the most wrong classes: path, and the names of missed and of added ones.

    Args:
        outcomes: N images.
        predicted: (N, K) bool.
        names: K class names.
        limit: how many images are kept.
    """
    found = []
    for outcome, row in zip(outcomes, predicted.tolist()):
        columns = list(zip(names, outcome.labels, row))
        missed, added = [n for n, t, y in columns if t and not y], [n for n, t, y in columns if y and not t]
        if missed or added:
            found.append({"path": outcome.path, "missed": missed, "added": added})
    return sorted(found, key=lambda row: (-len(row["missed"]) - len(row["added"]), row["path"]))[:limit]
