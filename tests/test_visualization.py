"""Pictures: what is drawn, not only that something is."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from visadapt.errors import InputError
from visadapt.visualization.confusion import plot_confusion
from visadapt.visualization.curves import plot_curves, read_metrics
from visadapt.visualization.overlay import label_overlay
from visadapt.visualization.picture import as_picture, fit, font
from visadapt.visualization.sheet import COLOURS, SIDE, WIDTH, prediction_sheet

RNG = np.random.default_rng(0)
SMALL = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)


def load(path):
    with Image.open(path) as image:
        return np.asarray(image)


def count(picture, colour):
    return int((picture == np.array(colour)).all(-1).sum())


def write_metrics(path, entries):
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    return path


def test_as_picture():
    assert as_picture(SMALL) is not None and np.array_equal(as_picture(SMALL), SMALL)
    grey = as_picture(SMALL[..., 0])
    assert grey.shape == (8, 8, 3) and np.array_equal(grey[..., 2], SMALL[..., 0])
    bands = RNG.random((9, 9, 13)) * 10000
    bands[0, 0, 0] = np.nan
    out = as_picture(bands)
    assert out.shape == (9, 9, 3) and out.dtype == np.uint8 and out.min() == 0 and out.max() == 255
    assert as_picture(np.full((4, 4), 3.0)).shape == (4, 4, 3)  # no range to stretch
    with pytest.raises(InputError, match="a picture is"):
        as_picture(np.zeros(3))


def test_fit_keeps_the_score():
    assert fit("cat 0.93", 500, 12) == "cat 0.93"
    short = fit("a class name that never seems to end 0.93", 120, 12)
    assert short.endswith("… 0.93") and short.startswith("a class") and font(12).getlength(short) <= 120


def test_sheet_frames_and_pictures(tmp_path):
    path = tmp_path / "deep" / "sheet.png"
    wide = RNG.integers(0, 256, (300, 900, 3), dtype=np.uint8)
    prediction_sheet([SMALL, wide, SMALL], ["a", "b\nb", "c"], [True, False, None], path, columns=2)
    sheet = load(path)
    assert sheet.shape[1] == 2 * WIDTH and 2 * SIDE < sheet.shape[0] < 2 * SIDE + 150
    # the frames: around a square, around a picture of a third of the height, around a square
    square, flat = (SIDE + 8) ** 2 - SIDE**2, (SIDE + 8) * (SIDE // 3 + 9) - SIDE * (SIDE // 3 + 1)
    assert count(sheet, COLOURS[True]) == square == count(sheet, COLOURS[None])
    assert count(sheet, COLOURS[False]) == flat
    # the small picture is enlarged with hard edges: sixteen pixels for each
    left, top = WIDTH // 2 - SIDE // 2, 8 + 4
    block = sheet[top : top + SIDE, left : left + SIDE]
    assert np.array_equal(block[::16, ::16], SMALL) and np.array_equal(block[15::16, 15::16], SMALL)
    # captions below their pictures, within the cell
    below = sheet[top + SIDE + 5 : top + SIDE + 20] < 100
    assert below[:, :WIDTH].any() and not below[:, [0, 1, WIDTH - 1, WIDTH, WIDTH + 1]].any()
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]


def test_sheet_captions_stay_in_their_cell(tmp_path):
    titles = ["W" * 80] * 3
    prediction_sheet([SMALL] * 3, titles, [True] * 3, tmp_path / "a.png", columns=3)
    dark = load(tmp_path / "a.png")[8 + SIDE + 8 + 2 :] < 100
    assert dark.any() and not dark[:, [0, WIDTH - 1, WIDTH, 2 * WIDTH - 1, 2 * WIDTH, 3 * WIDTH - 1]].any()


def test_sheet_mistakes(tmp_path):
    with pytest.raises(InputError, match="as many titles"):
        prediction_sheet([SMALL], ["a", "b"], [True], tmp_path / "a.png")
    with pytest.raises(InputError, match="as many titles"):
        prediction_sheet([], [], [], tmp_path / "a.png")
    with pytest.raises(InputError, match="1 column"):
        prediction_sheet([SMALL], ["a"], [True], tmp_path / "a.png", columns=0)


def test_overlay():
    out = label_overlay(SMALL, ["cat 0.93", "dog 0.05"])
    assert out.shape == (256, 256, 3) and out.dtype == np.uint8
    assert np.array_equal(out[:192:32, ::32], SMALL[:6])  # above the band the image is untouched
    assert count(out[192:], (255, 255, 255)) > 10
    assert np.array_equal(label_overlay(np.zeros((300, 400, 3), np.uint8), []), np.zeros((300, 400, 3)))
    strip = label_overlay(np.zeros((2, 300, 13)), ["x"] * 9)
    assert strip.shape == (2, 300, 3)


def test_read_metrics(tmp_path):
    path = write_metrics(
        tmp_path / "m.jsonl",
        [
            {"step": 10, "epoch": 1, "loss": 2.0, "lr": 0.1, "note": "text"},
            {"step": 20, "epoch": 1, "loss": 1.0, "lr": 0.1},
            {"step": 10, "epoch": 1, "loss": 3.0, "lr": 0.1},  # repeated after a resume
            {"step": 20, "epoch": 1, "val/top1": 0.5},
        ],
    )
    series = read_metrics(path)
    assert series["loss"] == {10: 3.0, 20: 1.0} and list(series["loss"]) == [10, 20]
    assert series["val/top1"] == {20: 0.5} and set(series) == {"loss", "lr", "val/top1"}
    whole = path.read_text()
    path.write_text(whole + '{"step": 30, "lo')
    assert read_metrics(path) == series
    path.write_text('{"loss": 1}\n' + whole)
    with pytest.raises(InputError, match=r"m\.jsonl:1: not a JSON object with a 'step'"):
        read_metrics(path)
    path.write_text("")
    with pytest.raises(InputError, match="holds no figures"):
        read_metrics(path)
    with pytest.raises(InputError, match="no metrics file"):
        read_metrics(tmp_path / "none.jsonl")


def test_curves(tmp_path):
    train = [{"step": s, "epoch": 0, "loss": 1000 / s, "lr": 1e-3} for s in range(1, 200)]
    train[5]["loss"] = float("nan")
    path = write_metrics(tmp_path / "m.jsonl", [*train, {"step": 100, "val/top1": 0.5, "val/loss": 0.2}])
    plot_curves(path, tmp_path / "all.png")
    plot_curves(write_metrics(path, train[:1]), tmp_path / "two.png")
    three, two = load(tmp_path / "all.png"), load(tmp_path / "two.png")
    assert three.shape[1] == pytest.approx(1.5 * two.shape[1], abs=2) and three.std() > 5
    with pytest.raises(InputError, match=r"neither loss.*it has time"):
        plot_curves(write_metrics(path, [{"step": 1, "time": 2}]), tmp_path / "none.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.png", "m.jsonl", "two.png"]


def test_confusion(tmp_path):
    plot_confusion([[5, 0], [0, 5]], ["cat", "a class with a name of great length"], tmp_path / "right.png")
    plot_confusion([[0, 5], [5, 0]], ["cat", "a class with a name of great length"], tmp_path / "wrong.png")
    right, wrong = load(tmp_path / "right.png"), load(tmp_path / "wrong.png")
    full = right[..., :3].reshape(-1, 3)[right[..., :3].sum(-1).argmin()]
    dark = ((right[..., :3].astype(int) - (8, 48, 107)) ** 2).sum(-1) < 300  # the colour of a full share
    ys, xs = dark[:, : right.shape[1] * 3 // 4].nonzero()
    assert full is not None and np.corrcoef(ys, xs)[0, 1] > 0.5  # the diagonal runs downwards
    dark = ((wrong[..., :3].astype(int) - (8, 48, 107)) ** 2).sum(-1) < 300
    ys, xs = dark[:, : wrong.shape[1] * 3 // 4].nonzero()
    assert np.corrcoef(ys, xs)[0, 1] < -0.5
    plot_confusion(np.eye(100, dtype=int), [str(i) for i in range(100)], tmp_path / "many.png")
    assert max(load(tmp_path / "many.png").shape) < 2000
    plot_confusion(np.zeros((3, 3), dtype=int), list("abc"), tmp_path / "empty.png")
    with pytest.raises(InputError, match=r"of 3 classes is \(3, 3\), got \(2, 2\)"):
        plot_confusion([[1, 0], [0, 1]], list("abc"), tmp_path / "bad.png")
