"""Overlap and boundary figures of a segmentation, and its worst images."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot
from typing import Any, NamedTuple

import cv2
import numpy as np
from mmengine.evaluator import BaseMetric

from ..errors import InputError
from ..ignored import IGNORED
from ..registry import METRICS


class Outcome(NamedTuple):
    """What is kept of one image, so that ranks can exchange it.

    The confusion is stored by its cells that are not 0: with K classes most of the K x K are.
    """

    path: str
    valid: bool
    cells: np.ndarray  # true class * K + predicted class
    counts: np.ndarray  # pixels of each cell
    edges: np.ndarray  # (K, 4), see boundary_counts


@METRICS.register_module()
class SegmentationMetric(BaseMetric):
    """miou, mf1, mean_accuracy, pixel_accuracy and boundary_f, all in [0, 1]; invalid samples are left out.

    The first four are of the confusion of all labelled pixels of all images. miou and mf1 are means over the classes
    that occur in truth or prediction, mean_accuracy over those that occur in the truth (their recall).

    boundary_f is the boundary score of Csurka et al. (BMVC 2013): how much of the predicted boundary of a class lies
    near its true boundary and the reverse, as F1 per class and image, mean over images, then over classes; see
    `boundary_counts`. A class without boundary in truth and prediction of an image is left out there; the figure is
    missing where that leaves nothing, e.g. where every image has one class all over.

    After `evaluate` the main process holds in `report`: "per_class" (name, pixels in the truth, and iou, f1, precision,
    recall or None where they are not defined), "confusion" (rows are the true classes), "worst" (images by lowest mean
    iou: path, miou, and the commonest confusion in it as label, predicted and pixels) and "invalid", the number of
    samples left out.

    Args:
        boundary: what "near" means, as a share of the image's diagonal, at least 1 pixel; 0 leaves boundary_f out.
        worst: how many images are kept.

    Attributes:
        figures: names of the metrics; a subclass that adds some adds their names.

    Raises:
        InputError: a negative boundary.
    """

    default_prefix = ""  # an empty one keeps the keys bare; None would be warned about

    def __init__(self, boundary: float = 0.0075, worst: int = 20):
        super().__init__(collect_device="gpu")  # gathers objects over any backend; "cpu" leaves a folder behind
        if not boundary >= 0:
            raise InputError(f"SegmentationMetric: boundary must be 0 or more, got {boundary}")
        self.boundary, self.worst = boundary, worst
        self.figures = ("miou", "mf1", "mean_accuracy", "pixel_accuracy", *["boundary_f"] * (boundary > 0))
        self.report: dict[str, Any] = {}

    @property
    def names(self) -> list[str]:
        """Class names of the data set."""
        found = (self.dataset_meta or {}).get("classes")
        if not found:
            raise InputError("SegmentationMetric needs the class names of the data set: metainfo={'classes': (...)}")
        if len(found) > IGNORED:
            raise InputError(
                f"SegmentationMetric takes {IGNORED} classes at most, got {len(found)}: {IGNORED} is ignored"
            )
        return list(found)

    def process(self, data_batch: dict[str, Any], data_samples: Sequence[dict[str, Any]]) -> None:
        """Take in one batch.

        Args:
            data_batch: not looked at.
            data_samples: one dict per image with "pred" and "mask" (H, W) int64, where 255 in the mask is ignored,
                "path" and "valid".

        Raises:
            InputError: no mask, one of another size than the prediction, or a value that is no class.
        """
        count = len(self.names)
        for sample in data_samples:
            path, valid = str(sample["path"]), bool(sample["valid"])
            nothing = np.zeros(0, np.int64)
            cells = counts = nothing
            edges = np.zeros((count, 4), np.int64)
            if valid:
                pred, mask = checked(sample, path, count)
                labelled = mask != IGNORED
                confusion = np.bincount(count * mask[labelled] + pred[labelled], minlength=count**2)
                cells = confusion.nonzero()[0]
                counts = confusion[cells]
                if self.boundary:
                    edges = boundary_counts(pred, mask, count, max(1.0, self.boundary * hypot(*mask.shape)))
            self.results.append(Outcome(path, valid, cells, counts, edges))

    def compute_metrics(self, results: list[Outcome]) -> dict[str, float]:
        """Figures of all images of all ranks; fills `report`.

        Raises:
            InputError: no pixel of a valid image is labelled.
        """
        names = self.names
        kept = [o for o in (Outcome(*r) for r in results) if o.valid]
        total = np.zeros(len(names) ** 2, np.int64)
        for outcome in kept:
            total[outcome.cells] += outcome.counts
        if not total.any():
            raise InputError(
                f"no pixel of the {len(kept)} valid images of {len(results)} is labelled: there is nothing to measure"
            )
        confusion = total.reshape(len(names), len(names))
        shares = class_shares(confusion)
        rows = zip(names, confusion.sum(1).tolist(), *(shares[key].tolist() for key in CLASS_KEYS))
        self.report = {
            "per_class": [
                {"name": n, "pixels": p, **{k: None if np.isnan(v) else v for k, v in zip(CLASS_KEYS, values)}}
                for n, p, *values in rows
            ],
            "confusion": confusion.tolist(),
            "worst": worst_images(kept, names, self.worst),
            "invalid": len(results) - len(kept),
        }
        figures = {
            "miou": float(np.nanmean(shares["iou"])),
            "mf1": float(np.nanmean(shares["f1"])),
            "mean_accuracy": float(np.nanmean(shares["recall"])),
            "pixel_accuracy": float(confusion.trace() / confusion.sum()),
        }
        scores = boundary_scores(np.stack([o.edges for o in kept]))
        return figures if np.isnan(scores).all() else {**figures, "boundary_f": float(np.nanmean(scores))}


CLASS_KEYS = ("iou", "f1", "precision", "recall")


def checked(sample: dict[str, Any], path: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """ "pred" and "mask" of a sample as arrays (H, W) int64 that fit each other and the classes.

    Raises:
        InputError: they do not.
    """
    if sample["mask"] is None:
        raise InputError(f"{path} has no mask: there is nothing to compare the prediction with")
    pred, mask = (sample[key].cpu().numpy().astype(np.int64, copy=False) for key in ("pred", "mask"))
    if pred.shape != mask.shape or pred.ndim != 2:
        raise InputError(f"{path}: the prediction is {pred.shape}, the mask {mask.shape} (height, width); resize one")
    for what, values in (("prediction", pred), ("mask", mask[mask != IGNORED])):
        wrong = values[(values < 0) | (values >= count)]
        if wrong.size:
            raise InputError(
                f"{path}: the {what} holds {wrong[0]}, the data set has {count} classes (0 to {count - 1}); name all "
                "classes, or mend num_classes or the masks"
            )
    return pred, mask


def divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where b is 0."""
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=b > 0)


def class_shares(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Iou, f1, precision and recall (K,) of a confusion (K, K) with true classes in rows; NaN where not defined."""
    right, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    return {
        "iou": divided(right, true + predicted - right),
        "f1": divided(2 * right, true + predicted),
        "precision": divided(right, predicted),
        "recall": divided(right, true),
    }


def worst_images(outcomes: Sequence[Outcome], names: Sequence[str], limit: int) -> list[dict[str, Any]]:
    """Images with a mistake, by lowest mean iou over the classes that occur in truth or prediction of the image."""
    found = []
    for outcome in outcomes:
        confusion = np.zeros((len(names), len(names)), np.int64)
        confusion.flat[outcome.cells] = outcome.counts
        mistakes = confusion * ~np.eye(len(names), dtype=bool)
        if mistakes.any():
            label, predicted = divmod(int(mistakes.argmax()), len(names))
            fault = {"label": names[label], "predicted": names[predicted], "pixels": int(mistakes.max())}
            found.append({"path": outcome.path, "miou": float(np.nanmean(class_shares(confusion)["iou"])), **fault})
    return sorted(found, key=lambda row: (row["miou"], row["path"]))[:limit]


def boundary(labels: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels with one of the four neighbours in another class; the border of the image is none.

    Args:
        labels: (H, W) classes; ignored pixels neither have nor make a boundary.
    """
    found = np.zeros(labels.shape, bool)
    known = labels != IGNORED
    for here, there in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differ = (labels[here] != labels[there]) & known[here] & known[there]
        found[here] |= differ
        found[there] |= differ
    return found


def disc(radius: float) -> np.ndarray:
    """(2r + 1, 2r + 1) uint8, r the radius rounded down: 1 where the distance from the centre is at most the radius."""
    offsets = np.arange(-int(radius), int(radius) + 1)
    return (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.uint8)


def boundary_counts(pred: np.ndarray, mask: np.ndarray, count: int, tolerance: float) -> np.ndarray:
    """How many boundary pixels of each class are near a boundary of the same class in the other label map.

    The boundary of a class are its pixels with a 4-neighbour of another class. The prediction is not looked at where
    the mask is ignored, so ignored pixels make no boundary in either. Boundary pixels at most `tolerance` from an
    ignored pixel are not counted, as their counterpart may lie there; they still serve as counterparts of others.

    Args:
        pred: (H, W) int64 predicted classes.
        mask: (H, W) int64 true classes, 255 where ignored.
        count: K.
        tolerance: largest distance (Euclidean, between centres of pixels) that is near, in pixels.

    Returns:
        (K, 4) int64: predicted boundary pixels, those of them near a true one, true ones, those near a predicted one.
    """
    counts, near = np.zeros((count, 4), np.int64), disc(tolerance)
    unknown = (mask == IGNORED).astype(np.uint8)
    counted = cv2.dilate(unknown, near) == 0 if unknown.any() else np.ones(mask.shape, bool)
    maps = np.where(unknown, IGNORED, pred), mask
    edges = [boundary(labels) for labels in maps]
    for k in np.unique(np.concatenate([labels[edge] for labels, edge in zip(maps, edges)])):
        own = [edge & (labels == k) for labels, edge in zip(maps, edges)]
        reach = [cv2.dilate(edge.astype(np.uint8), near) > 0 for edge in own]
        own = [edge & counted for edge in own]
        counts[k] = own[0].sum(), (own[0] & reach[1]).sum(), own[1].sum(), (own[1] & reach[0]).sum()
    return counts


def boundary_scores(counts: np.ndarray) -> np.ndarray:
    """Boundary F1 per class: (N, K, 4) of `boundary_counts` to (K,), means over the images; NaN where there is none.

    Where only one of the two maps has pixels that count, the share of them that is near the other's stands for F1: 0,
    unless that other boundary is one that does not count itself.
    """
    precision, recall = divided(counts[..., 1], counts[..., 0]), divided(counts[..., 3], counts[..., 2])
    product, total = 2 * precision * recall, precision + recall
    f1 = np.where(total == 0, 0.0, product / np.where(total == 0, 1.0, total))
    f1 = np.where(np.isnan(precision), recall, np.where(np.isnan(recall), precision, f1))
    seen = ~np.isnan(f1)
    return divided(np.where(seen, f1, 0).sum(0), seen.sum(0))
