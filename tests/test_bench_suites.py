"""Suites of the benchmark: each cell's config is the published protocol, or the one that is said to be ours."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import TINY
from mmengine.optim import build_optim_wrapper
from PIL import Image
from scipy.io import savemat
from torchvision.transforms import InterpolationMode, v2

from visadapt import config
from visadapt.backbones.timm_vit import TimmViT
from visadapt.benchmark.cells import Cell, described
from visadapt.benchmark.cost import step_cost
from visadapt.benchmark.recipes import methods, recipe
from visadapt.benchmark.suites import SPLITS, SUITES, suite
from visadapt.cli import main
from visadapt.commands import bench
from visadapt.datasets.masks import collate_masks
from visadapt.errors import InputError
from visadapt.registry import ADAPTERS, BACKBONES, DATASETS, TASKS
from visadapt.transforms.albu import Albu

VTAB = {
    "natural": {
        **{"cifar": 100, "caltech101": 102, "dtd": 47, "oxford_flowers102": 102, "oxford_iiit_pet": 37, "svhn": 10},
        "sun397": 397,
    },
    "specialized": {"patch_camelyon": 2, "eurosat": 10, "resisc45": 45, "diabetic_retinopathy": 5},
    "structured": {
        **{"clevr_count": 8, "clevr_dist": 6, "dmlab": 6, "kitti": 4, "dsprites_loc": 16, "dsprites_ori": 16},
        **{"smallnorb_azi": 18, "smallnorb_ele": 9},
    },
}
FINE = {"cub_200_2011": 200, "nabirds": 555, "oxford_flowers102": 102, "stanford_dogs": 120, "stanford_cars": 196}
WHOLE = {"type": "BicubicResize", "height": 224, "width": 224}
FLIP = {"type": "HorizontalFlip", "p": 0.5}


def cell(name: str, task: str, method: str = "LoRA", **changes) -> Cell:
    found = suite(name)
    return Cell(found, found.tasks[task], method, **{"seed": 0, **changes})


def loaders(found: Cell) -> tuple[dict, dict]:
    cfg = found.config.to_dict()
    return cfg["train_dataloader"], cfg["val_dataloader"]


def splits(found: Cell) -> list[str]:
    return [loader["dataset"]["split"] for loader in loaders(found)]


# ---- VTAB-1k ------------------------------------------------------------------------------------------------------
def test_vtab_has_the_tasks_and_groups_of_the_protocol():
    tasks = suite("vtab").tasks
    assert {g: {t.name: t.classes for t in tasks.values() if t.group == g} for g in VTAB} == VTAB
    assert list(tasks) == [name for group in VTAB.values() for name in group] and len(tasks) == 19
    assert Counter(t.group for t in tasks.values()) == {"natural": 7, "specialized": 4, "structured": 8}


@pytest.mark.parametrize(("group", "task"), [(g, t) for g, names in VTAB.items() for t in names])
def test_a_vtab_cell(group, task):
    found = cell("vtab", task)
    train, test = loaders(found)
    assert (train["batch_size"], train["drop_last"], train["sampler"]["shuffle"]) == (64, True, True)
    assert (test["batch_size"], test["drop_last"], test["sampler"]["shuffle"]) == (256, False, False)
    assert test["sampler"]["round_up"] is False  # no test image counts twice
    assert [loader["dataset"]["transform"] for loader in (train, test)] == [[WHOLE], [WHOLE]]
    assert {loader["dataset"]["task"] for loader in (train, test)} == {task}
    assert splits(found) == ["train800val200", "test"]
    assert splits(replace(found, select=True)) == ["train800", "val200"]
    cfg = found.config
    assert cfg.model.head == {"type": "LinearHead", "num_classes": VTAB[group][task]}
    assert cfg.train_cfg == {"by_epoch": True, "max_epochs": 100, "val_interval": 100}  # only the last epoch is tested
    assert (cfg.param_scheduler.T_max, cfg.param_scheduler.type) == (100, "CosineAnnealingLR")
    assert {"size": 224, "epochs": 100, "batch": 64}.items() <= described(found).items()


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("vtab", (127.5,) * 3, (127.5,) * 3),
        ("fgvc", (127.5,) * 3, (127.5,) * 3),
        ("fewshot", (122.7709, 116.746, 104.0937), (68.5005, 66.6322, 70.3232)),
        ("offline", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    ],
)
def test_images_are_normalised_by_the_mean_and_deviation_of_the_weights(name, mean, std):
    """Of ImageNet-21k they are 0.5; CLIP and DINOv2 have their own. Data sets scale nothing."""
    found = suite(name)
    backbone = Cell(found, next(iter(found.tasks.values())), "LoRA", 0).config.model.backbone
    assert backbone == {"type": "TimmViT", "name": found.protocol.model, "weights": found.protocol.weights}
    with torch.device("meta"):
        built = TimmViT(found.protocol.model)
    assert built.mean == pytest.approx(mean, abs=1e-3) and built.std == pytest.approx(std, abs=1e-3)
    assert (built.depth, built.patch) == (12, 14 if name == "offline" else 16)


@pytest.mark.parametrize("shape", [(64, 64), (37, 50), (224, 224), (301, 517), (1000, 120)])
def test_bicubic_resizing_is_that_of_torchvision(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    theirs = v2.Resize((224, 224), InterpolationMode.BICUBIC)(Image.fromarray(image))
    assert np.array_equal(Albu([WHOLE])(image, seed=0), np.asarray(theirs))


# ---- FGVC ---------------------------------------------------------------------------------------------------------
def test_fgvc_cells():
    tasks = suite("fgvc").tasks
    assert {t.name: t.classes for t in tasks.values()} == FINE
    found = cell("fgvc", "nabirds")
    train, test = loaders(found)
    assert (train["batch_size"], train["drop_last"], found.config.train_cfg.max_epochs) == (128, True, 100)
    shrink = {"type": "SmallestMaxSize", "max_size": 256, "interpolation": 1, "area_for_downscale": "image"}
    assert train["dataset"]["transform"] == [shrink, {"type": "RandomCrop", "height": 224, "width": 224}, FLIP]
    assert test["dataset"]["transform"] == [shrink, {"type": "CenterCrop", "height": 224, "width": 224}]
    assert splits(found) == ["trainval", "test"] and splits(replace(found, select=True)) == ["train", "val"]
    assert "cache_features" not in cell("fgvc", "nabirds", "LinearProbe").config  # crops differ from epoch to epoch
    assert cell("vtab", "cifar", "LinearProbe").config.cache_features is True


@pytest.mark.parametrize("shape", [(256, 320), (512, 640), (128, 160), (600, 450)])
def test_fgvc_test_images_are_those_of_torchvision(shape):
    """Shrunk by means over areas they are off by a grey level; by a place they would be off by three on average."""
    wave = np.add.outer(np.linspace(0, 9, shape[0]), np.linspace(0, 14, shape[1]))
    image = np.stack([127 + 120 * np.sin(wave + k) for k in range(3)], -1).round().astype(np.uint8)
    ours = Albu(loaders(cell("fgvc", "cub_200_2011"))[1]["dataset"]["transform"])
    theirs = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])(Image.fromarray(image))
    found = ours(image, seed=0).astype(int)
    assert found.shape == (224, 224, 3) and not ours.is_random
    assert np.abs(found - np.asarray(theirs)).mean() < 1


def test_fgvc_training_images_are_crops_of_all_places_half_of_them_mirrored():
    """Of an image whose pixels say where they are, and which needs no resizing."""
    rows, columns = np.indices((256, 320))
    image = np.stack([rows, columns % 256, columns // 256], -1).astype(np.uint8)
    crop = Albu(loaders(cell("fgvc", "cub_200_2011"))[0]["dataset"]["transform"])
    places = []
    for seed in range(64):
        down, right, more = crop(image, seed).astype(int).transpose(2, 0, 1)
        right, side = right + 256 * more, np.arange(224)
        mirrored = right[0, 0] > right[0, -1]
        assert (down == down[0, 0] + side[:, None]).all()
        assert (right == right[0, 0] + (-side if mirrored else side)).all()
        places.append((down[0, 0], right.min(), mirrored))
    tops, lefts, mirrored = map(set, zip(*places))
    assert len(tops) > 15 and min(tops) < 4 and max(tops) > 28 and max(tops) <= 32
    assert len(lefts) > 30 and min(lefts) < 9 and max(lefts) > 87 and max(lefts) <= 96
    assert 20 < sum(m for *_, m in places) < 44 and mirrored == {False, True}


# ---- few shots ----------------------------------------------------------------------------------------------------
def test_few_shot_tasks():
    tasks = suite("fewshot").tasks
    assert len(tasks) == 9 * 5 and tasks["caltech101-16shot"].classes == 100
    assert Counter(t.group for t in tasks.values()) == {f"{k}-shot": 9 for k in (1, 2, 4, 8, 16)}
    for task in tasks.values():
        shots, protocol = int(task.name.split("-")[1].removesuffix("shot")), suite("fewshot").protocol_of(task)
        images = shots * task.classes
        steps = protocol.epochs * (images // protocol.batch)
        assert protocol.batch == min(32, images) and steps == pytest.approx(500 * shots, rel=0.03)
        assert {task.data[split]["shots"] for split in SPLITS} == {shots}


def test_few_shot_tasks_keep_the_batch_that_their_epochs_fit():
    with pytest.raises(InputError, match=r"fewshot takes no other batch: .* leave --batch out"):
        suite("fewshot", batch=16)
    short = suite("fewshot", epochs=2)
    wanted = [(2, task.own["batch"]) for task in suite("fewshot").tasks.values()]
    assert [(p.epochs, p.batch) for p in map(short.protocol_of, short.tasks.values())] == wanted


def test_a_few_shot_cell():
    for seed in (1, 2, 3):
        found = cell("fewshot", "oxford_pets-4shot", seed=seed)
        assert [loader["dataset"]["draw"] for loader in loaders(found)] == [seed, seed]
    train, test = loaders(found)
    part, flip = train["dataset"]["transform"]
    assert flip == FLIP and (part["size"], part["scale"], part["interpolation"]) == ([224, 224], [0.08, 1.0], 2)
    assert [t["type"] for t in test["dataset"]["transform"]] == ["SmallestMaxSize", "CenterCrop"]
    assert test["dataset"]["transform"][0]["max_size"] == 224
    assert splits(found) == ["train", "test"] and splits(replace(found, select=True)) == ["train", "val"]
    assert cell("fewshot", "eurosat-1shot").config.train_dataloader.batch_size == 10
    image = np.random.default_rng(0).integers(0, 256, (80, 300, 3), dtype=np.uint8)
    for loader in (train, test):
        assert Albu(loader["dataset"]["transform"])(image, seed=0).shape == (224, 224, 3)


# ---- the offline suite --------------------------------------------------------------------------------------------
def test_the_offline_protocol_is_one_for_all_images_with_labels():
    found = suite("offline")
    for name in ("eurosat", "tiny-imagenet", "omniglot", "digits"):
        (train, test), cfg = loaders(cell("offline", name)), cell("offline", name).config
        assert (train["batch_size"], train["drop_last"], cfg.train_cfg.max_epochs) == (32, True, 8)
        resize = [{"type": "BicubicResize", "height": 56, "width": 56}]
        assert [loader["dataset"]["transform"] for loader in (train, test)] == [resize, resize]
        assert found.tasks[name].own == {} and cfg.val_evaluator.type == "ClassificationMetric"


@pytest.mark.parametrize(
    ("task", "method", "key"),
    [
        ("eurosat", "LoRA", "15bc0a7b15cee2b1"),
        ("eurosat", "LinearProbe", "e5c443b76fdddf8a"),
        ("omniglot", "SSF", "94df25ac701fb97f"),
    ],
)
def test_stored_cells_keep_their_identity(task, method, key):
    """A change of these makes the whole table of the offline suite run again: change the version with it."""
    assert cell("offline", task, method).key == key


@pytest.mark.parametrize(("task", "tile"), [("retina-drive", 56), ("retina-chase", 96), ("dubai", 112)])
def test_windows_of_images_with_masks_are_seen_once_at_112_pixels(task, tile):
    """Those that are resized are measured at the size of their masks."""
    train, test = loaders(found := cell("offline", task))
    resized = {} if tile == 112 else {"transform": [{"type": "Resize", "height": 112, "width": 112}]}
    data = dict(suite("offline").tasks[task].data["trainval"], training=True, tile=tile, **resized)
    assert train["dataset"] == data and (train["batch_size"], train["drop_last"]) == (32, True)
    native = {"native_masks": True} if resized else {}
    assert test["dataset"] == dict(data, split="test", training=False, **native)
    assert found.config.train_cfg == {"by_epoch": True, "max_epochs": 1, "val_interval": 1}
    assert found.config.custom_hooks[0].monitor == "miou" and described(found)["size"] == 112


def test_values_of_the_command_hold_for_every_task():
    changed = suite("offline", epochs=1, batch=4, size=28)
    assert {(p.epochs, p.batch, p.size) for p in map(changed.protocol_of, changed.tasks.values())} == {(1, 4, 28)}
    again = suite("offline", epochs=None)
    assert {name: again.protocol_of(task) for name, task in again.tasks.items()} == {
        name: suite("offline").protocol_of(task) for name, task in suite("offline").tasks.items()
    }


@pytest.mark.parametrize("name", ["eurosat", "tiny-imagenet", "omniglot", "digits", "retina-drive", "dubai"])
def test_nothing_that_is_tested_on_was_trained_on(name):
    task = suite("offline").tasks[name]
    try:
        train, val, both, test = (set(DATASETS.build(task.data[split]).paths) for split in SPLITS)
    except InputError:
        pytest.skip(f"the data of {name} are not on this machine")
    assert train | val == both and not train & val and not both & test and test
    assert len(DATASETS.build(task.data["test"]).classes) == task.classes


@pytest.fixture
def samson(tmp_path, monkeypatch):
    """A scene whose band k has the mean k and the deviation k + 1 in the columns that are trained on."""
    signs = np.where(np.indices((95, 95)).sum(0) % 2, 1.0, -1.0)
    signs[:, 48:] = 9
    bands = np.arange(156)
    folder = tmp_path / "samson_hsi"
    folder.mkdir()
    savemat(folder / "Y_clean.mat", {"Y_clean": bands + signs[..., None] * (bands + 1)})
    savemat(folder / "Samson_gt.mat", {"samson_gt": (np.indices((95, 95))[1] % 3 + 1).astype(np.uint8)})
    monkeypatch.setenv("VISADAPT_DATA", str(tmp_path))
    return cell("offline", "samson")


def test_many_bands_are_normalised_by_what_is_trained_on(samson):
    cfg = samson.config
    assert (cfg.model.backbone.in_chans, cfg.model.backbone.bands) == (156, "mean")
    assert cfg.model.backbone.mean == pytest.approx(np.arange(156), abs=1e-3)
    assert cfg.model.backbone.std == pytest.approx(np.arange(1, 157), abs=1e-3)


def test_small_windows_fill_batches_and_the_model_learns_from_them(samson):
    cfg = samson.config
    train, test = (DATASETS.build(loader.dataset) for loader in (cfg.train_dataloader, cfg.val_dataloader))
    assert len(train) == 72 == 9 * cfg.train_dataloader.batch_size
    assert train[0]["inputs"].shape == (156, 56, 56) and train[0]["mask"].shape == (56, 56)
    assert test[0]["inputs"].shape == (156, 56, 56) and test[0]["mask"].shape == (8, 8)
    cfg.model.backbone.update(arch=dict(depth=10, embed_dim=24, num_heads=2), weights=None)
    model = TASKS.build(cfg.model).train()
    batch = model.data_preprocessor(collate_masks([train[i] for i in range(8)]), True)
    loss = sum(model(**batch, mode="loss").values())
    loss.backward()
    assert loss.item() == pytest.approx(np.log(3), abs=0.5)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    time, memory = step_cost(cfg, samson.protocol.size)
    assert time > 0 and memory > 0


# ---- methods ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", methods())
def test_a_method_and_its_optimizer_can_be_built(method, tmp_path):
    """From a config that passes all checks, on a backbone of three blocks, as many as EarthAdapter has kinds for."""
    config.dump(cell("offline", "digits", method).config, tmp_path / "cell.py")
    cfg = config.load(tmp_path / "cell.py")
    cfg.model.backbone = dict(TINY["vit"], arch=dict(depth=3, embed_dim=64, num_heads=2, img_size=32))
    model = TASKS.build(cfg.model)
    assert type(model.adapted.adapters["main"]) is ADAPTERS.get(recipe(method).adapter)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    rates = {id(p): group["lr"] for group in wrapper.optimizer.param_groups for p in group["params"]}
    assert rates.keys() == {id(p) for p in model.parameters() if p.requires_grad}
    assert [rates[id(p)] for p in model.head.parameters()] == pytest.approx([1e-3, 1e-3])


# ---- mistakes -----------------------------------------------------------------------------------------------------
@pytest.fixture
def vtab(tmp_path, monkeypatch):
    """A folder with one task of a few images, where the command finds it."""
    base = tmp_path / "vtab-1k" / "cifar"
    base.mkdir(parents=True)
    for split in ("train800", "val200", "train800val200", "test"):
        Image.new("RGB", (8, 8)).save(base / f"{split}.png")
        (base / f"{split}.txt").write_text(f"{split}.png 3\n")
    monkeypatch.setenv("VISADAPT_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return base


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["vtab", "--tasks", "cifr"], "vtab has no task 'cifr' (did you mean 'cifar'?)"),
        (["fgvc", "--tasks", "nabird"], "fgvc has no task 'nabird' (did you mean 'nabirds'?)"),
        (["offline", "--tasks", "retina-drvie"], "offline has no task 'retina-drvie' (did you mean 'retina-drive'"),
        (["fewshot", "--tasks", "dtd-3shot"], "fewshot has no task 'dtd-3shot' (did you mean 'dtd-"),
        (["vtab", "--adapters", "LoRa"], "unknown method 'LoRa' (did you mean 'LoRA"),
        (["vtab", "--adapters", "PEFT"], "the benchmark has no 'PEFT': it is one adapter for many tuners"),
        (["vtab", "--tasks", "dtd"], "no task of vtab is on disk; see data/vtab/README.md; dtd: "),
        (["offline", "LoRA", "dtd"], "offline takes no 'LoRA' 'dtd'; name methods by --adapters, tasks by --tasks"),
        (["vtab", "--method", "LoRA", "--json"], "bench vtab takes no --method (of speed), --json (of speed)"),
        (["fgvc", "--device", "cuda"], "bench fgvc takes no --device (of speed, clips)"),
        (["speed", "--workers", "1", "--seeds", "0"], "takes no --seeds (of comparisons, train), --workers (of comp"),
        (["report", "--work-dir", "runs"], "bench report takes no --work-dir (of comparisons, train)"),
        (["train", "a.py", "--epochs", "2"], "bench train takes no --epochs (of comparisons)"),
        (["fgvc", "--adapters", "LoRA"], "no task of fgvc is on disk; see data/README.md; cub_200_2011: "),
    ],
)
def test_mistakes_on_the_command_line(vtab, capsys, argv, said):
    assert main(["bench", *argv]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_listed_images_that_are_missing_are_counted(vtab, capsys):
    lines = "".join(f"gone/{i}.png 3\n" for i in range(7))
    (vtab / "train800val200.txt").write_text("train800val200.png 3\n" + lines)
    assert main(["bench", "vtab", "--tasks", "cifar", "--adapters", "LoRA"]) == 2
    err = capsys.readouterr().err
    assert "VTABDataset: 7 of 8 listed images do not exist: " in err
    assert [f"gone/{i}.png" in err for i in range(7)] == [True] * 5 + [False] * 2 and "…" in err


@pytest.fixture
def ran(monkeypatch):
    """The weights that a comparison asks for, and the cells that it would run."""
    found = []
    monkeypatch.setattr("visadapt.benchmark.sweep.sweep", lambda cells, *rest: found.extend(cells) or [])
    monkeypatch.setattr(BACKBONES, "build", lambda cfg: found.append(cfg["weights"]))
    return found


def test_tasks_that_are_not_on_disk_are_named_and_the_others_run(vtab, ran, capsys):
    assert main(["bench", "vtab", "--adapters", "LoRA", "SSF", "--seeds", "0", "1"]) == 0
    err = capsys.readouterr().err
    assert "18 tasks of 19 left out, see data/vtab/README.md:" in err
    assert all(f"  {name}: VTAB-1k: no folder " in err for group in VTAB.values() for name in group if name != "cifar")
    assert ran.pop(0) == "timm"  # weights that cannot be had are told before anything runs
    assert [(c.method, c.task.name, c.seed) for c in ran] == [(m, "cifar", s) for s in (0, 1) for m in ("LoRA", "SSF")]


def test_a_task_that_was_asked_for_and_is_missing_is_a_failure(vtab, ran, capsys):
    assert main(["bench", "vtab", "--adapters", "LoRA", "--tasks", "dtd", "cifar", "--seeds", "0", "0"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("not run: dtd: VTAB-1k: no folder ")
    assert [(c.task.name, c.seed) for c in ran[1:]] == [("cifar", 0)]


def test_the_images_of_all_draws_must_be_there(tmp_path, ran, capsys, monkeypatch):
    """Of a set where the last draw alone takes an image that is missing."""
    base = tmp_path / "few-shot" / "eurosat"
    (base / "2750").mkdir(parents=True)
    rows = {s: [[f"{s}{k}{i}.png", k, f"c{k}"] for k in range(10) for i in range(9)] for s in ("train", "val", "test")}
    (base / "split_zhou_EuroSAT.json").write_text(json.dumps(rows))
    monkeypatch.setenv("VISADAPT_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name, _, _ in chain(*rows.values()):
        Image.new("RGB", (8, 8)).save(base / "2750" / name)
    data = suite("fewshot").tasks["eurosat-1shot"].data["trainval"]
    one, two, three = (set(DATASETS.build(data | {"draw": draw}).paths) for draw in (1, 2, 3))
    Path(min(three - one - two)).unlink()
    words = ["bench", "fewshot", "--adapters", "LoRA", "--tasks", "eurosat-1shot"]
    assert main([*words, "--seeds", "1", "2"]) == 0 and [cell.seed for cell in ran[1:]] == [1, 2]
    assert main(words) == 2  # seeds 1, 2 and 3
    assert "eurosat-1shot: FewShot: 1 of 10 listed images do not exist" in capsys.readouterr().err


def test_the_command_has_all_suites():
    assert tuple(SUITES) == bench.SUITES


def test_what_is_given_can_be_told_of_every_argument():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    found = {action.dest: action.default for action in parser._actions if action.dest not in ("help", "what")}
    assert found.keys() == bench.TAKEN.keys() and not any(found.values())
