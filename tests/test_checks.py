"""What `check`, `train` and `test` find before anything is spent: metrics, classes, bands, sizes, queries, weights."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from cases import TINY
from mmengine.evaluator import BaseMetric, Evaluator
from safetensors.torch import save_file

from visadapt.backbones.timm_vit import TimmViT
from visadapt.checks import check_monitors, check_names, doubts, try_samples
from visadapt.cli import main
from visadapt.core.io import read_manifest, save_adapter
from visadapt.errors import InputError
from visadapt.hooks.files import AdapterFiles
from visadapt.hooks.steps import EarlyStop
from visadapt.metrics.classify import ClassificationMetric
from visadapt.metrics.multilabel import MultilabelMetric
from visadapt.metrics.segment import SegmentationMetric
from visadapt.registry import TASKS
from visadapt.tasks.classify import ImageClassifier
from visadapt.tasks.segment import Segmenter

pytest.importorskip("rasterio")
from test_segment_commands import BANDS, CLASSES, CONFIG, scene, write_raster

ARCH = dict(depth=2, embed_dim=32, num_heads=2, init_values=1.0, img_size=28)


def write_pair(folder: Path, name: str, image: np.ndarray, mask: np.ndarray) -> None:
    for part in (folder, Path(f"{folder}_masks")):
        part.mkdir(exist_ok=True)
    write_raster(folder / f"{name}.tif", image)
    cv2.imwrite(f"{folder}_masks/{name}.png", mask)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Small rasters of one size, a config for them, and an adapter file that was never trained."""
    folder = tmp_path_factory.mktemp("checks")
    for split, count in (("train", 4), ("val", 3)):
        for n in range(count):
            write_pair(folder / split, str(n), *scene(42, 56, n))
    torch.manual_seed(0)
    body = TimmViT("vit_small_patch14_dinov2", in_chans=4, arch=ARCH).body
    save_file(body.state_dict(), folder / "base.safetensors")
    runtime = (Path(__file__).parent.parent / "configs/_base_/runtime.py").read_text()
    made = {"data": folder, "weights": folder / "base.safetensors", "classes": CLASSES, "runtime": runtime}
    (folder / "config.py").write_text(CONFIG.format(**made))
    return folder


@pytest.fixture(scope="module")
def stored(data):
    """Writes an adapter file that says of itself what the test wants."""
    from visadapt.config import load

    def write(**card) -> str:
        task = TASKS.build(copy.deepcopy(load(data / "config.py").model))
        card = {"classes": CLASSES, "channels": 4, "bands": BANDS, "transforms": []} | card
        return str(save_adapter(task.adapted, data / "a.safetensors", heads=task.heads, extra=task.card() | card))

    return write


def error(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("visadapt: error:")]
    assert len(lines) == 1
    return lines[0]


def refused(data, capsys, *words) -> str:
    assert main(["check", str(data / "config.py"), *words]) == 2
    return error(capsys)


# ---- metrics by name -------------------------------------------------------------------------------------------------
def test_a_monitor_that_no_metric_has_is_found_before_training(data, tmp_path, capsys):
    word, said = "custom_hooks.0.monitor=miuo", "AdapterFiles: no metric 'miuo' (did you mean 'miou'?)"
    assert said in refused(data, capsys, word)
    (tmp_path / "metrics.jsonl").write_text("earlier\n")
    assert main(["train", str(data / "config.py"), word, "--work-dir", str(tmp_path), "--overwrite"]) == 2
    assert said in error(capsys) and (tmp_path / "metrics.jsonl").read_text() == "earlier\n"


class Other(BaseMetric):
    default_prefix = "mine"

    def process(self, data_batch, data_samples):
        pass

    def compute_metrics(self, results):
        return {}


def test_monitors():
    check_monitors([AdapterFiles(), EarlyStop("ece")], Evaluator([ClassificationMetric()]))
    check_monitors([AdapterFiles("f9")], Evaluator([ClassificationMetric(), Other()]))  # which may give any figure
    with pytest.raises(InputError, match="EarlyStop: no metric 'top9'"):
        check_monitors([AdapterFiles(), EarlyStop("top9")], Evaluator([ClassificationMetric()]))
    with pytest.raises(InputError, match="no metric 'boundary_f'"):
        check_monitors([AdapterFiles("boundary_f")], Evaluator([SegmentationMetric(boundary=0)]))
    named = Other()
    named.figures = ("f1",)
    check_monitors([AdapterFiles("mine/f1")], Evaluator([named]))
    with pytest.raises(InputError, match=r"no metric 'f1'.*mine/f1"):
        check_monitors([AdapterFiles("f1")], Evaluator([named]))


def test_metrics_give_the_figures_that_they_name():
    about = dict(path=["a", "b"], valid=torch.tensor([True, True]))
    scores, mask = torch.eye(2), torch.tensor([[0, 0, 1, 1]] * 4)
    runs = [
        (ClassificationMetric(), dict(labels=torch.tensor([0, 1])), [{"scores": s} for s in scores]),
        (MultilabelMetric(), dict(labels=torch.eye(2).long()), [{"probabilities": s} for s in scores]),
        *((SegmentationMetric(b), {}, [dict(pred=mask, mask=mask, path="a", valid=True)]) for b in (0.01, 0)),
    ]
    for metric, batch, samples in runs:
        metric.dataset_meta = {"classes": ("x", "y")}
        metric.process(batch | about, samples)
        assert set(metric.evaluate(2)) == set(metric.figures)


# ---- classes and bands by name ---------------------------------------------------------------------------------------
def names(classes=(), bands=()):
    return {"classes": classes, "bands": bands}


@pytest.mark.parametrize(
    ("found", "wanted", "fewer", "said"),
    [
        (names("abc"), names("acb"), False, "here: class 1 is 'b', in there it is 'c'; both need the same classes in"),
        (names("ax"), names("abc"), True, "class 1 is 'x', in there it is 'b'"),  # an index has shifted
        (names("ab"), names("abc"), False, "there are 2 classes, in there 3"),
        (names("abc"), names("ab"), True, "there are 3 classes, in there 2"),
        (names("a", ["B2", "B3"]), names("a", ["B3", "B2"]), True, "band 0 is 'B2', in there it is 'B3'"),
        (names("a", ["B2"]), names("a", ["B2", "B3"]), True, "there are 1 bands, in there 2"),
        (names("ab"), names("abc"), True, None),
        (names("ab", ["B2"]), names(), False, None),
        ({}, names("ab", ["B2"]), False, None),
        ({"bands": 4}, names("ab"), False, "here is damaged: its bands are no list of names"),
    ],
)
def test_names_count_by_their_order(found, wanted, fewer, said):
    found, wanted = ({k: v if isinstance(v, int) else list(v) for k, v in n.items()} for n in (found, wanted))
    if said is None:
        check_names(found, "here", wanted, "there", fewer)
        return
    with pytest.raises(InputError, match=said):
        check_names(found, "here", wanted, "there", fewer)


OTHERS = [
    ("classes=['bright','dark']", "class 0 is 'dark', in val_dataloader it is 'bright'"),
    ("bands=['B02','B03','B08','B04']", "band 2 is 'B04', in val_dataloader it is 'B08'"),
]


@pytest.mark.parametrize(("change", "said"), OTHERS)
def test_other_names_are_refused_by_all_commands(data, stored, tmp_path, capsys, change, said):
    words = [str(data / "config.py"), f"val_dataloader.dataset.{change}"]
    for command in (["check", *words], ["train", *words, "--work-dir", str(tmp_path)]):
        assert main(command) == 2
        assert f"train_dataloader: {said}" in error(capsys)
    assert main(["test", words[0], path := stored(), words[1]]) == 2
    assert f"{path}: {said}" in error(capsys)


def test_a_training_set_may_name_the_first_classes_alone(data, capsys):
    words = ["train_dataloader.dataset.classes=['dark']", "train_dataloader.dataset.label_map={0: 0, 1: 255}"]
    assert main(["check", str(data / "config.py"), *words]) == 0
    assert "class 0 is 'bright'" in refused(data, capsys, words[0].replace("dark", "bright"), words[1])


def test_test_counts_tiles(data, stored, capsys):
    assert main(["test", str(data / "config.py"), stored(), "val_dataloader.dataset.tile=28"]) == 0
    assert "on 12 tiles (val set)" in capsys.readouterr().out


# ---- weights ---------------------------------------------------------------------------------------------------------
def test_random_weights_are_told_before_training(data, tmp_path, capsys):
    said = "visadapt: warning: the backbone has random weights"
    config, word = str(data / "config.py"), "model.backbone.weights=None"
    assert main(["check", config, word]) == 0 and capsys.readouterr().err.count(said) == 1
    assert main(["check", config]) == 0 and said not in capsys.readouterr().err
    assert main(["train", config, word, "custom_hooks.0.monitor=x", "--work-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count(said) == 1
    assert doubts(SimpleNamespace(adapted=SimpleNamespace(backbone=object(), adapters={}))) == []  # it takes no weights


def test_another_base_says_what_to_do(data, stored, tmp_path, capsys):
    path = stored()
    assert main(["test", str(data / "config.py"), path, "model.backbone.weights=None"]) == 2
    assert f"trained on, {data / 'base.safetensors'} (--weights FILE of predict and merge, model." in error(capsys)
    task = ImageClassifier(TINY["vit"], head=dict(type="LinearHead", num_classes=2), adapters={"a": dict(type="LoRA")})
    path = save_adapter(task.adapted, tmp_path / "a.safetensors")
    assert read_manifest(path)["backbone"]["arguments"]["weights"] is None
    with pytest.raises(InputError, match=r"random weights, which are lost: train again with weights=\.\.\."):
        ImageClassifier(TINY["vit"], head=dict(type="LinearHead", num_classes=2)).adapted.load(path)


# ---- samples ---------------------------------------------------------------------------------------------------------
def moved(part: str, folder: Path) -> list[str]:
    return [f"{part}_dataloader.dataset.{k}={folder}{v}" for k, v in (("image_dir", ""), ("mask_dir", "_masks"))]


def test_check_takes_samples_through_loaders_and_model(data, capsys):
    crop = "train_dataloader.dataset.transform.0.height"
    assert "train_dataloader: transforms fail on an image of (42, 56, 4)" in refused(data, capsys, f"{crop}=90")
    bands = ["model.backbone.weights=None", "model.backbone.in_chans=3"]
    assert "train_dataloader: images have 4 bands, the backbone takes 3; set in_chans" in refused(data, capsys, *bands)
    few = ["train_dataloader.batch_size=9", "train_dataloader.drop_last=True"]
    assert "train_dataloader: 4 samples fill no batch; lower batch_size" in refused(data, capsys, *few)


def test_check_finds_images_and_masks_of_other_sizes(data, tmp_path, capsys):
    for n, size in enumerate([(42, 56), (42, 56), (42, 42)]):
        write_pair(tmp_path / "val", str(n), *scene(*size, n))
    words = moved("val", tmp_path / "val")
    assert "val_dataloader: images of a batch differ in size" in refused(data, capsys, *words)
    assert main(["check", str(data / "config.py"), *words, "val_dataloader.batch_size=1"]) == 0
    write_pair(tmp_path / "wrong", "0", scene(42, 56, 0)[0], scene(42, 42, 0)[1])
    assert "both need one size" in refused(data, capsys, *moved("val", tmp_path / "wrong"))


def test_check_passes_over_masks_without_labels(data, tmp_path):
    image, mask = scene(42, 56, 0)
    for n in range(4):
        write_pair(tmp_path / "some", str(n), image, mask if n == 3 else np.full_like(mask, 255))
        write_pair(tmp_path / "none", str(n), image, np.full_like(mask, 255))
    for part, folder in (("train", "some"), ("train", "none"), ("val", "none")):
        assert main(["check", str(data / "config.py"), *moved(part, tmp_path / folder)]) == 0


def test_the_end_of_a_data_set_is_read(data):
    """Of two batches the last sample cannot be collated; only its shape is wrong."""
    from torch.utils.data import DataLoader

    from visadapt.datasets.base import collate

    def sample(i, side=28):
        return dict(inputs=torch.zeros(3, side, side), label=0, index=i, path=str(i), valid=True, unreadable="")

    task = ImageClassifier(TINY["vit"], head=dict(type="LinearHead", num_classes=2))
    samples = [sample(i) for i in range(4)]
    batch, outputs = try_samples(task, DataLoader(samples, 2, collate_fn=collate), "val_dataloader", "predict")
    assert batch["path"] == ["0", "1"] and len(outputs) == 2 and not task.training
    assert set(try_samples(task, DataLoader(samples, 2, collate_fn=collate), "x", "loss")[1]) == {"loss"}
    samples[3] = sample(3, 42)
    with pytest.raises(InputError, match=r"^val_dataloader: images of a batch differ in size: 2 is"):
        try_samples(task, DataLoader(samples, 2, collate_fn=collate), "val_dataloader", "predict")


# ---- queries ---------------------------------------------------------------------------------------------------------
def mask2former(adapters, linked=True):
    small = dict(width=32, queries=4, heads=2, encoder_layers=1, decoder_layers=1, encoder_hidden=8, decoder_hidden=8)
    head = dict(type="Mask2FormerHead", num_classes=2, points=16, linked_queries=linked, **small)
    backbone = TINY["vit"] | dict(arch=TINY["vit"]["arch"] | dict(depth=4), out_indices=[0, 1, 2, 3])
    return Segmenter(backbone, head, dict(type="Pyramid"), adapters)


def test_linked_queries_need_an_adapter_that_offers_them():
    rein = dict(type="Rein", length=4, rank=2, query_dim=32)
    mask2former({"a": rein})
    mask2former(None)  # for an adapter file, which brings its own
    for adapters in ({"a": dict(type="LoRA")}, {}, {"a": rein | dict(query_dim=None)}):
        with pytest.raises(InputError, match="takes the queries of an adapter and none offers any; add one"):
            mask2former(adapters)
    with pytest.raises(InputError, match="the adapter's queries have 16 channels, Mask2FormerHead takes 32; give both"):
        mask2former({"a": rein | dict(query_dim=16)})
    with pytest.raises(InputError, match="an adapter offers queries and Mask2FormerHead takes none"):
        mask2former({"a": rein}, linked=False)
