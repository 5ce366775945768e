"""Data sets, image reading, batches and the sampler, on real scans and on small files written here."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import sys
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from visadapt.datasets import files
from visadapt.datasets.base import ClassificationDataset, Draw, collate, data_root, read_image
from visadapt.datasets.cached import FeatureDataset
from visadapt.datasets.digits import Digits
from visadapt.datasets.eurosat import EuroSAT
from visadapt.datasets.folder import FolderDataset, images_below
from visadapt.datasets.listfile import CSVDataset, ListDataset
from visadapt.datasets.sampler import EpochSampler
from visadapt.datasets.vtab import TASKS, VTABDataset
from visadapt.errors import InputError
from visadapt.registry import DATASETS

AUGMENT = [dict(type="RandomResizedCrop", size=(8, 8)), dict(type="HorizontalFlip"), dict(type="RandomGamma")]
REPOSITORY = Path(__file__).parents[1]


def write(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image[..., ::-1] if image.ndim == 3 else image)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three images in each of cat and dog, of one colour each: red is the index in the class, green the class."""
    for label, name in enumerate(("cat", "dog")):
        for i in range(3):
            write(tmp_path / "pets" / name / f"{i}.png", np.full((6, 8, 3), (i, 100 * label, 7), np.uint8))
    return tmp_path / "pets"


# reading


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp", ".jpg"])
def test_pictures_are_rgb(tmp_path, suffix):
    image = np.zeros((16, 16, 3), np.uint8)
    image[..., 0] = 250
    out = read_image(write(tmp_path / f"a{suffix}", image))
    assert out.shape == (16, 16, 3) and out.dtype == np.uint8
    assert out[..., 0].min() > 230 and out[..., 1:].max() < 30


def test_grey_and_alpha_become_rgb_only_for_three_channels(tmp_path):
    grey = write(tmp_path / "grey.png", np.arange(64, dtype=np.uint8).reshape(8, 8))
    out = read_image(grey)
    assert out.shape == (8, 8, 3) and (out[..., 0] == out[..., 2]).all()
    assert read_image(grey, 1).shape == (8, 8, 1)

    rgba = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "rgba.png"), rgba[..., [2, 1, 0, 3]])
    assert np.array_equal(read_image(tmp_path / "rgba.png"), rgba[..., :3])
    assert np.array_equal(read_image(tmp_path / "rgba.png", 4), rgba)
    with pytest.raises(InputError, match=r"grey\.png has 1 band, 4 are needed"):
        read_image(grey, 4)


def test_npy_is_height_width_bands(tmp_path):
    image = np.random.default_rng(0).random((5, 6, 13)).astype(np.float32)
    np.save(tmp_path / "a.npy", image)
    assert np.array_equal(read_image(tmp_path / "a.npy", 13), image)
    np.save(tmp_path / "chw.npy", image.transpose(2, 0, 1))
    with pytest.raises(InputError, match=r"has 6 bands .*\(13, 5, 6\), read as height, width, bands.*13 are needed"):
        read_image(tmp_path / "chw.npy", 13)
    # four bands of an array need not be RGBA
    np.save(tmp_path / "four.npy", image[..., :4])
    with pytest.raises(InputError, match="has 4 bands"):
        read_image(tmp_path / "four.npy")
    np.save(tmp_path / "text.npy", np.array(["a"]))
    with pytest.raises(InputError, match="an image is numbers"):
        read_image(tmp_path / "text.npy")


def test_other_tifs_need_rasterio(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tif", np.zeros((4, 5), np.uint16))
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(InputError, match=r"pip install 'visadapt\[geo\]'"):
        read_image(path, 13)

    class Raster:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def read(self):
            return np.arange(13 * 4 * 5).reshape(13, 4, 5)

    monkeypatch.setitem(sys.modules, "rasterio", types.SimpleNamespace(open=lambda _: Raster()))
    out = read_image(path, 13)
    assert out.shape == (4, 5, 13) and out[0, 0, 12] == 12 * 20


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".npy"])
def test_damaged_files_are_unreadable(tmp_path, suffix, capfd):
    path = tmp_path / f"a{suffix}"
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.save(path, image) if suffix == ".npy" else write(path, image)
    for data in (path.read_bytes()[:200], b""):
        path.write_bytes(data)
        with pytest.raises(files.UnreadableImage, match="damaged"):
            read_image(path)
    assert "OpenCV" not in capfd.readouterr().err
    with pytest.raises(files.UnreadableImage, match="cannot be read: No such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(InputError, match=r"type '\.gif' are not read"):
        read_image(tmp_path / "a.gif")


def test_data_root(tmp_path, monkeypatch):
    (tmp_path / "sets" / "mine").mkdir(parents=True)
    monkeypatch.setenv("VISADAPT_DATA", str(tmp_path / "sets"))
    assert data_root("mine") == tmp_path / "sets" / "mine"
    assert data_root(tmp_path) == tmp_path
    with pytest.raises(InputError, match=f"looked at none, {tmp_path}/sets/none; set VISADAPT_DATA"):
        data_root("none")

    monkeypatch.delenv("VISADAPT_DATA")
    home = tmp_path / "work" / "here"
    home.mkdir(parents=True)
    monkeypatch.chdir(home)
    shared = tmp_path / "work" / "shared" / "data" / "some_set"
    shared.mkdir(parents=True)
    assert data_root("some_set") == shared
    (home / "data" / "some_set").mkdir(parents=True)
    assert data_root("some_set") == home / "data" / "some_set"
    with pytest.raises(InputError) as caught:
        data_root("no_such_set")
    for place in (home / "data", REPOSITORY / "data", shared.parent, REPOSITORY.parent / "shared" / "data"):
        assert str(place / "no_such_set") in str(caught.value)


# one data set


def test_samples_and_batch(folder):
    data = FolderDataset(folder)
    assert data.metainfo == {"classes": ("cat", "dog")} and len(data) == 6
    sample = data[4]
    assert sample["inputs"].shape == (3, 6, 8) and sample["inputs"].dtype == torch.uint8
    assert sample["inputs"][:, 0, 0].tolist() == [1, 100, 7]
    assert (sample["label"], sample["index"], sample["valid"]) == (1, 4, True)
    batch = collate([data[i] for i in (0, 5)])
    assert batch["inputs"].shape == (2, 3, 6, 8)
    assert batch["labels"].tolist() == [0, 1] and batch["labels"].dtype == torch.int64
    assert batch["index"].tolist() == [0, 5] and batch["valid"].tolist() == [True, True]
    assert [Path(p).name for p in batch["path"]] == ["0.png", "2.png"] and batch["unreadable"] == []
    with pytest.raises(IndexError):
        data[6]


def test_floats_stay_raw(tmp_path):
    np.save(tmp_path / "a.npy", np.full((4, 4, 5), 3000, np.uint16))
    data = ClassificationDataset([tmp_path / "a.npy"], [0], ["x"], channels=5)
    assert data[0]["inputs"].dtype == torch.float32 and data[0]["inputs"].unique().tolist() == [3000]


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    data = Digits(transform=AUGMENT, training=True)
    order = list(EpochSampler(data, seed=3))[:24]
    alone = {draw: data[draw]["inputs"] for draw in order}
    for workers in (0, 2):
        loader = DataLoader(data, batch_size=5, sampler=order, num_workers=workers, collate_fn=collate)
        for batch in loader:
            for image, index in zip(batch["inputs"], batch["index"].tolist()):
                assert torch.equal(image, alone[Draw(0, index)])
    draw = order[0]
    assert not torch.equal(data[Draw(1, draw.index)]["inputs"], alone[draw])
    assert not torch.equal(Digits(transform=AUGMENT, seed=1)[draw]["inputs"], alone[draw])
    assert torch.equal(data[draw.index]["inputs"], alone[draw])  # a plain index is epoch 0


def test_unreadable_image_in_training_gives_way_to_the_next(folder):
    (folder / "cat" / "1.png").write_bytes(b"no image")
    (folder / "cat" / "2.png").write_bytes(b"no image")
    data = FolderDataset(folder, training=True)
    sample = data[1]
    assert (sample["index"], sample["label"], sample["valid"]) == (3, 1, True)
    assert sample["path"].endswith("dog/0.png")
    batch = collate([data[i] for i in range(4)])
    assert [Path(p).name for p in batch["unreadable"]] == ["1.png", "2.png"]


def test_unreadable_image_in_evaluation_is_an_invalid_zero(folder):
    (folder / "dog" / "2.png").write_bytes(b"no image")
    data = FolderDataset(folder, transform=[dict(type="Resize", height=4, width=4)])
    sample = data[5]
    assert (sample["index"], sample["label"], sample["valid"]) == (5, 1, False)
    assert sample["inputs"].shape == (3, 4, 4) and not sample["inputs"].any()
    assert sample["path"] == sample["unreadable"]
    assert collate([data[4], sample])["valid"].tolist() == [True, False]


def test_strict_and_wholly_unreadable(folder):
    (folder / "cat" / "1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"1\.png is damaged"):
        FolderDataset(folder, strict=True, training=True)[1]
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    for training in (True, False):
        with pytest.raises(InputError, match="none of the 6 images can be read"):
            FolderDataset(folder, training=training)[0]


def test_wrong_band_count_is_never_skipped(folder):
    with pytest.raises(InputError, match="has 3 bands, 5 are needed"):
        FolderDataset(folder, channels=5, training=True)[0]


def test_sizes_must_agree_in_a_batch(folder):
    write(folder / "cat" / "0.png", np.zeros((9, 9, 3), np.uint8))
    data = FolderDataset(folder)
    with pytest.raises(InputError, match=r"\(3, 9, 9\).*\(3, 6, 8\).*Resize"):
        collate([data[0], data[1]])


def test_construction_checks(folder):
    image = folder / "cat" / "0.png"
    for label in (-1, 2):
        with pytest.raises(InputError, match=rf"has label {label}, but there are 2 classes \(0 to 1\)"):
            ClassificationDataset([image], [label], ["a", "b"])
    missing = [image, *(folder / f"{i}.png" for i in range(7))]
    with pytest.raises(InputError, match="7 of 8 listed images do not exist") as caught:
        ClassificationDataset(missing, [0] * 8, ["a"])
    assert "4.png, …" in str(caught.value) and "5.png" not in str(caught.value)
    with pytest.raises(InputError, match="1 images but 2 labels"):
        ClassificationDataset([image], [0, 0], ["a"])
    with pytest.raises(InputError, match="class 'a' is named twice"):
        ClassificationDataset([image], [0], ["a", "b", "a"])
    with pytest.raises(InputError, match="no images"):
        ClassificationDataset([], [], ["a"])
    with pytest.raises(InputError, match="ColorJitter does not work on images of 5 bands"):
        ClassificationDataset([image], [0], ["a"], transform=[dict(type="ColorJitter")], channels=5)


# layouts


def test_folder_with_a_list_keeps_all_classes(folder):
    listed = folder / "split.txt"
    listed.write_text("# held out\ndog/2.png\n\ndog/0.png\n")
    data = FolderDataset(folder, list_file="split.txt")
    assert data.labels == [1, 1] and data.classes == ("cat", "dog") and data.paths[0].endswith("dog/2.png")
    listed.write_text("cat/0.png\ndgo/0.png\n")
    with pytest.raises(InputError, match=r"split\.txt:2: no class folder 'dgo'.*did you mean 'dog'"):
        FolderDataset(folder, list_file=listed)
    with pytest.raises(InputError, match=r"list file 'nope\.txt' not found; looked at"):
        FolderDataset(folder, list_file="nope.txt")


def test_folder_mistakes(folder, tmp_path):
    (folder / "emu").mkdir()
    with pytest.raises(InputError, match="class folders without an image: emu"):
        FolderDataset(folder)
    with pytest.raises(InputError, match="no class folders"):
        FolderDataset(folder / "emu")
    with pytest.raises(InputError, match=r"data folder .* not found"):
        FolderDataset(tmp_path / "none")


@pytest.mark.parametrize(
    ("lines", "classes", "labels", "names"),
    [
        ("cat/0.png 0\ndog/1.png 1\n", None, [0, 1], ("0", "1")),
        ("dog/0.png dog\ncat/1.png cat\n", None, [1, 0], ("cat", "dog")),
        ("dog/0.png dog\n", ["dog", "cat"], [0], ("dog", "cat")),
        ("dog/0.png 1\n", ["cat", "dog"], [1], ("cat", "dog")),
        ("a b.png 0\n", ["x"], [0], ("x",)),
    ],
)
def test_list_labels(folder, lines, classes, labels, names):
    write(folder / "a b.png", np.zeros((6, 8, 3), np.uint8))
    (folder / "list.txt").write_text(lines)
    data = ListDataset(folder / "list.txt", classes=classes)
    assert data.labels == labels and data.classes == names
    table = "label,path,note\n" + "".join(",".join([*line.rsplit(" ", 1)[::-1], "x\n"]) for line in lines.splitlines())
    (folder / "list.csv").write_text(table)
    again = CSVDataset("list.csv", root=folder, classes=classes)
    assert (again.labels, again.classes, again.paths) == (data.labels, data.classes, data.paths)


def test_list_and_table_mistakes(folder):
    listed, table = folder / "list.txt", folder / "list.csv"
    for text, message in [
        ("cat/0.png\n", r"list\.txt:1: 'cat/0\.png' has no label"),
        ("cat/0.png cat\ncat/1.png cta\n", r"list\.txt:2: label 'cta'.*did you mean 'cat'"),
        ("cat/0.png 2\n", "label '2' is none of the 2 classes"),
        ("cat/0.png -1\n", "label '-1' is none"),
        ("# nothing\n", "names no image"),
        ("cat/9.png cat\n", "1 of 1 listed images do not exist"),
    ]:
        listed.write_text(text)
        with pytest.raises(InputError, match=message):
            ListDataset(listed, classes=["cat", "dog"])
    for text, message in [
        ("path,lable\ncat/0.png,cat\n", r"no column 'label' \(did you mean 'lable'\?\)"),
        ("path,label\n", "no rows"),
        ("path,label\ncat/0.png,\n", r"list\.csv:2: path or label is empty"),
    ]:
        table.write_text(text)
        with pytest.raises(InputError, match=message):
            CSVDataset(table)


def test_vtab_layout(tmp_path):
    assert len(TASKS) == 19 and sum(TASKS.values()) == 940
    write(tmp_path / "vtab" / "kitti" / "images" / "0.png", np.zeros((6, 8, 3), np.uint8))
    listed = tmp_path / "vtab" / "kitti" / "train800.txt"
    listed.write_text("images/0.png 3\n")
    data = VTABDataset("kitti", "train800", root=tmp_path / "vtab")
    assert data.labels == [3] and len(data.classes) == 4
    listed.write_text("images/0.png 4\n")
    with pytest.raises(InputError, match="label '4' is none of the 4 classes"):
        VTABDataset("kitti", "train800", root=tmp_path / "vtab")
    for kwargs, message in [
        (dict(task="kity"), "no task 'kity'.*'kitti'"),
        (dict(task="kitti", split="train"), "no split 'train'"),
        (dict(task="dtd"), "no folder .*dtd"),
        (dict(task="kitti", split="test"), "list file .*test.txt' not found"),
    ]:
        with pytest.raises(InputError, match=message):
            VTABDataset(root=tmp_path / "vtab", **kwargs)


def test_eurosat_layout(tmp_path):
    root = tmp_path / "eurosat"
    for name in ("Forest", "River"):
        write(root / "2750" / name / f"{name}_1.jpg", np.zeros((6, 8, 3), np.uint8))
    (root / "val.txt").write_text("River/River_1.jpg\n")
    assert EuroSAT("val", root=root).labels == [1]
    (root / "few.txt").write_text("Forest/Forest_1.jpg\n")
    assert EuroSAT("val", list_file="few.txt", root=root).labels == [0]
    with pytest.raises(InputError, match=r"list file '.*train\.txt' not found"):
        EuroSAT("train", root=root)
    with pytest.raises(InputError, match="no split 'valid'"):
        EuroSAT("valid", root=root)
    with pytest.raises(InputError, match="has no folder 2750"):
        EuroSAT("val", root=tmp_path)


def test_the_real_eurosat_and_our_list():
    try:
        train = EuroSAT("train")
    except InputError:
        pytest.skip("EuroSAT is not on this machine")
    listed = REPOSITORY / "data" / "lists" / "eurosat_train500.txt"
    few = EuroSAT(
        "train", list_file="data/lists/eurosat_train500.txt", transform=[dict(type="Resize", height=8, width=8)]
    )
    assert np.bincount(few.labels).tolist() == [50] * 10
    assert set(few.paths) <= set(train.paths) and len(set(few.paths)) == 500 == len(listed.read_text().split())
    assert few.classes[0] == "AnnualCrop" and few[0]["inputs"].float().std() > 1


def test_digits_split_is_fixed_and_disjoint():
    train, test = Digits("train"), Digits("test")
    assert len(train) == len(test) == 500 and not set(train.paths) & set(test.paths)
    assert hashlib.sha256("".join(train.paths + test.paths).encode()).hexdigest()[:12] == "f301897f1bb6"
    assert min(np.bincount(train.labels)) >= 45 and min(np.bincount(test.labels)) >= 45
    image = train[0]["inputs"]
    assert image.shape == (3, 8, 8) and image.dtype == torch.uint8
    assert max(int(train[i]["inputs"].max()) for i in range(20)) == 255
    with pytest.raises(InputError, match="no split 'val'"):
        Digits("val")

    few, val, both = (Digits(split) for split in ("train800", "val200", "train800val200"))
    assert (len(few), len(val), len(both)) == (800, 200, 1000)
    assert set(few.paths) | set(val.paths) == set(both.paths) and not set(both.paths) & set(test.paths)
    assert hashlib.sha256("".join(few.paths + val.paths).encode()).hexdigest()[:12] == "cd6567a48ed3"
    assert min(np.bincount(few.labels)) >= 76 and min(np.bincount(val.labels)) >= 19


def test_feature_dataset():
    features = torch.randn(3, 5)
    data = FeatureDataset(features, [0, 1, 1], ["a", "b", "c"], ["x", "y"])
    batch = collate([data[Draw(4, 2)], data[0]])
    assert torch.equal(batch["features"], features[[2, 0]]) and "inputs" not in batch
    assert batch["labels"].tolist() == [1, 0] and batch["path"] == ["c", "a"] and batch["valid"].all()
    assert data.metainfo == {"classes": ("x", "y")}
    with pytest.raises(InputError, match="do not belong together"):
        FeatureDataset(features, [0, 1], ["a", "b"], ["x", "y"])
    with pytest.raises(InputError, match="label 2 is none of the 2 classes"):
        FeatureDataset(features, [0, 1, 2], ["a", "b", "c"], ["x", "y"])


def test_all_are_registered():
    names = {"CSVDataset", "Digits", "EuroSAT", "FeatureDataset", "FolderDataset", "ListDataset", "VTABDataset"}
    assert names <= set(DATASETS.names())
    assert isinstance(DATASETS.build(dict(type="Digits", split="test")), Digits)


# the sampler


def test_sampler_order_is_of_seed_and_epoch():
    sampler = EpochSampler(range(20), seed=1)
    first = list(sampler)
    assert first == list(EpochSampler(range(20), seed=1)) and {d.epoch for d in first} == {0}
    assert sorted(d.index for d in first) == list(range(20)) != [d.index for d in first]
    sampler.set_epoch(1)
    second = list(sampler)
    assert {d.epoch for d in second} == {1} and [d.index for d in second] != [d.index for d in first]
    assert [d.index for d in EpochSampler(range(20), seed=2)] != [d.index for d in second]
    assert list(EpochSampler(range(3), shuffle=False, seed=0)) == [(0, 0), (0, 1), (0, 2)]


def test_sampler_skip_is_for_one_iteration():
    sampler = EpochSampler(range(10), seed=1)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.skip(4)
    assert list(sampler) == whole[4:] and list(sampler) == whole and len(sampler) == 10
    with pytest.raises(InputError, match=r"cannot skip 11 of 10.*endless=True"):
        sampler.skip(11)


def test_endless_sampler_resumes_where_it_stood():
    def take(sampler, n):
        stream = iter(sampler)
        return [next(stream) for _ in range(n)]

    whole = take(EpochSampler(range(5), seed=1, endless=True), 17)
    assert [d.epoch for d in whole] == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 2
    resumed = EpochSampler(range(5), seed=1, endless=True)
    resumed.skip(12)
    assert take(resumed, 5) == whole[12:]


@pytest.mark.parametrize("round_up", [True, False])
def test_sampler_splits_over_ranks(monkeypatch, round_up):
    parts = []
    for rank in range(4):
        monkeypatch.setattr("visadapt.datasets.sampler.get_dist_info", lambda rank=rank: (rank, 4))
        sampler = EpochSampler(range(10), seed=1, round_up=round_up)
        parts.append([d.index for d in sampler])
        assert len(sampler) == len(parts[-1])
    assert [len(p) for p in parts] == ([3] * 4 if round_up else [3, 3, 2, 2])
    merged = [part[i] for i in range(3) for part in parts if i < len(part)]
    monkeypatch.setattr("visadapt.datasets.sampler.get_dist_info", lambda: (0, 1))
    assert merged[:10] == [d.index for d in EpochSampler(range(10), seed=1)]  # what collect_results relies on


def test_mmengine_builds_the_loader_and_skips_through_it():
    from mmengine.runner import Runner
    from mmengine.runner.loops import _InfiniteDataloaderIterator

    def stream(skipped):
        loader = Runner.build_dataloader(
            dict(
                dataset=dict(type=Digits, transform=AUGMENT, training=True),
                sampler=dict(type=EpochSampler, endless=True),
                collate_fn=dict(type=collate),
                batch_size=48,
                num_workers=0,
            ),
            seed=4,
        )
        batches = _InfiniteDataloaderIterator(loader)
        batches.skip_iter(skipped)
        return batches

    whole = stream(0)
    for _ in range(11):  # 528 samples: into the second epoch
        next(whole)
    resumed = next(stream(11))
    assert torch.equal(next(whole)["inputs"], resumed["inputs"]) and resumed["inputs"].shape == (48, 3, 8, 8)


# ---- odd files -------------------------------------------------------------------------------------------------------
def test_arrays_that_are_no_images_are_unreadable(tmp_path):
    for name, array, message in (
        ("nan", np.full((3, 3, 3), np.nan, np.float32), "not finite"),
        ("infinite", np.full((3, 3, 3), np.inf), "not finite"),
        ("empty", np.zeros((0, 5, 3), np.uint8), "no pixels"),
        ("objects", np.array([{}], dtype=object), "damaged"),
    ):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(files.UnreadableImage, match=rf"{name}\.npy .*{message}"):
            read_image(tmp_path / f"{name}.npy")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**6, 3)})
    (tmp_path / "huge.npy").write_bytes(header.getvalue())
    with pytest.raises(files.UnreadableImage, match=r"huge\.npy is damaged"):
        read_image(tmp_path / "huge.npy")


@pytest.mark.parametrize("dtype", [bool, np.int64, np.uint32, np.float16])
def test_types_that_opencv_does_not_resize(tmp_path, dtype):
    image = np.random.default_rng(0).integers(0, 2, (6, 6, 3)).astype(dtype)
    np.save(tmp_path / "a.npy", image)
    data = ClassificationDataset([tmp_path / "a.npy"], [0], ["x"], transform=[dict(type="Resize", height=6, width=6)])
    assert np.array_equal(data[0]["inputs"].numpy().transpose(1, 2, 0), image)


def test_a_header_with_an_absurd_size_is_unreadable(tmp_path):
    path = write(tmp_path / "a.bmp", np.zeros((6, 6, 3), np.uint8))
    content = bytearray(path.read_bytes())
    content[18:26] = struct.pack("<ii", 2**30, 2**30)
    path.write_bytes(content)
    with pytest.raises(files.UnreadableImage, match=r"a\.bmp is damaged"):
        read_image(path)


def test_what_lies_among_images(folder):
    """Folders and pipes are passed over, links to nothing are not: an image is missing there."""
    (folder / "cat" / "album.png").mkdir()
    os.mkfifo(folder / "cat" / "pipe.png")
    (folder / "cat" / "lost.png").symlink_to("nowhere.png")
    assert [p.name for p in images_below(folder / "cat")] == ["0.png", "1.png", "2.png", "lost.png"]
    with pytest.raises(InputError, match=r"1 of 7 listed images do not exist: .*lost\.png"):
        FolderDataset(folder)


def test_links_to_folders_are_followed_but_not_in_circles(folder, tmp_path):
    for name in "ab":
        write(tmp_path / name / f"{name}.png", np.zeros((6, 6, 3), np.uint8))
    for place, target in (("cat/a", "a"), ("a/b", "b"), ("b/back", "a"), ("cat/up", folder), ("cat/self", "cat")):
        start = folder if place.startswith("cat") else tmp_path
        (start / place).symlink_to(folder / target if target == "cat" else tmp_path / target, target_is_directory=True)
    found = [str(p.relative_to(folder)) for p in images_below(folder / "cat")]
    assert found == ["cat/0.png", "cat/1.png", "cat/2.png", "cat/a/a.png", "cat/a/b/b.png"]


def test_a_folder_that_cannot_be_read_is_told(folder, monkeypatch):
    def walk(top, onerror, followlinks):
        onerror(PermissionError(13, "Permission denied", f"{top}/deep"))
        return iter(())

    monkeypatch.setattr("visadapt.datasets.folder.os.walk", walk)
    with pytest.raises(InputError, match=r"folder .*cat/deep cannot be read: permission denied"):
        images_below(folder / "cat")


def test_lists_that_are_none(folder):
    (folder / "list.csv").write_bytes(b"path,label\n\xff\xfe,0\n")
    with pytest.raises(InputError, match=r"list\.csv is not UTF-8 text"):
        CSVDataset("list.csv", root=folder)
    (folder / "list.csv").write_text('path,label\n"' + "a" * 200_000 + '",0\n')
    with pytest.raises(InputError, match=r"list\.csv:2: field larger than field limit"):
        CSVDataset("list.csv", root=folder)
    for make in (lambda: CSVDataset("cat", root=folder), lambda: ListDataset("cat", root=folder)):
        with pytest.raises(InputError, match=r"list file 'cat': .* is a folder, a file is needed"):
            make()
    for label in ("99999999999", "9" * 5000):
        (folder / "list.txt").write_text(f"cat/0.png 0\ncat/1.png {label}\n")
        with pytest.raises(InputError, match=r"list\.txt:2: label '9+' has more than 6 digits"):
            ListDataset(folder / "list.txt")


@pytest.mark.parametrize("problem", ["unreadable", "sizes", "transform"])
def test_errors_of_workers_are_the_same_one_line(folder, problem):
    """A worker hands on its traceback as text; what reaches the user is the message alone."""
    transform = [dict(type="RandomCrop", height=50, width=50)] if problem == "transform" else None
    if problem == "unreadable":
        (folder / "cat" / "1.png").write_bytes(b"no image")
    if problem == "sizes":
        write(folder / "cat" / "1.png", np.zeros((9, 9, 3), np.uint8))
    data = FolderDataset(folder, strict=True, transform=transform)
    said = []
    for workers in (0, 1):
        with pytest.raises(InputError) as caught:
            list(DataLoader(data, batch_size=3, num_workers=workers, collate_fn=collate))
        said.append((type(caught.value), str(caught.value)))
    assert said[0] == said[1] and "\n" not in said[0][1]
    assert "Original Traceback" in caught.value.__notes__[0]  # for --debug
