"""Segmentation as users run it: data check, train, test, predict pictures and a scene; on rasters made here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from visadapt.cli import main
from visadapt.core.io import read_manifest, save_adapter
from visadapt.datasets.base import ClassificationDataset
from visadapt.datasets.raster import RasterSegDataset
from visadapt.errors import InputError
from visadapt.hooks.files import AdapterFiles, dataset_card
from visadapt.predict.mask import MaskPredictor

rasterio = pytest.importorskip("rasterio")

CLASSES = ("dark", "bright")
BANDS = ["B02", "B03", "B04", "B08"]
CONFIG = """
from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR
from torch.optim import AdamW
from visadapt.adapters.lora import LoRA
from visadapt.backbones.timm_vit import TimmViT
from visadapt.datasets.masks import collate_masks
from visadapt.datasets.raster import RasterSegDataset
from visadapt.datasets.sampler import EpochSampler
from visadapt.heads.segment import LinearSegHead
from visadapt.hooks.files import AdapterFiles
from visadapt.metrics.segment import SegmentationMetric
from visadapt.optim.groups import TrainableGroups
from visadapt.optim.wrapper import AutocastOptimWrapper
from visadapt.tasks.segment import Segmenter

{runtime}
model = dict(
    type=Segmenter,
    backbone=dict(
        type=TimmViT, name="vit_small_patch14_dinov2", in_chans=4, out_indices=[0, 1], weights="{weights}",
        arch=dict(depth=2, embed_dim=32, num_heads=2, init_values=1.0, img_size=28),
    ),
    adapters=dict(main=dict(type=LoRA, rank=2, targets=["q", "v"])),
    head=dict(type=LinearSegHead, num_classes=2),
)
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(
        type=RasterSegDataset, image_dir="{data}/train", mask_dir="{data}/train_masks", classes={classes},
        bands=["B02", "B03", "B04", "B08"], mask_suffix=".png", training=True,
        transform=[dict(type="RandomCrop", height=28, width=28)],
    ),
    sampler=dict(type=EpochSampler, shuffle=True),
    collate_fn=dict(type=collate_masks),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(
        type=RasterSegDataset, image_dir="{data}/val", mask_dir="{data}/val_masks", classes={classes},
        bands=["B02", "B03", "B04", "B08"], mask_suffix=".png",
    ),
    sampler=dict(type=EpochSampler, shuffle=False, round_up=False),
    collate_fn=dict(type=collate_masks),
)
val_evaluator = dict(type=SegmentationMetric)
val_cfg = dict()
train_cfg = dict(by_epoch=True, max_epochs=6)
optim_wrapper = dict(
    type=AutocastOptimWrapper, constructor=TrainableGroups, optimizer=dict(type=AdamW, lr=2e-2, weight_decay=0.0)
)
custom_hooks = [dict(type=AdapterFiles, monitor="miou")]
"""


def write_raster(path: Path, image: np.ndarray) -> None:
    """(H, W, 4) uint16 with named bands in another order than the model's."""
    order = {"B08": 3, "B02": 0, "B03": 1, "B04": 2}
    size = dict(height=image.shape[0], width=image.shape[1], count=4, dtype="uint16")
    where = dict(crs="EPSG:32631", transform=rasterio.transform.from_origin(5e5, 4e6, 10, 10))
    with rasterio.open(path, "w", driver="GTiff", **size, **where) as raster:
        for i, (name, band) in enumerate(order.items(), 1):
            raster.write(image[..., band], i)
            raster.set_band_description(i, name)


def scene(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Squares of 14 pixels that are dark or bright in the last band alone, and which of both they are."""
    random = np.random.default_rng(seed)
    rows, columns = -(-height // 14), -(-width // 14)
    mask = random.integers(0, 2, (rows, columns)).repeat(14, 0).repeat(14, 1)[:height, :width].astype(np.uint8)
    image = random.integers(0, 200, (height, width, 4)).astype(np.uint16)
    image[..., 3] += mask.astype(np.uint16) * 800
    return image, mask


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with data, a config, and the run of it."""
    import torch
    from safetensors.torch import save_file

    from visadapt.backbones.timm_vit import TimmViT

    folder = tmp_path_factory.mktemp("segment")
    for split, count in (("train", 12), ("val", 4)):
        for part in (split, f"{split}_masks"):
            (folder / part).mkdir()
        for n in range(count):
            image, mask = scene(42, 56, 100 * len(split) + n)
            write_raster(folder / split / f"{n}.tif", image)
            cv2.imwrite(str(folder / f"{split}_masks" / f"{n}.png"), mask)
    torch.manual_seed(0)
    arch = dict(depth=2, embed_dim=32, num_heads=2, init_values=1.0, img_size=28)
    body = TimmViT("vit_small_patch14_dinov2", in_chans=4, arch=arch).body
    save_file(body.state_dict(), folder / "base.safetensors")
    runtime = (Path(__file__).parent.parent / "configs/_base_/runtime.py").read_text()
    made = {"data": folder, "weights": folder / "base.safetensors", "classes": CLASSES, "runtime": runtime}
    (folder / "config.py").write_text(CONFIG.format(**made))
    assert main(["train", str(folder / "config.py"), "--work-dir", str(folder / "run")]) == 0
    return folder


def test_run_learns_and_leaves_its_pages(run):
    lines = [json.loads(line) for line in (run / "run/metrics.jsonl").read_text().splitlines()]
    miou = [line["val/miou"] for line in lines if "val/miou" in line]
    assert miou[-1] > 0.8, miou
    page = (run / "run/predictions.html").read_text()
    assert page.count("<img") >= 6 and "Worst images" in page and "bright" in page
    assert {"confusion.png", "report.json", "curves.png"} <= {p.name for p in (run / "run").iterdir()}


def test_test_gives_the_figures_of_the_run(run, capsys):
    adapter = run / "run/adapter_last.safetensors"
    assert main(["test", str(run / "config.py"), str(adapter), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    last = [json.loads(line) for line in (run / "run/metrics.jsonl").read_text().splitlines()][-1]
    assert found["miou"] == pytest.approx(last["val/miou"], abs=1e-6) and found["images"] == 4


def test_predict_a_scene(run, tmp_path, capsys):
    image, mask = scene(100, 150, 7)
    write_raster(tmp_path / "scene.tif", image)
    adapter, out = str(run / "run/adapter_best.safetensors"), tmp_path / "mask.tif"
    assert main(["predict", adapter, str(tmp_path / "scene.tif"), "--out", str(out), "--tile", "56"]) == 0
    assert "100" in capsys.readouterr().out
    with rasterio.open(out) as raster, rasterio.open(tmp_path / "scene.tif") as source:
        assert raster.crs == source.crs and raster.transform == source.transform and raster.nodata == 255
        assert (raster.read(1) == mask).mean() > 0.85


def test_predict_folder_writes_masks(run, tmp_path):
    adapter = str(run / "run/adapter_best.safetensors")
    assert main(["predict", adapter, str(run / "val"), "--out", str(tmp_path / "out")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    with rasterio.open(lines[0]["mask"]) as raster:
        truth = cv2.imread(str(run / "val_masks" / f"{Path(lines[0]['path']).stem}.png"), cv2.IMREAD_UNCHANGED)
        assert (raster.read(1) == truth).mean() > 0.8


def error(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("visadapt: error:")]
    assert len(lines) == 1
    return lines[0]


def test_predict_refuses_other_bands_and_too_many_images(run, tmp_path, capsys):
    adapter = str(run / "run/adapter_best.safetensors")
    size = dict(height=20, width=20, count=1, dtype="uint16")
    with rasterio.open(tmp_path / "one.tif", "w", driver="GTiff", **size) as raster:
        raster.write(np.ones((1, 20, 20), np.uint16))
    assert main(["predict", adapter, str(tmp_path / "one.tif"), "--out", str(tmp_path / "m.tif")]) == 2
    assert "1 band and the model takes 4" in error(capsys)
    assert main(["predict", adapter, str(run / "val"), "--out", str(tmp_path / "m.tif")]) == 2
    assert "is one mask, for one image; give a folder for 4 images" in error(capsys)


def stored(run: Path, path: Path, **card) -> str:
    """The adapter file of the run with another card."""
    task = MaskPredictor(run / "run/adapter_best.safetensors", merge=False).task
    known = {"classes": CLASSES, "channels": 4, "bands": BANDS, "transforms": []}
    return str(save_adapter(task.adapted, path, heads=task.heads, extra=task.card() | known | card))


def resize(height: int, width: int, **options) -> dict:
    return dict(type="Resize", height=height, width=width, **options)


@pytest.mark.parametrize(
    "transform, options, tile, said",
    [
        (resize(56, 56), {}, 56, "images resized to 56 x 56; the scene is read in tiles of 56 px at its own"),
        (resize(56, 56), {"tile": 42}, 42, "images resized to 56 x 56; the scene is read in tiles of 42 px at"),
        (resize(56, 70), {}, 160, "images after Resize; the scene is read in tiles of 160 px at its own resolution"),
        (dict(type="LongestMaxSize", max_size=56), {}, 160, "images after LongestMaxSize; the scene is read in tiles"),
    ],
)
def test_scene_of_a_model_that_saw_resized_images(run, tmp_path, transform, options, tile, said):
    write_raster(tmp_path / "scene.tif", scene(100, 150, 7)[0])
    predictor = MaskPredictor(stored(run, tmp_path / "a.safetensors", transforms=[transform]))
    report = predictor.predict_scene(tmp_path / "scene.tif", tmp_path / "mask.tif", **options)
    assert report.tile == tile and report.lines()[1].startswith(f"the model was evaluated on {said}")
    plain = MaskPredictor(run / "run/adapter_best.safetensors")
    assert len(plain.predict_scene(tmp_path / "scene.tif", tmp_path / "plain.tif", tile=tile).lines()) == 1
    with rasterio.open(tmp_path / "mask.tif") as mask, rasterio.open(tmp_path / "plain.tif") as wanted:
        assert np.array_equal(mask.read(1), wanted.read(1)) and len(np.unique(mask.read(1))) == 2


def test_chips_of_a_model_that_saw_resized_images(run, tmp_path, capsys):
    adapter = stored(run, tmp_path / "a.safetensors", transforms=[resize(56, 56)])
    assert main(["predict", adapter, str(run / "val"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.count("1 tile of 56 px,") == 4 and said.count("images resized to 56 x 56") == 1


@pytest.mark.parametrize(
    "transforms, named",
    [
        ([dict(type="CenterCrop", height=28, width=28)], "CenterCrop"),
        ([resize(56, 56), dict(type="RandomCrop", height=28, width=28)], "RandomCrop"),
        ([resize(56, 56, p=0.5)], "random resizing"),
    ],
)
def test_transforms_that_are_no_resizing_are_refused(run, tmp_path, capsys, transforms, named):
    adapter = stored(run, tmp_path / "a.safetensors", transforms=transforms)
    np.save(tmp_path / "a.npy", scene(42, 56, 3)[0])
    assert main(["predict", adapter, str(tmp_path / "a.npy"), "--out", str(tmp_path / "out")]) == 2
    assert f"a.safetensors: images were evaluated after {named}, and a class map is of a whole" in error(capsys)


CROP, FLIP = dict(type="RandomCrop", height=28, width=28), dict(type="HorizontalFlip", p=0.5)


@pytest.mark.parametrize(
    "transforms, of_labels, of_maps",
    [
        ([CROP, FLIP], [], []),
        ([resize(56, 56), FLIP, resize(28, 28)], [resize(56, 56)], [resize(56, 56)]),
        ([dict(type="CenterCrop", height=28, width=28)], [dict(type="CenterCrop", height=28, width=28)], []),
        ([CROP, resize(14, 14)], [], []),
        (None, [], []),
    ],
)
def test_of_training_transforms_those_that_change_nothing_are_stored(run, tmp_path, transforms, of_labels, of_maps):
    maps = RasterSegDataset(
        run / "val", run / "val_masks", CLASSES, mask_suffix=".png", transform=transforms, training=True
    )
    labels = ClassificationDataset(maps.paths, [0] * 4, CLASSES, transforms, channels=4, training=True)
    for dataset, wanted in ((labels, of_labels), (maps, of_maps)):
        assert dataset_card(dataset, training=True)["transforms"] == wanted
        assert dataset_card(dataset)["transforms"] == (transforms or [])
        task = MaskPredictor(run / "run/adapter_best.safetensors", merge=False).task
        loop = SimpleNamespace(dataloader=SimpleNamespace(dataset=dataset))
        loops = {"val_loop": None, "train_loop": loop}, {"val_loop": loop, "train_loop": None}
        for given, stays in zip(loops, (wanted, transforms or [])):
            AdapterFiles().after_train(
                SimpleNamespace(rank=0, model=task, epoch=1, iter=1, seed=0, work_dir=tmp_path, **given)
            )
            assert read_manifest(tmp_path / "adapter_last.safetensors")["transforms"] == stays


def test_files_are_read_as_in_training(run, tmp_path):
    """Bands without names and a value without data that only the config knows, in a tif and in an npy."""
    image, truth = scene(42, 56, 5)
    whole = np.random.default_rng(0).integers(0, 900, (42, 56, 6)).astype(np.int16)
    whole[..., [4, 1, 5, 2]] = image
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    whole[:5, :9, [4, 1, 5, 2]], whole[10:14, :, 4] = -9999, -9999
    profile = dict(driver="GTiff", height=42, width=56, count=6, dtype="int16")
    with rasterio.open(tmp_path / "images/a.tif", "w", **profile) as raster:
        raster.write(np.moveaxis(whole, -1, 0))
    np.save(tmp_path / "a.npy", whole)
    cv2.imwrite(str(tmp_path / "masks/a.png"), truth)
    options = dict(bands=BANDS, file_bands=["B01", "B03", "B08", "B09", "B02", "B04"], nodata=-9999)
    data = RasterSegDataset(tmp_path / "images", tmp_path / "masks", CLASSES, mask_suffix=".png", **options)
    predictor = MaskPredictor(stored(run, tmp_path / "a.safetensors", **dataset_card(data)))
    report = predictor.predict_scene(tmp_path / "images/a.tif", tmp_path / "mask.tif", tile=56)
    assert report.lines()[1].endswith("does not name its bands; taken as B01, B03, B08, B09, B02, B04")
    with rasterio.open(tmp_path / "mask.tif") as raster:
        mask = raster.read(1)
    assert np.array_equal(mask == 255, data[0]["mask"].numpy() == 255) and (mask == 255).sum() == 45
    assert (mask == truth)[mask < 255].mean() > 0.85

    ((_, _, answer),) = predictor.predict_files([tmp_path / "a.npy"])
    inputs = data[0]["inputs"].numpy().transpose(1, 2, 0)
    wanted = MaskPredictor(run / "run/adapter_best.safetensors").predict([inputs])[0]["mask"]
    wanted[mask == 255] = 255
    assert np.array_equal(answer["mask"], wanted)
    assert sum(answer["shares"].values()) == pytest.approx(1 - 45 / (42 * 56), abs=1e-5)


def test_an_npy_without_a_band_that_is_filled(run, tmp_path):
    image, _ = scene(42, 56, 5)
    image = image.astype(np.float32)
    image[:3, :7, 1:], image[20, 5, 2] = -1, np.nan
    np.save(tmp_path / "a.npy", image[..., 1:])
    card = dict(file_bands=BANDS[1:], fill=100, nodata=-1)
    ((_, shown, answer),) = MaskPredictor(stored(run, tmp_path / "a.safetensors", **card)).predict_files(
        [tmp_path / "a.npy"]
    )
    image[..., 0] = 100
    image[:3, :7, 1:] = image[20, 5, 2] = 0
    wanted = MaskPredictor(run / "run/adapter_best.safetensors").predict([image])[0]["mask"]
    wanted[:3, :7] = wanted[20, 5] = 255
    assert shown.shape == image.shape and np.array_equal(answer["mask"], wanted)


@pytest.mark.parametrize("card", [dict(nodata="0"), dict(fill=[1]), dict(file_bands="B02"), dict(bands=[2, 3, 4, 8])])
def test_cards_of_other_types_are_refused(run, tmp_path, card):
    with pytest.raises(InputError, match=f"a.safetensors is damaged: its {next(iter(card))} "):
        MaskPredictor(stored(run, tmp_path / "a.safetensors", **card))


def test_unsuitable_files_among_many_are_told(run, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    write_raster(tmp_path / "in/a.tif", scene(42, 56, 3)[0])
    (tmp_path / "in/b.tif").write_bytes((tmp_path / "in/a.tif").read_bytes()[:60])
    with rasterio.open(tmp_path / "in/c.tif", "w", driver="GTiff", height=20, width=20, count=1, dtype="uint8") as one:
        one.write(np.ones((1, 20, 20), np.uint8))
    np.save(tmp_path / "in/d.npy", scene(42, 56, 3)[0])
    np.save(tmp_path / "in/e.npy", np.ones((9, 9, 2)))
    words = ["predict", str(run / "run/adapter_best.safetensors"), str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert "2 images, wrote" in (said := capsys.readouterr().out) and "3 unreadable, marked with 'error'" in said
    rows = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    wrong = {Path(row["path"]).name: row["error"] for row in rows if "error" in row}
    assert [*wrong] == ["b.tif", "c.tif", "e.npy"]
    assert "b.tif" in wrong["b.tif"] and "damaged" in wrong["b.tif"]
    assert (
        "c.tif has 1 band and the model takes 4 (B02" in wrong["c.tif"]
        and "e.npy (height 9, width 9) has 2 bands" in wrong["e.npy"]
    )
    assert main([*words, "--strict"]) == 2 and "b.tif" in error(capsys)
    assert not [*(tmp_path / "out").glob("*partial*")]


def test_data_check_counts_and_finds_what_is_wrong(run, tmp_path, capsys):
    assert main(["data", "check", str(run / "config.py"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["train"]["samples"] == 12 and found["train"]["sizes"] == {"42x56": 12}
    assert [row["band"] for row in found["train"]["bands"]] == ["B02", "B03", "B04", "B08"]
    assert found["train"]["bands"][3]["max"] > 800 > found["train"]["bands"][0]["max"]
    assert sum(row["pixels"] for row in found["val"]["classes"]) == 4 * 42 * 56

    (tmp_path / "train").mkdir(), (tmp_path / "train_masks").mkdir()
    for n, content in enumerate([(run / "val/0.tif").read_bytes(), (run / "train/1.tif").read_bytes(), b"II*"]):
        (tmp_path / "train" / f"{n}.tif").write_bytes(content)
        cv2.imwrite(str(tmp_path / "train_masks" / f"{n}.png"), np.full((42, 56), 7 if n == 1 else 0, np.uint8))
    moved = [
        f"train_dataloader.dataset.{k}={tmp_path / v}" for k, v in (("image_dir", "train"), ("mask_dir", "train_masks"))
    ]
    assert main(["data", "check", str(run / "config.py"), *moved]) == 2
    said = capsys.readouterr()
    assert "1 unreadable samples, 1 samples with wrong labels or sizes, 1 files that are in two splits" in said.err
    assert "equal files" in said.out and "7" in said.out


def test_a_picture_is_shown_in_the_colours_of_the_data_set(run, tmp_path):
    adapter = stored(run, tmp_path / "a.safetensors", palette=[[200, 30, 40], [10, 20, 250]])
    np.save(tmp_path / "p.npy", scene(42, 56, 3)[0])
    assert main(["predict", str(adapter), str(tmp_path / "p.npy"), "--out", str(tmp_path / "out")]) == 0
    (picture,) = (tmp_path / "out").glob("*.png")
    assert (cv2.imread(str(picture))[..., ::-1] == (200, 30, 40)).all(-1).any()  # in the legend
