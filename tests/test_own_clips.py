"""The config to copy for clips of one's own, and what is said of them on the way."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest

from visadapt import config
from visadapt.cli import main
from visadapt.datasets.clips import ClipDataset
from visadapt.datasets.inspect import inspect
from visadapt.datasets.joint import Joint
from visadapt.datasets.video_lists import ClipFolder
from visadapt.errors import InputError

OWN_CLIPS = Path(__file__).parent.parent / "configs" / "own_clips.py"
TINY = (
    "model.backbone.weights=None",
    "model.backbone.arch={'depth':2,'embed_dim':48,'num_heads':3,'init_values':1.0,'img_size':56}",
    "train_dataloader.dataset.transform=[{'type':'RandomResizedCrop','size':[56,56],'scale':[0.5,1.0]}]",
    "val_dataloader.dataset.size=56",
)


def write_clip(path: Path, count: int) -> None:
    """A square on its way; a video, or a folder of frames where the path has no suffix."""
    images = np.full((count, 64, 80, 3), 40, np.uint8)
    for step, image in enumerate(images):
        image[20:40, 4 * step : 4 * step + 20] = 220
    (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
    if not path.suffix:
        for step, image in enumerate(images):
            cv2.imwrite(str(path / f"{step:04}.jpg"), image)
        return
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, (80, 64))
    for image in images:
        writer.write(image)
    writer.release()


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """Clips as the config's comment shows them, one of which is shorter than the frames that are asked for."""
    monkeypatch.setenv("VISADAPT_DATA", str(tmp_path))
    for name, count in (("train/wave/a.mp4", 12), ("train/wave/b.mp4", 5), ("train/clap/c", 9), ("train/clap/d", 10)):
        write_clip(tmp_path / "mine" / name, count)
    for name in ("val/wave/e.mp4", "val/clap/f"):
        write_clip(tmp_path / "mine" / name, 8)
    return tmp_path


def test_a_copy_of_the_config_for_own_clips_trains(own, capsys):
    copy, run = own / "copy.py", own / "run"
    copy.write_text(OWN_CLIPS.read_text())
    assert main(["check", str(copy), *TINY]) == 0
    assert "train         4 samples\nval           2 samples" in capsys.readouterr().out
    words = [*TINY, "train_cfg.max_epochs=1", "train_cfg.val_interval=1"]
    assert main(["train", str(copy), "--work-dir", str(run), *words]) == 0
    assert {"adapter_best.safetensors", "predictions.png", "confusion.png"} <= {p.name for p in run.iterdir()}
    cfg = config.load(copy)
    parts = cfg.model, cfg.model.adapters.main, cfg.train_dataloader.dataset, cfg.val_dataloader.dataset
    assert {part.num_frames for part in parts} == {8}
    assert not {"num_classes", "num_frames", "files", "epochs"} & set(cfg)


def test_what_the_comments_of_that_config_offer_is_taken(tmp_path):
    text, lines = re.subn(r"# (?=(?:short|flip_labels)=)", "", OWN_CLIPS.read_text())
    (tmp_path / "copy.py").write_text(text)
    cfg = config.load(tmp_path / "copy.py")
    assert lines == 2 and cfg.val_dataloader.dataset.short == "refuse"
    assert cfg.train_dataloader.dataset.flip_labels == {"left": "right", "right": "left"}


def test_clips_are_called_clips_and_their_lengths_told(own):
    data = ClipFolder("mine", "train", num_frames=8)
    found = inspect(data)
    assert found.unit == "clips" and data.unit == "clip" == Joint([dict(type="ClipFolder", root="mine/val")]).unit
    assert found.lengths() == {"min": 5, "median": 10, "max": 12, "needed": 8, "shorter": 1}
    dense = inspect(ClipFolder("mine", "train", num_frames=4, sampling="dense", stride=3))
    assert dense.lengths()["needed"] == 10 and dense.lengths()["shorter"] == 2
    for path in (own / "mine/val/clap/f").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"none of the 1 clips can be read"):
        ClipDataset([own / "mine/val/clap/f"], [0], ["clap"])[0]
    with pytest.raises(InputError, match="ClipDataset has no clips"):
        ClipDataset([], [], ["clap"])


# classes that are each other's mirror image


def flipped(own: Path, classes: list[str], **options) -> ClipDataset:
    return ClipDataset([own / "mine/val/clap/f"], [0], classes, training=True, **{"flip": 0.5, **options})


@pytest.mark.parametrize(
    ("classes", "options", "said"),
    [
        (["left", "right"], {}, "flip makes 'left' look like 'right' and keeps the label; give flip_labels={'left'"),
        (["turn_Right", "up", "turn_Left"], {}, "'turn_Right' look like 'turn_Left'"),
        (["from left to right", "from right to left"], {}, "'from left to right' look like 'from right to left'"),
        (["a left", "b left", "a right", "b right"], {}, "keeps the label, and 1 other pair; give"),
        (
            ["a left", "b left", "a right", "b right"],
            dict(flip_labels={"a left": "a right", "a right": "a left"}),
            "'b left' look like 'b right' and keeps the label; give",
        ),
        (
            ["left", "right"],
            dict(flip=0.0, transform=[dict(type="HorizontalFlip")]),
            "Flip makes .*; use flip and give",
        ),
    ],
)
def test_a_mirror_that_keeps_left_and_right_is_warned_of(own, classes, options, said):
    with pytest.warns(UserWarning, match=said) as caught:
        flipped(own, classes, **options)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)


@pytest.mark.parametrize(
    ("classes", "options"),
    [
        (["left", "right"], dict(flip=0.0)),
        (["left", "right"], dict(flip_labels={"left": "right", "right": "left"})),
        (["left", "up"], {}),
        (["left and right", "up"], {}),
    ],
)
def test_other_mirrors_are_not(own, classes, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flipped(own, classes, **options)
