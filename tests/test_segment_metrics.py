"""Figures of a segmentation, against sklearn and torchmetrics, by hand and by brute force."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from sklearn.metrics import confusion_matrix, f1_score, jaccard_score, precision_score, recall_score
from torchmetrics.functional.classification import multiclass_jaccard_index
from torchmetrics.functional.segmentation import mean_iou

from visadapt.errors import InputError
from visadapt.ignored import IGNORED
from visadapt.metrics.segment import SegmentationMetric, boundary, boundary_counts, disc
from visadapt.registry import METRICS


def sample(pred, mask, path="a.png", valid=True):
    return {"pred": torch.as_tensor(pred), "mask": torch.as_tensor(mask), "path": path, "valid": valid}


def measure(samples, classes, **options):
    metric = SegmentationMetric(**options)
    metric.dataset_meta = {"classes": tuple(classes)}
    for one in samples:
        metric.process({}, [one])
    return metric.evaluate(len(samples)), metric.report


def blobs(seed, k, shape=(24, 31), ignored=0.0):
    """Random label maps with regions of a few pixels."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, k, (-(-shape[0] // 4), -(-shape[1] // 4)))
    labels = np.kron(coarse, np.ones((4, 4), np.int64))[: shape[0], : shape[1]]
    labels = np.where(generator.random(shape) < 0.1, generator.integers(0, k, shape), labels)
    return np.where(generator.random(shape) < ignored, IGNORED, labels)


def random_case(k=5, n=6):
    """The last class does not occur, the one before it only in predictions."""
    masks = [blobs(i, k - 2, ignored=0.1) for i in range(n)]
    preds = [np.where(blobs(50 + i, 3) == 0, blobs(100 + i, k - 1), m) for i, m in enumerate(masks)]
    preds = [np.where(p == IGNORED, 0, p) for p in preds]
    return preds, masks


def test_figures_equal_sklearn_and_torchmetrics():
    preds, masks = random_case()
    out, report = measure([sample(*pair, f"{i}.png") for i, pair in enumerate(zip(preds, masks))], "abcde")
    assert all(type(v) is float for v in out.values())
    assert list(out) == ["miou", "mf1", "mean_accuracy", "pixel_accuracy", "boundary_f"]
    pred, true = (np.concatenate([m.ravel() for m in maps]) for maps in (preds, masks))
    pred, true = pred[true != IGNORED], true[true != IGNORED]
    occurring = dict(labels=range(4), average="macro", zero_division=0)
    assert out["miou"] == pytest.approx(jaccard_score(true, pred, **occurring), abs=1e-12)
    assert out["mf1"] == pytest.approx(f1_score(true, pred, **occurring), abs=1e-12)
    assert out["mean_accuracy"] == pytest.approx(recall_score(true, pred, labels=range(3), average="macro"), abs=1e-12)
    assert out["pixel_accuracy"] == pytest.approx((pred == true).mean(), abs=1e-12)
    theirs = multiclass_jaccard_index(*(torch.as_tensor(np.stack(m)) for m in (preds, masks)), 5, ignore_index=IGNORED)
    assert out["miou"] == pytest.approx(theirs.item(), abs=1e-6)

    assert np.array_equal(report["confusion"], confusion_matrix(true, pred, labels=range(5)))
    rows = report["per_class"]
    assert [r["name"] for r in rows] == list("abcde") and [r["pixels"] for r in rows] == [*np.bincount(true), 0, 0]
    assert rows[1]["precision"] == pytest.approx(precision_score(true, pred, labels=[1], average="macro"))
    assert rows[3] == {"name": "d", "pixels": 0, "iou": 0.0, "f1": 0.0, "precision": 0.0, "recall": None}
    assert set(rows[4].values()) == {"e", 0, None}
    assert json.loads(json.dumps(report)) == report


def test_one_image_equals_torchmetrics_mean_iou():
    pred, mask = blobs(0, 4), blobs(1, 4)
    out, report = measure([sample(pred, mask)], "abcd")
    theirs = mean_iou(*(torch.as_tensor(m)[None] for m in (pred, mask)), num_classes=4, input_format="index")
    assert out["miou"] == pytest.approx(theirs.item(), abs=1e-6) == report["worst"][0]["miou"]


def test_the_worst_images_and_what_is_wrong_with_them():
    mask = np.repeat([[0, 1, 2, IGNORED]], 4, 0)
    slip = mask.copy()
    slip[slip == IGNORED] = 1  # a guess where nothing is known costs nothing
    perfect = slip.copy()
    slip[0, 0] = 2
    worse = np.where(perfect == 1, 2, perfect)
    samples = [sample(m, mask, n) for m, n in ((perfect, "perfect"), (slip, "slip"), (worse, "worse"), (slip, "also"))]
    _, report = measure(samples, ("sky", "sea", "land"))
    assert [r["path"] for r in report["worst"]] == ["worse", "also", "slip"]
    assert report["worst"][0] == {
        "path": "worse", "miou": pytest.approx((1 + 0 + 0.5) / 3), "label": "sea", "predicted": "land", "pixels": 4,
    }  # fmt: skip
    assert report["worst"][2]["miou"] == pytest.approx((3 / 4 + 1 + 4 / 5) / 3)
    assert [r["path"] for r in measure(samples, "abc", worst=1)[1]["worst"]] == ["worse"]


# ---- boundaries ------------------------------------------------------------------------------------------------------
def stripe(column, width=40, height=10):
    """Class 1 from a column on."""
    return np.repeat((np.arange(width) >= column)[None].astype(np.int64), height, 0)


def test_a_boundary_are_the_pixels_on_both_sides():
    labels = np.zeros((5, 6), np.int64)
    labels[1:4, 2:5] = 1
    ring = np.zeros((5, 6), int)
    ring[1:4, 2:5] = 1
    ring[2, 3] = 0
    ring[0, 2:5] = ring[4, 2:5] = ring[1:4, 1] = ring[1:4, 5] = 1  # no corners: neighbours are four
    assert np.array_equal(boundary(labels), ring)
    labels[:, 3:] = IGNORED
    assert np.argwhere(boundary(labels)).tolist() == [[0, 2], [1, 1], [1, 2], [2, 1], [2, 2], [3, 1], [3, 2], [4, 2]]
    assert not boundary(np.ones((4, 4), np.int64)).any()


@pytest.mark.parametrize(("shift", "score"), [(0, 1.0), (1, 1.0), (2, 0.0), (-1, 1.0), (-2, 0.0)])
def test_a_shifted_edge_is_found_within_the_tolerance(shift, score):
    """The diagonal of 40 x 10 is 41: 0.75 % of it is less than a pixel, so 1 pixel is tolerated."""
    out, _ = measure([sample(stripe(20 + shift), stripe(20))], "ab")
    assert out["boundary_f"] == score
    wide, _ = measure([sample(stripe(20 + shift), stripe(20))], "ab", boundary=2 / 41)
    assert wide["boundary_f"] == 1.0


def test_half_an_edge_too_much():
    """A second edge halves the precision of class 0; class 1 has both its edges in the prediction, one in the truth."""
    pred = stripe(10)
    pred[:, 30:] = 0
    out, _ = measure([sample(pred, stripe(10))], "ab")
    assert out["boundary_f"] == pytest.approx(2 / 3)
    pred[:, 30:] = 2  # class 2 is nowhere in the truth: 0; class 0 is right; class 1 as before
    out, _ = measure([sample(pred, stripe(10))], "abcd")
    assert out["boundary_f"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_means_are_over_images_and_then_over_classes():
    """Class 0 scores 1, 1 and 0, class 1 scores 1 and 1, class 2 scores 0: its own mean is over one image."""
    lost = np.where(stripe(20) == 1, 2, 0)
    good = sample(stripe(20), stripe(20))
    out, _ = measure([good, good, sample(stripe(30) * 2, lost)], "abc")
    assert out["boundary_f"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    same = sample(np.zeros((10, 40), np.int64), np.zeros((10, 40), np.int64))
    assert measure([good, same], "abc")[0]["boundary_f"] == 1.0  # no boundary anywhere: left out


def test_images_without_boundaries_have_no_boundary_figure():
    flat = np.ones((6, 6), np.int64)
    assert set(measure([sample(flat, flat)], "ab")[0]) == {"miou", "mf1", "mean_accuracy", "pixel_accuracy"}
    assert "boundary_f" not in measure([sample(stripe(3), stripe(3))], "ab", boundary=0)[0]
    assert measure([sample(stripe(20), np.zeros_like(stripe(20)))], "ab")[0]["boundary_f"] == 0.0


def test_what_is_near_ignored_pixels_does_not_count():
    """Of two true edges one lies beside ignored pixels: missing it in the prediction costs nothing, nor does a false
    one there; as the counterpart of a predicted edge that does count it still serves."""
    mask = stripe(10)
    mask[:, 30:] = 0
    mask[:, 31:33] = IGNORED
    missed, invented = stripe(10), np.where(mask == IGNORED, 0, mask)
    invented[:, 33] = 1
    for pred in (missed, invented):
        assert measure([sample(pred, mask)], "ab", boundary=2 / 41)[0]["boundary_f"] == 1.0
        assert measure([sample(pred, mask)], "ab", boundary=1 / 41)[0]["boundary_f"] < 1.0
    far = stripe(10)
    far[:, 28:] = 0  # its pixels 27 and 28 are 4 and 3 from ignored ones, 2 from true ones
    tolerance = 2.0
    counts = boundary_counts(np.where(mask == IGNORED, 0, far), mask, 2, tolerance)
    assert counts.tolist() == [[20, 20, 10, 10], [20, 20, 10, 10]]


def test_what_is_predicted_at_ignored_pixels_makes_no_boundary():
    mask = 1 - stripe(11)
    mask[:, 13] = IGNORED
    pred = (mask == IGNORED).astype(np.int64)  # its edge at column 12 would serve the true one at 11
    assert boundary_counts(pred, mask, 2, 1.0).tolist() == [[0, 0, 10, 0], [0, 0, 10, 0]]


def brute_force(pred, mask, k, tolerance):
    height, width = mask.shape
    pred = np.where(mask == IGNORED, IGNORED, pred)

    def edge(labels, y, x):
        around = [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        inside = [labels[v, u] for v, u in around if 0 <= v < height and 0 <= u < width]
        return labels[y, x] == k and any(value not in (k, IGNORED) for value in inside)

    places = [(y, x) for y in range(height) for x in range(width)]
    first, second = ([p for p in places if edge(labels, *p)] for labels in (pred, mask))
    unknown = [p for p in places if mask[p] == IGNORED]

    def near(place, others):
        return any((place[0] - v) ** 2 + (place[1] - u) ** 2 <= tolerance**2 for v, u in others)

    first_counted, second_counted = ([p for p in ps if not near(p, unknown)] for ps in (first, second))
    hits = sum(near(p, second) for p in first_counted), sum(near(p, first) for p in second_counted)
    return [len(first_counted), hits[0], len(second_counted), hits[1]]


@pytest.mark.parametrize(("tolerance", "ignored"), [(1.0, 0.0), (1.0, 0.02), (1.5, 0.01), (2.0, 0.0)])
def test_boundary_counts_equal_brute_force(tolerance, ignored):
    pred, mask = blobs(1, 3, (14, 17)), blobs(2, 4, (14, 17), ignored)
    counts = boundary_counts(pred, mask, 5, tolerance)
    assert counts.tolist() == [brute_force(pred, mask, k, tolerance) for k in range(5)]
    assert counts[:3].min() > 0 and counts[4].max() == 0


def test_the_disc_has_no_corners():
    assert disc(1.9).tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 1]] and disc(1.0).sum() == 5
    assert disc(2.0).sum() == 13 and disc(2.9).shape == (5, 5)


# ---- in a run --------------------------------------------------------------------------------------------------------
def test_invalid_and_unlabelled_images_do_not_count():
    pred, mask = blobs(0, 3), blobs(1, 3)
    alone, _ = measure([sample(pred, mask)], "abc")
    blank = np.full((3, 3), IGNORED)
    others = [sample(pred, mask, valid=False) | {"mask": None}, sample(blank * 0, blank)]
    out, report = measure([sample(pred, mask), *others], "abc")
    assert out == alone and report["invalid"] == 1


def test_mistakes_are_input_errors():
    pred, mask = blobs(0, 3), blobs(1, 3)
    for wrong, message in (
        (sample(pred, mask[1:]), r"a\.png: the prediction is \(24, 31\), the mask \(23, 31\)"),
        (sample(np.where(pred == 2, 7, pred), mask), r"a\.png: the prediction holds 7, the data set has 3 classes"),
        (sample(np.where(pred == 2, IGNORED, pred), mask), r"the prediction holds 255"),
        (sample(pred, np.where(mask == 0, -1, mask)), r"the mask holds -1"),
        (sample(pred, mask) | {"mask": None}, r"a\.png has no mask"),
    ):
        with pytest.raises(InputError, match=message):
            measure([wrong], "abc")
    with pytest.raises(InputError, match="no pixel of the 1 valid images of 2 is labelled"):
        measure([sample(pred, np.full_like(pred, IGNORED)), sample(pred, mask, valid=False)], "abc")
    with pytest.raises(InputError, match="needs the class names"):
        measure([sample(pred, mask)], ())
    with pytest.raises(InputError, match="255 classes at most, got 256"):
        measure([sample(pred, mask)], range(256))
    with pytest.raises(InputError, match="boundary must be 0 or more"):
        SegmentationMetric(boundary=-0.1)


def test_an_evaluator_takes_it_and_what_ranks_exchange_is_small(caplog):
    evaluator = Evaluator(METRICS.build(dict(type="SegmentationMetric")))
    evaluator.dataset_meta = {"classes": tuple(map(str, range(150)))}
    evaluator.process([sample(blobs(i, 3, (64, 64)), blobs(i + 9, 3, (64, 64))) for i in range(4)], {})
    results = pickle.loads(pickle.dumps(evaluator.metrics[0].results))
    assert len(pickle.dumps(results)) < 4 * 6000  # the confusion alone would be 180 kB per image
    assert evaluator.metrics[0].compute_metrics(results) == evaluator.evaluate(4)
    assert "prefix" not in caplog.text
