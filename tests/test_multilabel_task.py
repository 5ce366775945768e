"""A classifier with any number of classes per image."""

from __future__ import annotations

import torch
from cases import TINY

from visadapt.datasets.cached import FeatureDataset
from visadapt.metrics.multilabel import MultilabelMetric
from visadapt.registry import TASKS


def test_each_class_is_decided_by_itself():
    head = dict(type="LinearHead", num_classes=5)
    task = TASKS.build(dict(type="MultilabelClassifier", backbone=TINY["vit"], head=head, pool="avg")).eval()
    torch.nn.init.normal_(task.head.fc.weight)
    images, labels = torch.randn(3, 3, 28, 28), torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]])
    logits = task(images)
    given = {"path": list("abc"), "valid": torch.ones(3, dtype=torch.bool)}
    found = task(images, labels, mode="predict", **given)
    assert torch.allclose(torch.stack([o["probabilities"] for o in found]), logits.sigmoid())
    assert [o["label"] for o in found] == labels.tolist() and "scores" not in found[0]
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
    assert torch.isclose(task(images, labels, mode="loss")["loss"], wanted)
    metric = MultilabelMetric()
    metric.process({"labels": labels, **given}, found)
    assert set(metric.evaluate(3)) == {"map_macro", "map_micro", "f1_macro", "f1_micro"}


def test_cached_features_keep_several_labels():
    labels = torch.tensor([[1, 0, 1], [0, 0, 0]])
    data = FeatureDataset(torch.randn(2, 4), labels, ["a", "b"], classes="xyz")
    assert [data[i]["label"] for i in range(2)] == labels.tolist()
