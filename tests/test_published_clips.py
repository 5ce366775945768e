"""Published ZeroI2V files, before and after their merge, become adapter files that label clips the same."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from cases import TINY
from small import zeroi2v_state

from visadapt import config
from visadapt.backbones.timm_vit import TimmViT
from visadapt.cli import main
from visadapt.commands.convert import data_card
from visadapt.core.io import read_manifest
from visadapt.datasets.clips import ClipDataset
from visadapt.errors import InputError
from visadapt.registry import TASKS
from visadapt.testing import noise

SEEN = dict(num_frames=4, sampling="dense", stride=2, size=32, clips=2, crops=3)
ZERO = dict(type="ZeroI2V", num_frames=4, offsets=[[1, 1], [-1, 1]])
NORM = dict(type="LayerNormTuning", targets=["norm"])
LORA = dict(type="LoRA")
HEAD = dict(type="LinearHead", num_classes=3, dropout=0.5)
SHIPPED = sorted((Path(__file__).parents[1] / "configs" / "zeroi2v").glob("zeroi2v_clip-*.py"))


def official(task, merged):
    """The state of a task as the official code stores it."""
    state = zeroi2v_state(task.adapted.adapters["main"], task.adapted.backbone.body, merged)
    state |= {f"cls_head.fc_cls.{k}": v for k, v in task.head.fc.state_dict().items()}
    return {"meta": {}, "state_dict": {k: v.detach().clone() for k, v in state.items()}}


def write_config(path, adapters=None, data=None, name=TINY["clip"]["name"], classes=3):
    """A config of a published model, whose data set is not here."""
    model = dict(
        type="VideoClassifier",
        backbone=dict(type="TimmViT", name=name, weights="timm:openai", arch=TINY["clip"]["arch"]),
        num_frames=4,
        adapters=adapters or dict(main=ZERO, norm=NORM),
        head=HEAD | dict(num_classes=classes),
        pool="cls",
    )
    data = data or dict(type="Kinetics", split="val", root=str(path.parent / "nowhere"))
    path.write_text(
        f"model = {model}\nval_dataloader = dict(dataset={data | SEEN})\n"
        'val_evaluator = dict(type="ClassificationMetric")\nval_cfg = dict()\n'
    )


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with both published files and a clip, and the scores of the clip as evaluations see it."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    model = dict(type="VideoClassifier", backbone=TINY["clip"], head=HEAD, num_frames=4, pool="cls")
    task = TASKS.build(model | dict(adapters=dict(main=ZERO))).eval()
    noise(task.adapted.adapters)
    noise(task.adapted.backbone.body.norm)  # it was trained too
    noise(task.head, std=0.3)
    rng = np.random.default_rng(0)
    (folder / "clip").mkdir()
    for number in range(12):
        cv2.imwrite(str(folder / "clip" / f"{number:03d}.png"), rng.integers(0, 256, (40, 60, 3)).astype(np.uint8))
    clip = ClipDataset([folder / "clip"], [0], "012", **SEEN)[0]["inputs"][None]
    assert clip.shape == (1, 2 * 3 * 4, 3, 32, 32)
    with torch.no_grad():
        _, scores = task.scores(task(task.data_preprocessor.normalize(clip)))
        torch.save(official(task, merged=False), folder / "unmerged.pth")
        task.adapted.merge("main")
        torch.save(official(task, merged=True), folder / "merged.pth")
    return folder, scores[0].tolist()


def convert(folder, out, file="unmerged.pth"):
    given = [str(folder / file), "--config", str(out / "config.py"), "--out", str(out / "a.safetensors")]
    return main(["convert", *given])


@pytest.mark.parametrize("file, ratio", [("unmerged.pth", 0.25), ("merged.pth", None)])
def test_converted_file_labels_a_clip_as_the_published_model(published, tmp_path, capsys, file, ratio):
    folder, wanted = published
    write_config(tmp_path / "config.py", dict(main=ZERO | dict(ratio=ratio), norm=NORM))
    assert convert(folder, tmp_path, file) == 0
    out, error = capsys.readouterr()
    assert "LayerNormTuning 'norm': at its start" in out and f"backbone: weights from {folder / file}" in out
    assert f"test with the config and model.backbone.weights={folder / file}" in out
    assert "classes are named 0 to 2" in error and "nowhere" in error and error.count("\n") == 1
    assert main(["predict", str(tmp_path / "a.safetensors"), str(folder / "clip"), "--out", str(tmp_path / "p")]) == 0
    (row,) = map(json.loads, (tmp_path / "p" / "predictions.jsonl").read_text().splitlines())
    assert row["scores"] == pytest.approx(wanted, abs=1e-5) and max(wanted) - min(wanted) > 0.05
    assert row["label"] == str(np.argmax(wanted))


def test_classes_are_those_of_the_data_set_where_it_is_here(published, tmp_path, capsys):
    folder, _ = published
    (tmp_path / "val.txt").write_text("".join(f"clip {label}\n" for label in ("swim", "run", "jump")))
    data = dict(type="Kinetics", split="val", root=str(tmp_path), video_dir=str(folder))
    write_config(tmp_path / "config.py", data=data)
    assert convert(folder, tmp_path) == 0 and not capsys.readouterr().err
    manifest = read_manifest(tmp_path / "a.safetensors")
    assert manifest["classes"] == ["jump", "run", "swim"]
    assert manifest["views_of_clips"].items() >= SEEN.items()
    (tmp_path / "val.txt").write_text("clip swim\nclip run\n")
    assert convert(folder, tmp_path) == 2 and "has 2 classes, the head of the config 3" in capsys.readouterr().err


def test_classes_in_the_config_need_no_data_set(tmp_path, capsys):
    data = dict(type="ClipList", list_file=str(tmp_path / "nowhere.txt"), classes=["a", "b", "c"])
    write_config(tmp_path / "config.py", data=data)
    card = data_card(config.load(tmp_path / "config.py"))
    assert card["classes"] == ["a", "b", "c"] and card["views_of_clips"]["crops"] == 3
    assert [entry["type"] for entry in card["transforms"]] == ["SmallestMaxSize", "CenterCrop"]
    assert not capsys.readouterr().err


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_say_how_clips_are_seen(path, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("VISADAPT_DATA", str(tmp_path))
    cfg = config.load(path)
    card, count = data_card(cfg), cfg.model["head"]["num_classes"]
    assert len(card["classes"]) == count and f"0 to {count - 1}" in capsys.readouterr().err
    assert card["views_of_clips"]["num_frames"] == cfg.model["num_frames"] and card["views_of_clips"]["size"] == 224


@pytest.mark.parametrize(
    "file, wrong, said",
    [
        ("unmerged.pth", dict(adapters=dict(main=ZERO, more=LORA)), "one adapter, the config 2"),
        ("unmerged.pth", dict(adapters=dict(norm=NORM)), "one adapter, the config 0"),
        ("unmerged.pth", dict(adapters=dict(main=ZERO, norm=NORM, more=LORA)), "config 2 beside LayerNormTuning"),
        ("merged.pth", {}, "nothing for shared of the config's ZeroI2V"),
        ("unmerged.pth", dict(name="vit_base_patch16_clip_224"), "trained with QuickGELU"),
        ("unmerged.pth", dict(classes=4), "other shapes for fc.weight"),
    ],
)
def test_what_does_not_fit_is_refused(published, tmp_path, capsys, file, wrong, said):
    folder, _ = published
    write_config(tmp_path / "config.py", **wrong)
    assert convert(folder, tmp_path, file) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("file", ["unmerged.pth", "merged.pth"])
def test_image_towers_in_published_files_need_quickgelu(published, file):
    tower = dict(arch=TINY["clip"]["arch"], weights=str(published[0] / file))
    assert TimmViT(TINY["clip"]["name"], **tower).weight_report.layout == "clip"
    with pytest.raises(InputError, match="trained with QuickGELU and the model has none"):
        TimmViT("vit_base_patch16_clip_224", **tower)
