"""Figures of a classifier, against sklearn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from sklearn.metrics import confusion_matrix, recall_score, top_k_accuracy_score
from torchmetrics.functional.classification import multiclass_calibration_error

from visadapt.errors import InputError
from visadapt.metrics.classify import ClassificationMetric
from visadapt.registry import METRICS


def feed(metric, scores, labels, valid=None, batch=4):
    valid = torch.ones(len(labels), dtype=torch.bool) if valid is None else valid
    for i in range(0, len(labels), batch):
        part = slice(i, i + batch)
        paths = [f"{n}.png" for n in range(len(labels))[part]]
        data = {"labels": labels[part], "valid": valid[part], "path": paths}
        metric.process(data, [{"scores": s} for s in scores[part]])
    return metric.evaluate(len(labels))


def random_case(n=200, k=8):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(k - 1, (n,), generator=generator)  # the last class does not occur
    logits = torch.randn(n, k, generator=generator) * 2
    logits[range(n), labels] += 2
    return logits.softmax(1), labels


def test_figures_equal_sklearn_and_torchmetrics():
    scores, labels = random_case()
    metric = ClassificationMetric()
    metric.dataset_meta = {"classes": tuple("abcdefgh")}
    out = feed(metric, scores, labels)
    predicted = scores.argmax(1)
    assert set(out) == {"top1", "top5", "mean_class_accuracy", "ece"} and all(type(v) is float for v in out.values())
    assert out["top1"] == pytest.approx((predicted == labels).float().mean().item())
    assert out["top5"] == pytest.approx(top_k_accuracy_score(labels, scores, k=5, labels=range(8)))
    assert out["mean_class_accuracy"] == pytest.approx(
        recall_score(labels, predicted, labels=range(7), average="macro")
    )
    assert out["ece"] == pytest.approx(multiclass_calibration_error(scores, labels, 8, n_bins=15).item(), abs=1e-6)
    report = metric.report
    assert np.array_equal(report["confusion"], confusion_matrix(labels, predicted, labels=range(8)))
    assert report["per_class"][7] == {"name": "h", "count": 0, "accuracy": None}
    first = labels == 0
    assert report["per_class"][0]["count"] == int(first.sum())
    assert report["per_class"][0]["accuracy"] == pytest.approx((predicted == 0)[first].float().mean().item())


def test_worst_are_the_most_confident_mistakes():
    scores, labels = random_case()
    metric = ClassificationMetric(worst=3)
    metric.dataset_meta = {"classes": tuple("abcdefgh")}
    feed(metric, scores, labels)
    worst = metric.report["worst"]
    confidence, predicted = scores.max(1)
    wrong = (predicted != labels).nonzero().flatten()
    top = wrong[confidence[wrong].argsort(descending=True)[:3]].tolist()
    assert [w["path"] for w in worst] == [f"{i}.png" for i in top]
    assert worst[0]["label"] == "abcdefgh"[labels[top[0]]] and worst[0]["predicted"] == "abcdefgh"[predicted[top[0]]]
    assert worst[0]["confidence"] == pytest.approx(confidence[top[0]].item())


def test_invalid_samples_do_not_count():
    scores, labels = random_case()
    valid = torch.arange(200) % 3 > 0
    broken = scores.clone()
    broken[~valid] = float("nan")
    metric = ClassificationMetric()
    assert feed(metric, broken, labels, valid) == feed(ClassificationMetric(), scores[valid], labels[valid])
    assert metric.report["invalid"] == 67 and sum(c["count"] for c in metric.report["per_class"]) == 133


def test_two_classes_and_half_precision():
    scores = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).bfloat16()
    out = feed(ClassificationMetric(), scores, torch.tensor([0, 1]))
    assert out == {"top1": 0.5, "top5": 1.0, "mean_class_accuracy": 0.5, "ece": 0.5}


def test_a_score_above_one_by_rounding_is_no_logit():
    scores = torch.tensor([[1.0 + 1e-6, 0.0], [0.5, 0.5 - 1e-6]])
    assert feed(ClassificationMetric(), scores, torch.tensor([0, 0]))["ece"] == pytest.approx(0.25, abs=1e-5)


def test_mistakes_are_input_errors():
    scores, labels = random_case(8)
    with pytest.raises(InputError, match="none of the 8 samples is valid"):
        feed(ClassificationMetric(), scores, labels, torch.zeros(8, dtype=torch.bool))
    scores[3, 0] = float("nan")
    with pytest.raises(InputError, match=r"scores of 3\.png are not finite"):
        feed(ClassificationMetric(), scores, labels)
    metric = ClassificationMetric()
    metric.dataset_meta = {"classes": ("a", "b")}
    with pytest.raises(InputError, match="gives 8 scores, the data set has 2 classes"):
        feed(metric, *random_case(8))


def test_padding_samples_of_other_ranks_are_cut():
    scores, labels = random_case(6)
    whole = feed(ClassificationMetric(), scores, labels)
    metric = ClassificationMetric()
    padded = torch.cat([scores, scores[:2]]), torch.cat([labels, labels[:2]])
    batch = {"labels": padded[1], "valid": torch.ones(8, dtype=torch.bool), "path": list("abcdefgh")}
    metric.process(batch, [{"scores": s} for s in padded[0]])
    assert metric.evaluate(6) == whole


def test_metric_works_in_an_evaluator_and_prints_no_warning(caplog):
    evaluator = Evaluator(METRICS.build(dict(type="ClassificationMetric")))
    evaluator.dataset_meta = {"classes": tuple("abcdefgh")}
    scores, labels = random_case(4)
    batch = {"labels": labels, "valid": torch.ones(4, dtype=torch.bool), "path": list("abcd")}
    evaluator.process(data_samples=[{"scores": s} for s in scores], data_batch=batch)
    assert set(evaluator.evaluate(4)) == {"top1", "top5", "mean_class_accuracy", "ece"}
    assert "prefix" not in caplog.text
