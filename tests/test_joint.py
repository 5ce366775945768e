"""Data of several tasks: one data set of many, task numbers that reach the adapter, prediction for one task."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from visadapt import config
from visadapt.backbones.timm_vit import TimmViT
from visadapt.cli import main
from visadapt.core.io import read_manifest
from visadapt.core.manifest import OF_TASKS
from visadapt.datasets.base import Draw, collate
from visadapt.datasets.digits import Digits
from visadapt.datasets.folder import FolderDataset
from visadapt.datasets.joint import Joint
from visadapt.datasets.moving_crop import MovingCrop
from visadapt.datasets.sampler import EpochSampler
from visadapt.errors import InputError
from visadapt.predict.image import Predictor
from visadapt.registry import DATASETS, TASKS
from visadapt.testing import assert_close, difference

CONFIG = Path(__file__).parents[1] / "configs/poly/poly_dinov2-s-focus_4e_eurosat-digits-56.py"
ARCH = {"depth": 2, "embed_dim": 48, "num_heads": 3, "init_values": 1.0}
AUGMENT = [dict(type="RandomResizedCrop", size=(8, 8)), dict(type="HorizontalFlip"), dict(type="RandomGamma")]
RESIZE = [dict(type="Resize", height=28, width=28)]


@pytest.fixture
def folder(tmp_path):
    """Four images in each of 7, cat and dog, all different."""
    for label, name in enumerate(("7", "cat", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(4):
            image = np.random.default_rng(10 * label + i).integers(0, 256, (9, 8, 3), dtype=np.uint8)
            cv2.imwrite(str(tmp_path / "pets" / name / f"{i}.png"), image)
    return tmp_path / "pets"


# ---- the data set ---------------------------------------------------------------------------------------------------
def test_samples_are_those_of_the_parts_counted_on(folder):
    parts = Digits(transform=AUGMENT), FolderDataset(folder, transform=AUGMENT, seed=5), Digits("test", AUGMENT)
    joint = Joint([dict(type="Digits", transform=AUGMENT), parts[1], parts[2]])
    assert len(joint) == 500 + 12 + 500
    shared = [f"{part}/{digit}" for part in (0, 2) for digit in range(10)]
    assert joint.classes == (*shared[:10], "1/7", "cat", "dog", *shared[10:])
    assert joint.metainfo == {"classes": joint.classes}
    assert joint.channels == 3 and joint.transform.to_json() == parts[0].transform.to_json()
    for index, task, own, shift in ((0, 0, 0, 0), (499, 0, 499, 0), (500, 1, 0, 10), (511, 1, 11, 10), (512, 2, 0, 13)):
        found, wanted = joint[Draw(3, index)], parts[task][Draw(3, own)]
        assert torch.equal(found.pop("inputs"), wanted.pop("inputs"))
        assert found == wanted | {"label": wanted["label"] + shift, "index": index, "task": task}
        assert joint.classes[found["label"]].removeprefix(f"{task}/") == parts[task].classes[wanted["label"]]
        assert np.array_equal(joint.load(index), parts[task].load(own))
    assert torch.equal(joint[-1]["inputs"], parts[2][-1]["inputs"]) and joint[-1]["index"] == 1011
    for index in (1012, -1013):
        with pytest.raises(IndexError):
            joint[index]


def test_names_that_parts_do_not_share_stay_as_they_are(folder):
    (folder / "7").rename(folder / "emu")
    joint = Joint([dict(type="Digits"), dict(type="FolderDataset", root=str(folder))])
    assert joint.classes == (*"0123456789", "cat", "dog", "emu") and joint.transform is None


@pytest.mark.parametrize("training", [True, False])
def test_unreadable_images_are_the_affair_of_their_part(folder, training):
    """In training the next image of the same part stands in, also for the part's last one."""
    (folder / "dog" / "3.png").write_bytes(b"no image")
    joint = Joint([FolderDataset(folder, training=training), dict(type="Digits")])
    sample = joint[11]
    assert sample["unreadable"].endswith("dog/3.png") and sample["task"] == 0 and sample["valid"] is training
    assert (sample["index"], sample["label"]) == ((0, 0) if training else (11, 2))
    assert bool(sample["inputs"].any()) is training


def test_batches_of_the_sampler_mix_tasks(folder):
    """Also where the data set was sent to a worker process."""
    joint = Joint([FolderDataset(folder, transform=AUGMENT), Digits(transform=AUGMENT)])
    sampler = EpochSampler(joint, seed=1)
    sampler.set_epoch(2)
    order = [draw for draw in sampler if draw.index < 24]
    batches = list(DataLoader(pickle.loads(pickle.dumps(joint)), 8, sampler=order, collate_fn=collate))
    assert [set(batch["task"].tolist()) for batch in batches] == [{0, 1}] * 3
    for batch in batches:
        assert batch["task"].dtype == torch.int64 and batch["task"].tolist() == [int(i >= 12) for i in batch["index"]]
        assert torch.equal(batch["labels"] >= 3, batch["task"] == 1)
        for image, index in zip(batch["inputs"], batch["index"].tolist()):
            assert torch.equal(image, joint[Draw(2, index)]["inputs"])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], r"Joint has no parts; give parts=\[dict\(type=...\), ...\]"),
        ([dict(type="Digits", split="tset")], "no split 'tset'.*did you mean 'test'"),
        ([dict(type="Digts")], "unknown dataset 'Digts'.*did you mean 'Digits'"),
        ([dict(type="Digits", channels=3)], "Digits has no argument 'channels'"),
        ([dict(split="test")], r"a dataset is given as dict\(type=...\)"),
        ([dict(type="Digits"), dict(type="Digits", transform=RESIZE)], r"part 1 \(Digits\) has another transform than"),
        (
            [dict(type="Digits"), dict(type="FolderDataset", channels=4)],
            r"part 1 \(FolderDataset\) has 4 bands, part 0 has 3",
        ),
        (
            [dict(type="Joint", parts=[dict(type="Digits")])],
            r"part 0 \(Joint\) is no data set of images with one label",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(folder, parts, message):
    given = [part | {"root": str(folder)} if part.get("type") == "FolderDataset" else part for part in parts]
    with pytest.raises(InputError, match=message) as caught:
        DATASETS.build(dict(type="Joint", parts=given))
    assert "\n" not in str(caught.value)


def test_parts_see_clips_in_one_way(folder):
    parts = [dict(type="MovingCrop", folders=[str(folder)], suffix=".png", num_frames=n) for n in (2, 2, 3)]
    assert Joint(parts[:2]).views_of_clips == MovingCrop([folder], ".png", num_frames=2).views_of_clips
    assert Joint([part | {"training": True} for part in parts]).views_of_clips is None
    with pytest.raises(InputError, match=r"part 2 \(MovingCrop\) sees clips in another way than part 0"):
        Joint(parts)


def test_mistakes_inside_parts_are_found_when_a_config_is_read():
    parts = [dict(type="visadapt.datasets.digits.Digits", split="test", transfrom=RESIZE)]
    wrong = [f"val_dataloader.dataset.parts={parts}", "train_dataloader.dataset.parts.1.splt=train"]
    with pytest.raises(InputError) as caught:
        config.load(CONFIG, wrong)
    assert "val_dataloader.dataset.parts.0: Digits has no argument 'transfrom'" in str(caught.value)
    assert "no key 'splt' under 'train_dataloader.dataset.parts.1' (did you mean 'split'?)" in str(caught.value)


def test_several_labels_per_image_cannot_be_counted_on():
    digits = Digits()
    digits.labels = [[0, 1]] * len(digits)
    with pytest.raises(InputError, match=r"part 1 \(Digits\) is no data set of images with one label each"):
        Joint([dict(type="Digits"), digits])


# ---- a run on two tasks ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The shipped config, made tiny: the digits are both tasks, the second time with other classes."""
    folder = tmp_path_factory.mktemp("joint")
    torch.manual_seed(0)
    body = TimmViT("vit_small_patch14_dinov2", arch=ARCH).body
    save_file({k: v.contiguous() for k, v in body.state_dict().items()}, folder / "base.safetensors")
    changed = [f"model.backbone.arch={ARCH}", f"model.backbone.weights={folder}/base.safetensors"]
    changed += ["model.adapters.main.rank=2", "train_cfg.max_epochs=1", "train_dataloader.batch_size=50"]
    for part in ("train", "val"):
        digits = dict(split=part.replace("val", "test"), training=part == "train", transform=RESIZE)
        parts = [dict(type="visadapt.datasets.digits.Digits") | digits] * 2
        changed.append(f"{part}_dataloader.dataset.parts={parts}")
    return [str(CONFIG), *changed]


@pytest.fixture(scope="module")
def run(words):
    """A finished run."""
    folder = Path(words[2].partition("weights=")[2]).parent / "run"
    assert main(["train", *words, "--work-dir", str(folder)]) == 0
    return folder


def test_a_run_finds_out_which_task_an_image_belongs_to(run, words, capsys):
    """Both tasks have the same scans and different classes: without the task number half is right at best."""
    report = json.loads((run / "report.json").read_text())
    assert [row["name"] for row in report["per_class"]] == [f"{t}/{d}" for t in (0, 1) for d in range(10)]
    confusion = np.array(report["confusion"]).reshape(2, 10, 2, 10).sum((1, 3))
    assert confusion.sum() == 1000 and confusion.trace() > 900
    assert main(["test", words[0], str(run / "adapter_best.safetensors"), *words[1:], "--json"]) == 0
    top1 = json.loads(capsys.readouterr().out.splitlines()[0])["top1"]
    assert top1 == pytest.approx(sum(np.diagonal(report["confusion"])) / 1000)


# ---- prediction for one task ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def task(run, words):
    """The trained model of the run, as its config and its file make it."""
    built = TASKS.build(config.load(words[0], words[1:]).model).eval()
    built.adapted.load(run / "adapter_best.safetensors", heads=built.heads)
    return built


def scores_of(predictor, scans):
    return torch.tensor([answer["scores"] for answer in predictor.predict(scans)])


def test_the_predictor_gives_what_evaluation_gives(run, task):
    """For a mixed batch of which every image is there twice, once per task; the task makes a difference."""
    joint = Joint([dict(type="Digits", split="test", transform=RESIZE)] * 2)
    with torch.no_grad():
        batch = collate([joint[start + i] for i in range(6) for start in (0, 500)])
        outputs = task(**task.data_preprocessor(batch), mode="predict")
    evaluated = torch.stack([output["scores"] for output in outputs])
    assert difference(evaluated[::2], evaluated[1::2]) > 1e-2
    for number in (0, 1):
        predictor = Predictor(run / "adapter_best.safetensors", task=number)
        assert not predictor.task.adapted.merger.names
        assert_close(scores_of(predictor, [joint.load(i) for i in range(6)]), evaluated[number::2])


def test_json_lines_say_the_task(run, tmp_path):
    for i in range(2):
        cv2.imwrite(str(tmp_path / f"{i}.png"), Digits("test").load(i)[i:])  # of two sizes
    (tmp_path / "broken.png").write_bytes(b"no image")
    command = ["predict", str(run / "adapter_best.safetensors"), str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*command, "--task", "1", "--no-pictures"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == [1, 1, 1] and "error" in rows[2]
    assert all(row["label"].startswith("1/") for row in rows[:2])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "has an adapter of 2 tasks and the images have no task number; give --task"),
        (["--task", "2"], "has an adapter of 2 tasks and there is no task 2; give --task"),
        (["--task", "-1"], "and there is no task -1; give --task (Predictor: task) a number from 0 to 1"),
    ],
)
def test_a_task_that_is_not_there_is_one_line(run, tmp_path, capsys, given, message):
    cv2.imwrite(str(tmp_path / "0.png"), Digits("test").load(0))
    command = ["predict", str(run / "adapter_best.safetensors"), str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*command, *given]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line and not (tmp_path / "out").exists()


def test_a_file_whose_task_is_fixed_needs_no_number(run, task, tmp_path):
    best, path, scans = run / "adapter_best.safetensors", tmp_path / "one.safetensors", [Digits("test").load(0)]
    manifest = read_manifest(best)
    task.adapted.adapters["main"].set_task(1)
    task.adapted.save(path, heads=task.heads, extra={key: manifest[key] for key in OF_TASKS})
    task.adapted.adapters["main"].set_task(None)
    merged = Predictor(path)
    assert merged.task.adapted.merger.names == ["main"]
    assert_close(scores_of(merged, scans), scores_of(Predictor(best, task=1), scans))
    with pytest.raises(InputError, match="has no adapter that chooses by task number; leave out --task"):
        Predictor(path, task=1)
