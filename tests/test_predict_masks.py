"""`visadapt predict` of class maps and labels: bands, names of results, tiles of pictures, colours, a second call."""

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
from visadapt.predict.mask import MaskPredictor
from visadapt.registry import TASKS

rasterio = pytest.importorskip("rasterio")
from scenes import noise, read, write  # noqa: E402

CLASSES = ["land", "water", "cloud"]
NAMES = ["B02", "B03", "B04", "B08"]
ARCH = dict(depth=1, embed_dim=16, num_heads=2, img_size=28)
RESIZE = dict(type="Resize", height=28, width=28)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Writes the adapter file of an untrained model: stored(task, channels, **card)."""
    folder = tmp_path_factory.mktemp("stored")

    def build(task: str = "Segmenter", channels: int = 3, **card) -> str:
        torch.manual_seed(0)
        backbone = dict(name="vit_small_patch14_dinov2", in_chans=channels, arch=ARCH)
        weights = folder / f"base{channels}.safetensors"
        save_file(TimmViT(**backbone).body.state_dict(), weights)
        backbone |= dict(type="TimmViT", weights=str(weights))
        head = dict(type="LinearHead", num_classes=3)
        if task == "Segmenter":
            backbone["out_indices"], head = [0], dict(type="LinearSegHead", num_classes=3)
        built = TASKS.build(dict(type=task, backbone=backbone, head=head, adapters=dict(main=dict(type="BitFit"))))
        torch.nn.init.normal_([*built.head.parameters()][-2], std=5)
        known = dict(classes=CLASSES, channels=channels, transforms=[])
        path = folder / f"{len([*folder.iterdir()])}.safetensors"
        return str(save_adapter(built.adapted, path, heads=built.heads, extra=built.card() | known | card))

    return build


def error(capsys) -> str:
    """The one line of an error."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("visadapt: error:")]
    return line


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def picture(path: Path, height: int = 42, width: int = 56, seed: int = 0) -> np.ndarray:
    """Smooth colours, so that classes form areas."""
    image = noise(height // 7, width // 7, 3, seed=seed).repeat(7, 0).repeat(7, 1)
    Image.fromarray(image).save(path)
    return image


# bands
def test_bands_without_names_are_taken_by_their_place_and_that_is_said_once(stored, tmp_path, capsys):
    adapter = stored(channels=4, bands=NAMES)
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", noise(42, 56, 4))
    assert main(["predict", adapter, f"{tmp_path}/*.npy", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert said == "images that do not name their bands are taken to have B02, B03, B04, B08, in this order\n"
    plain = MaskPredictor(stored(channels=4))
    assert np.array_equal(Image.open(rows(tmp_path / "out")[0]["mask"]), plain.predict([noise(42, 56, 4)])[0]["mask"])
    list(plain.predict_files([tmp_path / "a.npy"]))
    assert not capsys.readouterr().err


def test_another_number_of_bands_is_refused_with_both_lists(stored, tmp_path, capsys):
    adapter, out = stored(channels=4, bands=NAMES), ["--out", str(tmp_path / "out")]
    np.save(tmp_path / "a.npy", noise(4, 42, 56))
    picture(tmp_path / "b.png")
    assert main(["predict", adapter, str(tmp_path / "a.npy"), *out]) == 2
    wanted = "the model takes 4 (B02, B03, B04, B08)"
    assert f"a.npy (height 4, width 42) has 56 bands and {wanted}" in error(capsys)
    assert main(["predict", adapter, str(tmp_path / "b.png"), *out]) == 2
    assert f"b.png has 3 bands and {wanted}" in error(capsys)


def test_alpha_of_a_picture_is_no_band(stored, tmp_path):
    image = noise(28, 28, 4)
    Image.fromarray(image).save(tmp_path / "a.png")
    predictor = MaskPredictor(stored(bands=["R", "G", "B"]))
    assert np.array_equal(predictor.read(tmp_path / "a.png"), image[..., :3])


@pytest.mark.parametrize("task", ["Segmenter", "ImageClassifier"])
def test_wrong_bands_are_told_in_words_of_a_prediction_and_others_go_on(stored, tmp_path, capsys, task):
    adapter, out = stored(task), tmp_path / "out"
    np.save(tmp_path / "a.npy", noise(28, 28, 5))
    picture(tmp_path / "b.png")
    assert main(["predict", adapter, str(tmp_path / "a.npy"), str(tmp_path / "b.png"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.endswith(
        f"1 image, wrote {out}/predictions.jsonl; 1 unreadable, marked with 'error'\n"
    )
    wrong, right = rows(out)
    assert "error" not in right and "set channels" not in wrong["error"]
    assert wrong["error"].endswith("3 are needed; give the model images with the bands it was trained on")
    assert main(["predict", adapter, str(tmp_path / "a.npy"), "--out", str(out)]) == 2
    assert "no prediction for 1 image, " in (said := error(capsys)) and "a.npy has 5 bands" in said


# names of results
def test_a_png_is_the_mask_of_one_picture(stored, tmp_path, capsys):
    picture(tmp_path / "a.png")
    out = tmp_path / "new/m.png"
    assert main(["predict", stored(), str(tmp_path / "a.png"), "--out", str(out)]) == 0
    mask = np.array(Image.open(out))
    assert mask.shape == (42, 56) and [p.name for p in out.parent.iterdir()] == ["m.png"]
    assert f"wrote {out}: 56 x 42 pixels, " in (said := capsys.readouterr().out)
    present = [f"{name} {(mask == i).mean():.1%}" for i, name in enumerate(CLASSES) if (mask == i).any()]
    assert said.strip().endswith(", ".join(present))


@pytest.mark.parametrize(
    "task, inputs, out, message",
    [
        ("Segmenter", ["a.png", "b.png"], "m.png", "m.png is one mask, for one image; give a folder for 2 images"),
        ("Segmenter", ["a.png"], "m.tif", "m.tif: the mask of a picture is a PNG; give a name that ends in .png, or"),
        ("Segmenter", ["a.png"], "m.jpg", "m.jpg: the mask of a picture is a PNG"),
        ("Segmenter", ["s.tif"], "m.png", "m.png: the mask of a scene is a GeoTIFF; give a name that ends in .tif"),
        ("Segmenter", ["a.png"], "a.png", "a.png would be overwritten"),
        ("Segmenter", ["."], ".", "a.png is where --out . puts results; write them to another folder"),
        ("Segmenter", ["masks/a.png"], ".", "a.png is where --out . puts results"),
        ("ImageClassifier", ["a.png"], "m.tif", "m.tif names a file; labels and pictures go to a folder, give its"),
        ("ImageClassifier", ["a.png"], "m.jsonl", "m.jsonl names a file"),
    ],
)
def test_names_of_results_that_do_not_fit(stored, tmp_path, monkeypatch, capsys, task, inputs, out, message):
    monkeypatch.chdir(tmp_path)
    Path("masks").mkdir()
    for name in ("a.png", "b.png", "masks/a.png"):
        picture(name)
    write(Path("s.tif"), noise(3, 28, 28))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.*")}
    assert main(["predict", stored(task), *inputs, "--out", out]) == 2
    assert message in error(capsys)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.*")} == before


# tiles
@pytest.mark.parametrize("words", [["--tile", "28"], ["--overlap", "0.5"], ["--memory", "100"]])
def test_options_about_tiles_without_effect_are_told(stored, tmp_path, capsys, words):
    picture(tmp_path / "a.png", 28, 28)
    line = [str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), *words]
    assert main(["predict", stored("ImageClassifier"), *line]) == 2
    assert f"labels whole images; leave out {words[0]}, made for class maps" in error(capsys)
    assert main(["predict", stored(), *line]) == 0
    assert capsys.readouterr().err == f"{words[0]}: no image is larger than a tile; all were scored as a whole\n"
    line[2] += ".png"
    assert main(["predict", stored(), *line]) == 0
    assert f"{words[0]}: no image is larger" in capsys.readouterr().err


def test_pictures_in_tiles_have_the_classes_of_a_scene(stored, tmp_path, capsys):
    predictor, image = MaskPredictor(stored()), picture(tmp_path / "a.png", 140, 105)
    write(tmp_path / "a.tif", np.moveaxis(image, -1, 0))
    report = predictor.predict_scene(tmp_path / "a.tif", tmp_path / "m.tif", tile=56, overlap=0.5)
    (answer,) = predictor.predict([image], tile=56, overlap=0.5)
    assert np.array_equal(answer["mask"], read(tmp_path / "m.tif")) and answer["tile"] == 56
    assert answer["shares"] == report.shares and len(report.shares) > 1
    (whole,) = predictor.predict([image])
    assert "tile" not in whole and not np.array_equal(whole["mask"], answer["mask"])
    words = [str(tmp_path / "a.png"), "--tile", "56", "--overlap", "0.5", "--out", str(tmp_path / "out")]
    assert main(["predict", stored(), *words]) == 0
    (row,) = rows(tmp_path / "out")
    assert row["tile"] == 56 and np.array_equal(Image.open(row["mask"]), answer["mask"])


def test_the_memory_decides_which_pictures_are_tiled(stored, capsys):
    plain, resizing = MaskPredictor(stored()), MaskPredictor(stored(transforms=[RESIZE]))
    assert not plain.takes_tiles(1024, 1024) and plain.takes_tiles(1024, 1025)
    assert not resizing.takes_tiles(9000, 9000) and resizing.takes_tiles(28, 57, tile=56)
    images = [noise(60, 80, 3), noise(61, 80, 3), noise(60, 80, 3, seed=1)]
    answers = plain.predict(images, memory=60 * 80 * 1024)
    assert [answer.get("tile") for answer in answers] == [None, 32, None]
    assert [answer["mask"].shape for answer in answers] == [(60, 80), (61, 80), (60, 80)]
    for i in (0, 2):
        assert np.array_equal(answers[i]["mask"], plain.predict([images[i]])[0]["mask"])
    assert capsys.readouterr().err.startswith("large pictures are scored in tiles")
    resizing.predict(images, tile=56)
    assert "evaluated on images resized to 28 x 28; a picture is read in tiles of 56 px" in capsys.readouterr().err


def test_tiles_keep_what_has_no_data_and_what_has_no_scores(stored, monkeypatch):
    predictor, image = MaskPredictor(stored(nodata=0)), noise(60, 80, 3)
    image[:9, :70] = 0
    (answer,) = predictor.predict([image], tile=32)
    assert np.array_equal(answer["mask"] == 255, (image == 0).all(-1))
    assert sum(answer["shares"].values()) == pytest.approx(1 - 9 * 70 / (60 * 80), abs=1e-5)
    monkeypatch.setattr(predictor, "score", lambda tiles: torch.full((len(tiles), 3, 32, 32), torch.nan))
    assert "scores are not finite" in predictor.predict([image], tile=32)[0]["error"]


def test_a_turned_photograph_is_turned_in_tiles_too(stored, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright
    Image.fromarray(noise(56, 84, 3)).save(tmp_path / "a.jpg", exif=exif)
    ((_, image, answer),) = MaskPredictor(stored()).predict_files([tmp_path / "a.jpg"], tile=42)
    assert image.shape == (84, 56, 3) and answer["mask"].shape == (84, 56)


# what is written
@pytest.mark.parametrize("palette", [None, [[200, 30, 40], [10, 20, 250], [0, 90, 0]]])
def test_masks_have_colours_and_their_values_are_classes(stored, tmp_path, palette):
    image = noise(42, 56, 3)
    image[:5] = 0
    np.save(tmp_path / "a.npy", image)
    card = {} if palette is None else {"palette": palette}
    assert main(["predict", stored(nodata=0, **card), str(tmp_path / "a.npy"), "--out", str(tmp_path / "m.png")]) == 0
    mask = Image.open(tmp_path / "m.png")
    assert mask.mode == "P" and (np.array(mask)[:5] == 255).all() and np.array(mask)[5:].max() < 3
    colours = np.array(mask.convert("RGB"))
    shown = np.array(palette or [(31, 119, 180), (255, 127, 14), (44, 160, 44)])  # those of "tab10"
    assert np.array_equal(colours[5:], shown[np.array(mask)[5:]]) and not colours[:5].any()


def test_a_second_call_leaves_out_what_the_first_wrote(stored, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("in/sub").mkdir(parents=True)
    picture("in/a.png"), picture("in/sub/b.png"), write(Path("in/s.tif"), noise(3, 28, 28))
    Path("in/s.partial.tif").write_bytes(b"of a killed call")
    adapter = stored()
    for pattern in ("in", "in/**/*.*", str(tmp_path / "in"), "."):
        left = len([*Path("in/out").rglob("*.png"), *Path("in/out").rglob("*.tif")]) + 1
        assert main(["predict", adapter, pattern, "--out", "in/out"]) == 0
        found = sorted(Path(row["path"]).name for row in rows(Path("in/out")))
        assert found == ["a.png", "b.png", "s.tif"]
        where = "in" if "*" in pattern else pattern
        plural = "s" * (left > 1)
        assert capsys.readouterr().err == f"left out {left} image{plural} in {where} as results of earlier calls\n"
    assert main(["predict", adapter, "in/out/masks", "--out", "elsewhere"]) == 0
    Path("out/in").mkdir(parents=True)
    picture("out/in/c.png")
    assert main(["predict", adapter, "out/in", "out/*/*.png", "--out", "out"]) == 0
    assert [Path(row["path"]).name for row in rows(Path("out"))] == ["c.png"]


def test_scenes_tell_their_shares_and_count_in_plain_words(stored, tmp_path, capsys):
    values = noise(3, 6, 8).repeat(7, 1).repeat(7, 2)
    values[:, :7] = 0
    write(tmp_path / "s.tif", values, nodata=0)
    assert main(["predict", stored(), str(tmp_path / "s.tif"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert ", 1 tile of 64 px, " in said and "\n1 image, wrote" in said
    (row,) = rows(tmp_path / "out")
    mask = read(row["mask"])
    wanted = {name: (mask == i).mean() for i, name in enumerate(CLASSES) if (mask == i).any()}
    assert row["shares"] == pytest.approx(wanted, abs=1e-6) and len(wanted) > 1
    assert sum(row["shares"].values()) + row["without_class"] == pytest.approx(1, abs=1e-5) and row["tile"] == 64
