"""Clips as users run them: check, data check, train, test and predict; on videos made here."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from visadapt.backbones.timm_vit import TimmViT
from visadapt.cli import main
from visadapt.core.io import read_manifest, save_like
from visadapt.predict.clip import ClipPredictor

ARCH = dict(depth=2, embed_dim=48, num_heads=3, img_size=28, init_values=1.0)
CONFIG = """
from torch.optim import AdamW
from visadapt.adapters.zeroi2v import ZeroI2V
from visadapt.backbones.timm_vit import TimmViT
from visadapt.datasets.clips import collate_clips
from visadapt.datasets.sampler import EpochSampler
from visadapt.datasets.video_lists import ClipFolder
from visadapt.heads.linear import LinearHead
from visadapt.hooks.files import AdapterFiles
from visadapt.metrics.classify import ClassificationMetric
from visadapt.optim.groups import TrainableGroups
from visadapt.optim.wrapper import AutocastOptimWrapper
from visadapt.tasks.video import VideoClassifier

model = dict(
    type=VideoClassifier,
    backbone=dict(type=TimmViT, name="vit_small_patch14_dinov2", weights="{weights}", arch={arch}),
    num_frames=4,
    adapters=dict(main=dict(type=ZeroI2V, num_frames=4, offsets=[[1, 1], [-1, 1]])),
    head=dict(type=LinearHead, num_classes=2),
    pool="avg",
)
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(type=ClipFolder, root="{data}", split="train", num_frames=4, training=True,
                 transform=[dict(type="Resize", height=28, width=28)]),
    sampler=dict(type=EpochSampler, shuffle=True),
    collate_fn=dict(type=collate_clips),
)
val_dataloader = dict(
    batch_size=2,
    num_workers=0,
    dataset=dict(type=ClipFolder, root="{data}", split="val", num_frames=4, size=28, crops=3),
    sampler=dict(type=EpochSampler, shuffle=False, round_up=False),
    collate_fn=dict(type=collate_clips),
)
val_evaluator = dict(type=ClassificationMetric)
val_cfg = dict()
train_cfg = dict(by_epoch=True, max_epochs=2)
optim_wrapper = dict(
    type=AutocastOptimWrapper, constructor=TrainableGroups, optimizer=dict(type=AdamW, lr=1e-3, weight_decay=0.0)
)
custom_hooks = [dict(type=AdapterFiles, monitor="top1")]
randomness = dict(seed=0)
"""


def video(path, rng, backwards):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, (48, 32))
    for step in range(8)[:: -1 if backwards else 1]:
        frame = rng.integers(0, 60, (32, 48, 3)).astype(np.uint8)
        frame[8:24, 4 * step : 4 * step + 12] = 250
        writer.write(frame)
    writer.release()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run on clips of a square that goes to the right or to the left, one of them unreadable."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for label in ("left", "right"):
            for n in range(count):
                video(folder / "data" / split / label / f"{n}.mp4", rng, label == "left")
    (folder / "data/val/left/bad.mp4").write_bytes(b"no video")
    torch.manual_seed(0)
    save_file(TimmViT("vit_small_patch14_dinov2", arch=ARCH).body.state_dict(), folder / "base.safetensors")
    config = folder / "config.py"
    config.write_text(CONFIG.format(weights=folder / "base.safetensors", arch=ARCH, data=folder / "data"))
    assert main(["train", str(config), "--work-dir", str(folder / "run")]) == 0
    return folder


def test_check_and_data_check_read_clips(run, capsys):
    assert main(["check", str(run / "config.py")]) == 0
    out = capsys.readouterr().out
    assert "train         8 samples" in out and "OK" in out
    assert main(["data", "check", str(run / "config.py")]) != 0  # one clip cannot be read
    out = capsys.readouterr().out
    assert "bad.mp4" in out and "32x48" in out.replace(" ", "")


def test_a_run_leaves_its_pictures_and_says_how_clips_are_seen(run):
    assert (run / "run" / "predictions.png").exists()
    manifest = read_manifest(run / "run" / "adapter_best.safetensors")
    assert manifest["task"] == dict(type="VideoClassifier", pool="avg", num_frames=4, frame_pool="mean", pool_heads=8)
    seen = manifest["views_of_clips"]
    assert seen["size"] == 28 and seen["crops"] == 3 and seen["num_frames"] == 4 and seen["transform"] == []


def test_test_counts_the_clip_that_cannot_be_read(run, capsys):
    last = str(run / "run" / "adapter_last.safetensors")
    assert main(["test", str(run / "config.py"), last, "--json", "--out", str(run / "tested")]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[0])
    assert found["images"] == 4 and found["unreadable"] == 1 and 0 <= found["top1"] <= 1
    assert (run / "tested" / "predictions.png").exists()


def test_predictions_are_those_of_the_evaluation(run, capsys, tmp_path):
    last, out = str(run / "run" / "adapter_last.safetensors"), tmp_path / "out"
    assert main(["predict", last, str(run / "data" / "val"), "--out", str(out)]) == 0
    assert "4 clips, wrote" in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [row["path"].rsplit("/", 2)[1] for row in rows] == ["left", "left", "left", "right", "right"]
    assert sum("error" in row for row in rows) == 1 and len(list(out.glob("*.png"))) == 4
    assert all(abs(sum(row["scores"]) - 1) < 1e-5 for row in rows if "error" not in row)
    right = np.mean([row["label"] == row["path"].rsplit("/", 2)[1] for row in rows if "error" not in row])
    capsys.readouterr()
    assert main(["test", str(run / "config.py"), last, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["top1"] == pytest.approx(right)


def test_unmerged_predictions_are_equal(run):
    last, clip = run / "run" / "adapter_last.safetensors", run / "data/val/left/0.mp4"
    (_, picture, merged), (_, _, plain) = (
        next(iter(ClipPredictor(last, merge=merge).predict_files([clip]))) for merge in (True, False)
    )
    assert merged["scores"] == pytest.approx(plain["scores"], abs=1e-5)
    assert picture.ndim == 3 and picture.dtype == np.uint8


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nowhere.mp4"], "no clips at 'nowhere.mp4'"),
        (["{data}/val/left/0.mp4", "--batch-size", "4"], "leave out --batch-size"),
        (["{data}/val/left/0.mp4", "--tile", "4"], "leave out --tile"),
        (["{data}/val/left/bad.mp4", "--strict"], "bad.mp4"),
        (["{data}/val/left/0.mp4", "--out", "x.png"], "names a file"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(run, capsys, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    given = [a.format(data=run / "data") for a in arguments]
    assert main(["predict", str(run / "run" / "adapter_last.safetensors"), *given]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error


def test_merged_backbone_and_rest_predict_the_same(run, capsys, tmp_path):
    last, clip = run / "run" / "adapter_last.safetensors", run / "data/val/left/0.mp4"
    out, rest = tmp_path / "merged.safetensors", tmp_path / "rest.safetensors"
    assert main(["merge", str(last), "--out", str(out)]) == 0
    assert "left out: main (attention), main (tokens); --rest FILE keeps it" in capsys.readouterr().out
    assert main(["merge", str(last), "--out", str(out), "--rest", str(rest)]) == 0
    assert "holds what does not fold: main (attention), main (tokens)" in capsys.readouterr().out
    before, after = (next(iter(ClipPredictor(path).predict_files([clip])))[2] for path in (last, rest))
    assert before["scores"] == pytest.approx(after["scores"], abs=1e-5)
    manifest = read_manifest(rest)
    assert manifest["backbone"]["arguments"]["weights"] == str(out) and manifest["num_frames"] == 4
    assert manifest["adapters"]["main"]["arguments"]["ratio"] is None


def test_rest_of_what_folds_wholly_is_refused(run, capsys, tmp_path):
    from visadapt.adapters.lora import LoRA
    from visadapt.core.adapted import Adapted

    adapted = Adapted(TimmViT("vit_small_patch14_dinov2", weights=str(run / "base.safetensors"), arch=ARCH)).eval()
    adapted.add("a", LoRA(rank=2))
    adapted.save(tmp_path / "lora.safetensors")
    given = ["--out", str(tmp_path / "m.safetensors"), "--rest", str(tmp_path / "r.safetensors")]
    assert main(["merge", str(tmp_path / "lora.safetensors"), *given]) == 2
    assert "everything folds; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "m.safetensors").exists()


def test_python_takes_the_length_of_clips_from_the_file(run):
    """A file made with clips of 4 frames also passes its probe where clips have 8."""
    from visadapt.core.adapted import Adapted

    for set_before, after in ((1, 4), (8, 8)):
        backbone = TimmViT("vit_small_patch14_dinov2", weights=str(run / "base.safetensors"), arch=ARCH)
        adapted = Adapted(backbone).eval()
        adapted.ctx.num_frames = set_before
        report = adapted.load(run / "run" / "adapter_last.safetensors")
        assert report.probe_error < 1e-5 and adapted.ctx.num_frames == after


def test_model_and_data_of_other_clip_lengths_are_refused(run, capsys):
    assert main(["check", str(run / "config.py"), "val_dataloader.dataset.num_frames=8"]) == 2
    said = "val_dataloader: the data set gives clips of 8 frames, the model takes 4; give both one num_frames"
    assert said in capsys.readouterr().err


def test_a_file_of_another_task_is_refused(run, capsys):
    text = (run / "config.py").read_text()
    image = text.replace("type=VideoClassifier", "type=ImageClassifier").replace(
        "    num_frames=4,\n    adapters", "    adapters"
    )
    image = image.replace(
        "visadapt.tasks.video import VideoClassifier", "visadapt.tasks.classify import ImageClassifier"
    )
    (run / "image.py").write_text(image)
    assert main(["test", str(run / "image.py"), str(run / "run" / "adapter_last.safetensors")]) == 2
    assert "is of a VideoClassifier" in (error := capsys.readouterr().err) and "builds a ImageClassifier" in error


def test_check_warns_of_embeddings_for_other_clips_and_refuses_a_cache(run, capsys):
    assert main(["check", str(run / "config.py"), "model.adapters.main.num_frames=8"]) == 0
    assert "adapter 'main' has frame embeddings for 8 frames, resampled to the model's 4" in capsys.readouterr().err
    (run / "cached.py").write_text((run / "config.py").read_text() + "\ncache_features = True\n")
    assert main(["check", str(run / "cached.py")]) == 2
    assert "cache_features needs a wholly frozen backbone" in capsys.readouterr().err


def test_a_picture_among_videos_is_no_clip(run, capsys, tmp_path):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "a.mp4").write_bytes((run / "data/val/left/0.mp4").read_bytes())
    cv2.imwrite(str(mixed / "thumb.png"), np.zeros((8, 8, 3), np.uint8))
    last, out = str(run / "run" / "adapter_last.safetensors"), tmp_path / "out"
    assert main(["predict", last, str(mixed), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == [str(mixed / "a.mp4")]


def test_base_weights_that_have_moved_are_asked_for(run, capsys, tmp_path):
    moved = tmp_path / "moved.safetensors"
    (run / "base.safetensors").rename(moved)
    try:
        given = [
            str(run / "run" / "adapter_last.safetensors"),
            str(run / "data/val/left/0.mp4"),
            "--out",
            str(tmp_path),
        ]
        assert main(["predict", *given]) == 2
        assert "which is not here; give the file as --weights" in capsys.readouterr().err
        assert main(["predict", *given, "--weights", str(moved)]) == 0
    finally:
        moved.rename(run / "base.safetensors")


def test_base_weights_below_the_home_folder_are_found(run, tmp_path, monkeypatch):
    from visadapt.core.adapted import Adapted

    monkeypatch.setenv("HOME", str(run))
    last, clip = run / "run" / "adapter_last.safetensors", run / "data/val/left/0.mp4"
    backbone = TimmViT("vit_small_patch14_dinov2", weights="~/base.safetensors", arch=ARCH)
    adapted = Adapted(backbone).eval()
    adapted.load(last)
    path = tmp_path / "home.safetensors"
    save_like(adapted, path, last)
    assert read_manifest(path)["backbone"]["arguments"]["weights"] == "~/base.safetensors"
    found, expected = (next(iter(ClipPredictor(p).predict_files([clip])))[2] for p in (path, last))
    assert found["scores"] == expected["scores"]
