"""`visadapt predict` of clips: as the evaluation saw them, for one task of several, and what is taken for a clip."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from visadapt.backbones.timm_vit import TimmViT
from visadapt.cli import main
from visadapt.core.io import save_adapter
from visadapt.datasets.base import Draw
from visadapt.datasets.clips import collate_clips
from visadapt.datasets.joint import Joint
from visadapt.datasets.moving_crop import MovingCrop
from visadapt.datasets.video_lists import ClipFolder
from visadapt.hooks.files import dataset_card
from visadapt.registry import TASKS
from visadapt.testing import noise

ARCH = dict(depth=1, embed_dim=16, num_heads=2, img_size=28, init_values=1.0)


@pytest.fixture
def stored(tmp_path):
    """Writes the file of an untrained model that was evaluated on a data set: stored(dataset, adapter)."""

    def build(dataset, adapter: dict | None = None):
        torch.manual_seed(0)
        save_file(TimmViT("vit_small_patch14_dinov2", arch=ARCH).body.state_dict(), tmp_path / "base.safetensors")
        backbone = dict(type="TimmViT", name="vit_small_patch14_dinov2", weights=f"{tmp_path}/base.safetensors")
        head = dict(type="LinearHead", num_classes=len(dataset.classes))
        model = dict(type="VideoClassifier", backbone=backbone | {"arch": ARCH}, head=head, num_frames=2)
        task = TASKS.build(model | {"adapters": dict(main=adapter or dict(type="BitFit"))}).eval()
        noise(task.head), noise(task.adapted.adapters["main"], 0.5)
        extra = task.card() | dataset_card(dataset)
        return task, str(save_adapter(task.adapted, tmp_path / "a.safetensors", heads=task.heads, extra=extra))

    return build


def frames(folder: Path, pictures=None, seed: int = 0) -> Path:
    """A folder of frames (N, C, H, W), or of two noisy ones."""
    folder.mkdir(parents=True)
    made = np.random.default_rng(seed).integers(0, 256, (2, 3, 28, 28), dtype=np.uint8)
    for i, picture in enumerate(made if pictures is None else pictures):
        Image.fromarray(np.moveaxis(np.asarray(picture), 0, -1)).save(folder / f"{i}.png")
    return folder


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def names(out: Path) -> list[str]:
    return sorted(Path(row["path"]).name for row in rows(out))


def error(capsys) -> str:
    """The one line of an error."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("visadapt: error:")]
    return line


def two_clips(root: Path, **options) -> ClipFolder:
    for seed, label in enumerate(("left", "right")):
        frames(root / label / "0", seed=seed)
    return ClipFolder(root, num_frames=2, size=28, **options)


def test_clips_are_seen_as_moving_windows_were(stored, tmp_path):
    frames(tmp_path / "scene", np.random.default_rng(0).integers(0, 256, (1, 3, 90, 120), dtype=np.uint8))
    data = MovingCrop([tmp_path / "scene"], suffix=".png", size=28, num_frames=2)
    task, path = stored(data)
    frames(tmp_path / "clip", data[Draw(0, 3)]["inputs"])
    assert main(["predict", path, str(tmp_path / "clip"), "--out", str(tmp_path / "out")]) == 0
    (found,) = rows(tmp_path / "out")
    (expected,) = task(**task.data_preprocessor(collate_clips([data[3]])), mode="predict")
    assert found["scores"] == pytest.approx(expected["scores"].tolist(), abs=1e-5)
    for options in (dict(training=True), dict(shuffled=True)):  # no clip of a file is seen so
        assert MovingCrop([tmp_path / "scene"], suffix=".png", **options).views_of_clips is None


def test_the_task_number_reaches_the_adapter(stored, tmp_path, capsys):
    part = two_clips(tmp_path / "data")
    joint = Joint([part, part])
    task, path = stored(joint, dict(type="Poly", n_tasks=2, n_skills=2, rank=2, targets=["all-linear"]))
    clip, out, scores = str(tmp_path / "data/left/0"), tmp_path / "out", []
    for number in (0, 1):
        assert main(["predict", path, clip, "--out", str(out), "--task", str(number)]) == 0
        (found,) = rows(out)
        batch = collate_clips([joint[2 * number]])
        assert batch["task"].tolist() == [number] and batch["path"] == [clip]
        (expected,) = task(**task.data_preprocessor(batch), mode="predict")
        assert found["task"] == number
        assert found["scores"] == pytest.approx(expected["scores"].tolist(), abs=1e-5)
        scores.append(found["scores"])
    assert np.abs(np.subtract(*scores)).max() > 1e-3
    capsys.readouterr()
    assert main(["predict", path, clip, "--out", str(out)]) == 2 and "give --task" in error(capsys)


def test_a_second_call_leaves_out_what_the_first_wrote(stored, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, path = stored(two_clips(tmp_path / "data"))
    frames(Path("in/a")), frames(Path("in/sub/b"))
    Path("in/notes.txt").write_text("no clip")
    for pattern in ("in", "in/*", "in/**", str(tmp_path / "in")):
        again = Path("in/out/predictions.jsonl").exists()
        assert main(["predict", path, pattern, "--out", "in/out"]) == 0
        assert names(Path("in/out")) == ["a", "b"]
        where = "in" if "*" in pattern else pattern
        said = f"left out 1 clip in {where} as results of earlier calls\n" if again else ""
        assert capsys.readouterr().err == said
    assert main(["predict", path, "in/a", "--out", "in/a/out"]) == 0  # below the frames
    assert main(["predict", path, "in/a", "--out", "in/a/out"]) == 0
    assert names(Path("in/a/out")) == ["a"]


@pytest.mark.parametrize(
    ("patterns", "out", "said"),
    [
        (["in/a", "empty"], "out", "no clips at 'empty'"),
        (["in/a", "nowhere*"], "out", "no clips at 'nowhere*'"),
        (["in/*.txt"], "out", "no clips at 'in/*.txt'"),
        (["in/a"], "in/a", "in/a is where --out in/a puts results"),
        (["in"], "in", "in/a is where --out in puts results"),
        (["in/c.mp4"], "in", "in/c.mp4 is where --out in puts results"),
    ],
)
def test_what_is_no_clip_or_lies_among_results_is_refused(stored, tmp_path, monkeypatch, capsys, patterns, out, said):
    monkeypatch.chdir(tmp_path)
    _, path = stored(two_clips(tmp_path / "data"))
    frames(Path("in/a")), Path("empty").mkdir()
    Path("in/notes.txt").write_text("no clip"), Path("in/c.mp4").write_bytes(b"")
    before = {*tmp_path.rglob("*")}
    assert main(["predict", path, *patterns, "--out", out]) == 2
    assert said in error(capsys) and {*tmp_path.rglob("*")} == before


def test_bars_count_clips(stored, tmp_path, monkeypatch, capsys):
    _, path = stored(two_clips(tmp_path / "data"))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main(["predict", path, str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 0
    assert "clip/s" in capsys.readouterr().err
