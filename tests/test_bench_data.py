"""Data sets of the benchmark: their layouts on small files written here, and on real files where these are."""

from __future__ import annotations

import hashlib
import io
import json
import random
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from visadapt.datasets import few_shot, fgvc, omniglot
from visadapt.datasets.base import collate, data_root
from visadapt.datasets.eurosat import EuroSAT
from visadapt.datasets.few_shot import FewShot
from visadapt.datasets.fgvc import FGVC
from visadapt.datasets.masks import collate_masks
from visadapt.datasets.omniglot import Omniglot
from visadapt.datasets.retina import CHASEDB1, DRIVE
from visadapt.datasets.samson import Samson
from visadapt.datasets.tiny_imagenet import TinyImageNet
from visadapt.errors import InputError
from visadapt.registry import DATASETS

VTAB_SPLITS = ("train800", "val200", "train800val200", "test")
SPLITS = ("train", "val", "trainval", "test")
SEVEN = {"CHASEDB1", "DRIVE", "FGVC", "FewShot", "Omniglot", "Samson", "TinyImageNet"}


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def grey(value: int = 0, size=(4, 5)) -> np.ndarray:
    return np.full(size, value, np.uint8)


def real(name: str) -> Path:
    try:
        return data_root(name)
    except InputError:
        pytest.skip(f"{name} is not on this machine")


def names(data) -> list[str]:
    return [Path(p).name for p in data.paths]


def test_they_are_registered_and_refuse_other_splits(tmp_path):
    assert set(DATASETS.names()) >= SEVEN
    arguments = {"FGVC": dict(task="nabirds"), "FewShot": dict(split_file="x.json")}
    for name in SEVEN:
        with pytest.raises(InputError, match=f"{name} has no split 'tets'.*'test'"):
            DATASETS.build(dict(type=name, split="tets", root=str(tmp_path), **arguments.get(name, {})))


@pytest.fixture
def dogs(tmp_path):
    """An image of each class in train and in test, and one in val; class ids are 5, 7, ... so that text sorts wrong."""
    base = tmp_path / "stanford_dogs"
    ids = {f"{i}.png": 5 + 2 * i for i in range(120)}
    lists = {"train": ids, "val": {"val.png": 205}, "test": {f"test{i}.png": str(5 + 2 * i) for i in (3, 0)}}
    for name, rows in lists.items():
        for path in rows:
            save(base / "Images" / path, grey())
        (base / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


def test_fgvc_layout(dogs):
    found = {split: FGVC("stanford_dogs", split, root=dogs) for split in SPLITS}
    assert [len(found[s]) for s in SPLITS] == [120, 1, 121, 2]
    assert found["train"].labels == list(range(120)) and found["val"].labels == [100] and found["test"].labels == [3, 0]
    assert found["trainval"].paths == found["train"].paths + found["val"].paths
    assert {data.classes for data in found.values()} == {tuple(str(5 + 2 * i) for i in range(120))}
    assert found["val"][0]["inputs"].shape == (3, 4, 5)
    assert [known.classes for known in fgvc.TASKS.values()] == [200, 555, 102, 120, 196]


def test_fgvc_mistakes(dogs):
    base = dogs / "stanford_dogs"
    for task, message in (
        ("dogs", "FGVC has no task 'dogs'.*stanford_dogs"),
        ("nabirds", "no folder .*nabirds; unpack"),
    ):
        with pytest.raises(InputError, match=message):
            FGVC(task, root=dogs)
    for name, content, message in [
        ("test", {"0.png": 6}, r"test\.json: '0\.png' has class 6, which no training image has"),
        ("test", {f"none{i}.png": 5 for i in range(7)}, "7 of 7 listed images do not exist.*none4.png, …"),
        ("test", ["0.png"], r"test\.json: a list is"),
        ("val", {"val.png": 5.5}, r"val\.json: a list is"),
        ("val", {"val.png": 6}, "name 121 classes, stanford_dogs has 120"),
    ]:
        (base / f"{name}.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            FGVC("stanford_dogs", "test" if name == "test" else "val", root=dogs)
    (base / "train.json").unlink()
    with pytest.raises(InputError, match=r"train\.json cannot be read"):
        FGVC("stanford_dogs", root=dogs)


@pytest.fixture
def pets(tmp_path):
    """Two classes, of which the second comes first; ten and three training images, five and six to validate."""
    counts, lists = {"train": {1: 10, 0: 3}, "val": {1: 5, 0: 6}, "test": {0: 2, 1: 7}}, {}
    for split, sizes in counts.items():
        pairs = [(f"{split}{label}_{i}.png", label) for label in sizes for i in range(sizes[label])]
        lists[split] = [[save(tmp_path / "images" / path, grey()).name, k, ("a_cat", "dog")[k]] for path, k in pairs]
    (tmp_path / "split_zhou_Pets.json").write_text(json.dumps(lists))
    return tmp_path


def few(root, **kwargs):
    return FewShot(root, "split_zhou_Pets.json", image_dir="images", **kwargs)


def test_few_shot_counts(pets, monkeypatch):
    for shots, val in ((1, 1), (2, 2), (4, 4), (8, 4)):
        assert Counter(few(pets, shots=shots).labels) == {1: shots, 0: shots}
        assert Counter(few(pets, shots=shots, split="val").labels) == {1: val, 0: val}
        assert Counter(few(pets, shots=shots, split="test").labels) == {0: 2, 1: 7}
    assert few(pets).classes == ("a cat", "dog") and few(pets)[0]["inputs"].shape == (3, 4, 5)
    assert {name[:5] for name in names(few(pets))} == {"train"}
    assert len(few_shot.TASKS) == 9 and sum(classes for classes, _ in few_shot.TASKS.values()) == 1091
    base, (_, arguments) = pets / "few-shot/dtd", few_shot.TASKS["dtd"]
    base.mkdir(parents=True)
    (pets / "images").rename(base / "images")
    (pets / "split_zhou_Pets.json").rename(base / "split_zhou_DescribableTextures.json")
    monkeypatch.setenv("VISADAPT_DATA", str(pets))
    assert len(FewShot(shots=1, **arguments)) == 2


def test_few_shot_draws(pets):
    """Validation first, classes as they come in the list, one stream of Python's generator."""
    rng, expected = random.Random(2), {}
    for split, sizes, shots in (("val", {1: 5, 0: 6}, 4), ("train", {1: 10, 0: 3}, 8)):
        expected[split] = [f"{split}1_{i}.png" for i in rng.sample(range(sizes[1]), shots)]
        draw = rng.choices if sizes[0] < shots else rng.sample
        expected[split] += [f"{split}0_{i}.png" for i in draw(range(sizes[0]), k=shots)]
    for split in ("train", "val"):
        assert names(few(pets, shots=8, draw=2, split=split)) == expected[split]
        assert names(few(pets, shots=8, draw=3, split=split)) != expected[split]
        assert names(few(pets, shots=8, draw=2, split=split, seed=5)) == expected[split]


def test_few_shot_mistakes(pets):
    with pytest.raises(InputError, match="shots must be 1 or more, got 0"):
        few(pets, shots=0)
    for path in (pets / "images").glob("train1_*"):
        path.unlink()
    with pytest.raises(InputError, match="8 of 16 listed images do not exist"):
        few(pets, shots=8)
    source = pets / "split_zhou_Pets.json"
    lists = json.loads(source.read_text())
    for change, message in [
        (dict(val=[]), r"split_zhou_Pets\.json has no list 'val'"),
        (dict(test=[["a.png", "0", "a cat"]]), "'test', entry 0: .* is not"),
        (dict(test=[["a.png", 0, "dog"]]), "class 0 is 'a_cat' and, for a.png, 'dog'"),
        (dict(test=[["a.png", 3, "emu"]]), "class indices are 0 to 2 for 3 classes, got 3"),
    ]:
        source.write_text(json.dumps(lists | change))
        with pytest.raises(InputError, match=message):
            few(pets)
    with pytest.raises(InputError, match=r"list file 'nope\.json' not found"):
        FewShot(pets, "nope.json")


def test_tiny_imagenet_layout(tmp_path):
    """150 classes: 800 and 200 leave a rest. Names sort as text: 0, 1, 10, 2, ..."""
    wnids = [f"n{i:03d}" for i in range(150)]
    for wnid in wnids:
        folder = tmp_path / "train" / wnid / "images"
        folder.mkdir(parents=True)
        for i in (0, 1, 2, 3, 4, 5, 10):
            (folder / f"{wnid}_{i}.JPEG").touch()
    (tmp_path / "wnids.txt").write_text("\n".join(reversed(wnids)))
    save(tmp_path / "val" / "images" / "val_0.JPEG", grey(9))
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn007\t0\t0\t9\t9\n")
    train, val, both = (TinyImageNet(split, root=tmp_path) for split in VTAB_SPLITS[:3])
    assert (len(train), len(val), len(both)) == (150 * 5, 150, 150 * 6)
    assert names(train)[5:10] == [f"n001_{i}.JPEG" for i in (0, 1, 10, 2, 3)] and train.labels[5:10] == [1] * 5
    assert names(val)[:2] == ["n000_4.JPEG", "n001_4.JPEG"] and sorted(both.paths) == sorted(train.paths + val.paths)
    assert len(TinyImageNet("train", root=tmp_path)) == 150 * 7
    test = TinyImageNet("test", root=tmp_path)
    assert test.labels == [7] and test[0]["inputs"].unique().tolist() == [9] and test.classes == tuple(wnids)

    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn0007\t0\t0\t9\t9\n")
    with pytest.raises(InputError, match=r"val_annotations\.txt:1: 'n0007' is no class.*'n007'"):
        TinyImageNet("test", root=tmp_path)
    (tmp_path / "train" / "n003" / "images" / "n003_0.JPEG").unlink()
    (tmp_path / "train" / "n003" / "images" / "n003_1.JPEG").unlink()
    with pytest.raises(InputError, match="n003/images has 5 images, 6 are needed"):
        TinyImageNet("val200", root=tmp_path)
    (tmp_path / "wnids.txt").write_text("\n".join(f"n{i}" for i in range(201)))
    with pytest.raises(InputError, match="has 201 classes"):
        TinyImageNet(root=tmp_path)


def drawing(value: int) -> bytes:
    """A picture of one bit per pixel, all 0 or all 1."""
    content = io.BytesIO()
    Image.fromarray(grey(value).astype(bool)).save(content, "PNG")
    return content.getvalue()


def test_omniglot_layout(tmp_path):
    folder, packed = tmp_path / "folder" / omniglot.PART, tmp_path / "zip" / f"{omniglot.PART}.zip"
    packed.parent.mkdir()
    with zipfile.ZipFile(packed, "w") as archive:
        for k, character in enumerate(("B/character02", "B/character01", "A/character01")):
            for drawer in range(1, 21):
                name, content = f"{character}/07{k}_{drawer:02d}.png", drawing(drawer % 2)
                archive.writestr(f"{omniglot.PART}/{name}", content)
                (folder / character).mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
    drawers = dict(train800=range(1, 7), val200=range(7, 9), train800val200=range(1, 9), test=range(9, 21))
    for split, expected in drawers.items():
        for root in (packed.parent, folder.parent):
            data = Omniglot(split, root=root)
            assert data.classes == ("A/character01", "B/character01", "B/character02")
            assert names(data) == [f"07{k}_{d:02d}.png" for k in (2, 1, 0) for d in expected]
            assert data.labels == [label for label in range(3) for _ in expected]
            batch = collate([data[i] for i in range(2)])
            assert batch["inputs"].dtype == torch.uint8 and batch["inputs"].shape == (2, 3, 4, 5)
            assert batch["inputs"].amax((1, 2, 3)).tolist() == batch["inputs"].amin((1, 2, 3)).tolist() == [255, 0]

    (folder / "A/character01/072_20.png").rename(folder / "A/character01/072_21.png")
    with pytest.raises(InputError, match="A/character01 has 20 images, one of each of 20 drawers is due"):
        Omniglot(root=folder.parent)
    (folder / "A/character01/072_21.png").rename(folder / "A/character01/extra.png")
    with pytest.raises(InputError, match=r"extra\.png is not <alphabet>"):
        Omniglot(root=folder.parent)
    packed.write_bytes(packed.read_bytes()[:500])
    with pytest.raises(InputError, match="is damaged or not a zip"):
        Omniglot(root=packed.parent)
    with pytest.raises(InputError, match=r"neither .*images_background_small1\.zip nor an unpacked"):
        Omniglot(root=tmp_path)


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_drive_layout(tmp_path, suffix):
    vessel, field = grey(0, (6, 7)), grey(255, (6, 7))
    vessel[1], vessel[5], field[:, 6] = 255, 255, 0
    for part, first in (("training", 21), ("test", 1)):
        for n in range(first, first + 20):
            save(tmp_path / part / "images" / f"{n:02d}_{part}{suffix}", np.full((6, 7, 3), 200, np.uint8))
            save(tmp_path / part / "1st_manual" / f"{n:02d}_manual1.gif", vessel)
            save(tmp_path / part / "mask" / f"{n:02d}_{part}_mask.gif", field)
    found = {s: [int(name[:2]) for name in names(DRIVE(s, root=tmp_path))] for s in SPLITS}
    numbers = [*range(21, 37)], [*range(37, 41)], [*range(21, 41)], [*range(1, 21)]
    assert found == dict(zip(SPLITS, numbers))
    whole, row = DRIVE("test", root=tmp_path), [0] * 6 + [255]
    assert whole[0]["mask"].tolist() == [row, [1] * 6 + [255], row, row, row, [1] * 6 + [255]]
    tiles = DRIVE("test", root=tmp_path, tile=4)
    assert len(tiles) == 20 * 4 and tiles[3]["inputs"].shape == (3, 4, 4)
    last = [[255] * 4, [255] * 4, [255, 0, 0, 255], [255, 1, 1, 255]]  # the windows beside it have the rest
    assert tiles[3]["mask"].tolist() == last and tiles[0]["mask"].tolist() == [[0] * 4, [1] * 4, [0] * 4, [0] * 4]
    assert DRIVE("test", root=tmp_path, tile=4, training=True)[3]["mask"].tolist()[0] == [0, 0, 0, 255]
    padded = DRIVE("test", root=tmp_path, tile=8)[0]
    assert padded["mask"][:6, :7].tolist() == whole[0]["mask"].tolist() and (padded["mask"][6:] == 255).all()

    save(tmp_path / "test" / "mask" / "01_test_mask.gif", grey(255, (6, 8)))
    with pytest.raises(InputError, match=r"is \(6, 7\), its field of view \(6, 8\)"):
        whole[0]
    save(tmp_path / "test" / "1st_manual" / "02_manual1.gif", grey(255, (5, 7)))
    with pytest.raises(InputError, match=r"is \(6, 7\), its mask .* is \(5, 7\)"):
        whole[1]
    (tmp_path / "test" / "1st_manual" / "03_manual1.gif").write_bytes(b"GIF89a no more")
    assert not whole[2]["valid"]
    (tmp_path / "training" / "mask" / "21_training_mask.gif").unlink()
    with pytest.raises(InputError, match="1 of 16 listed fields of view do not exist"):
        DRIVE(root=tmp_path)
    (tmp_path / "training" / "images" / f"22_training{suffix}").unlink()
    with pytest.raises(InputError, match="has 19 images; the splits are those of 20"):
        DRIVE(root=tmp_path)


def test_chase_layout(tmp_path):
    vessel = np.zeros((2, 3), bool)
    vessel[0, 1] = True
    for child in range(1, 15):
        for eye in "LR":
            save(tmp_path / f"Image_{child:02d}{eye}.jpg", grey())
            save(tmp_path / f"Image_{child:02d}{eye}_1stHO.png", vessel)
            save(tmp_path / f"Image_{child:02d}{eye}_2ndHO.png", ~vessel)
    found = {s: [int(name[6:8]) for name in names(CHASEDB1(s, root=tmp_path))[::2]] for s in SPLITS}
    numbers = [*range(1, 9)], [9, 10], [*range(1, 11)], [*range(11, 15)]
    assert found == dict(zip(SPLITS, numbers))
    data = CHASEDB1("val", root=tmp_path)
    assert names(data) == [f"Image_{n}.jpg" for n in ("09L", "09R", "10L", "10R")]
    save(tmp_path / "Image_09L.jpg", grey(0, (2, 3)))
    assert data[0]["mask"].tolist() == [[0, 1, 0], [0, 0, 0]]


def test_samson_layout(tmp_path):
    """The value of a pixel is its column, plus 100 for each band; labels are the column modulo 3, plus 1."""
    column = np.broadcast_to(np.arange(95), (95, 95))
    savemat(tmp_path / "Y_clean.mat", {"Y_clean": (column[..., None] + 100 * np.arange(156)).astype(np.uint16)})
    savemat(tmp_path / "Samson_gt.mat", {"samson_gt": (column % 3 + 1).astype(np.uint8)})
    for split, (start, stop) in dict(train=(0, 38), val=(38, 48), trainval=(0, 48), test=(48, 95)).items():
        data = Samson(split, root=tmp_path)
        assert len(data) == 1 and data.channels == 156 and data.classes == ("soil", "tree", "water")
        sample = collate_masks([data[0]])
        assert sample["inputs"].shape == (1, 156, 95, stop - start) and sample["inputs"].dtype == torch.float32
        assert sample["inputs"][0, :, 5, 0].tolist() == [start + 100 * band for band in range(156)]
        assert sample["masks"][0][7].tolist() == [c % 3 for c in range(start, stop)]

    crop = [dict(type="RandomCrop", height=56, width=56, pad_if_needed=True)]
    turns = [dict(type="RandomRotate90", p=1.0), dict(type="Transpose", p=0.5)]
    sample = Samson("trainval", root=tmp_path, transform=[*crop, *turns], training=True)[0]
    assert sample["inputs"].shape == (156, 56, 56) and (sample["mask"] == 255).sum() == 8 * 56
    inside = sample["mask"] < 255
    assert torch.equal(sample["inputs"][1][inside] % 100 % 3, sample["mask"][inside].float())

    tiles = Samson("test", root=tmp_path, tile=16)  # 6 rows of 3
    labels = torch.stack([tiles[i]["mask"] for i in range(len(tiles))])
    assert len(tiles) == 18 and (labels < 255).sum() == 95 * 47
    assert tiles[1]["inputs"][0, 0].tolist() == list(range(64, 80)) and tiles.name(1).endswith("#48-94#16,0")
    big = [dict(type="Resize", height=32, width=32)]
    native = Samson("test", root=tmp_path, tile=16, native_masks=True, transform=big)[1]
    assert native["inputs"].shape == (156, 32, 32) and native["mask"].shape == (16, 16)

    savemat(tmp_path / "Samson_gt.mat", {"samson_gt": np.ones((95, 94), np.uint8)})
    with pytest.raises(InputError, match=r"has \(95, 94\) as 'samson_gt', \(95, 95\) is needed"):
        Samson(root=tmp_path)
    (tmp_path / "Samson_gt.mat").write_bytes(b"MATLAB no more")
    with pytest.raises(InputError, match=r"Samson_gt\.mat is damaged"):
        Samson(root=tmp_path)
    (tmp_path / "Y_clean.mat").unlink()
    with pytest.raises(InputError, match=r"there is no .*Y_clean\.mat"):
        Samson(root=tmp_path)


def eurosat(split: str) -> EuroSAT:
    return EuroSAT("test", None if split == "test" else f"data/lists/eurosat_{split}.txt")


def test_eurosat_lists_are_the_first_of_each_class():
    real("eurosat")
    for ours, theirs, count in (("train800", "train", 80), ("val200", "val", 20)):
        data = EuroSAT(theirs)
        first = [[p for p, label in zip(data.paths, data.labels) if label == k][:count] for k in range(10)]
        assert eurosat(ours).paths == [path for paths in first for path in paths]


@pytest.mark.parametrize(
    ("folder", "build", "splits", "classes", "counts"),
    [
        ("eurosat", eurosat, VTAB_SPLITS, 10, (80, 20, 100, 50)),
        ("tiny_imagenet_50", TinyImageNet, VTAB_SPLITS, 50, (16, 4, 20, 20)),
        ("omniglot_small1", Omniglot, VTAB_SPLITS, 136, (6, 2, 8, 12)),
        ("retina", DRIVE, SPLITS, None, (16, 4, 20, 20)),
        ("retina", CHASEDB1, SPLITS, None, (16, 4, 20, 8)),
    ],
)
def test_real_splits(folder, build, splits, classes, counts):
    """So many images, of each class where there are several; no image is in two splits under any name."""
    real(folder)
    found = [build(split) for split in splits]
    if classes:
        assert [Counter(data.labels) for data in found] == [dict.fromkeys(range(classes), n) for n in counts]
    assert [len(data) for data in found] == [n * (classes or 1) for n in counts]
    train, val, both, test = ({hashlib.sha256(data.load(i)).digest() for i in range(len(data))} for data in found)
    assert not train & val and not both & test and train | val == both
    assert [len(images) for images in (both, test)] == [len(data) for data in found[2:]]


def test_real_labels():
    """Looked at: a salamander and an acorn, a Z, vessels that are darker than what is around them."""
    text = (real("tiny_imagenet_50") / "tiny-imagenet-200/words.txt").read_text()
    words = dict(line.split("\t") for line in text.splitlines())
    data = TinyImageNet("train800")
    assert [words[data.classes[data.labels[i]]][-10:] for i in (0, 799)] == ["salamandra", "acorn"]
    assert (names(data)[0], names(data)[799]) == ("n01629819_10.JPEG", "n12267677_175.JPEG")
    real("omniglot_small1")
    data = Omniglot("train800")
    assert data.classes[data[815]["label"]] == "Latin/character26"
    ink = data[815]["inputs"][0] == 0
    assert ink[30:35, 28:60].any(1).all() and ink[70:75, 28:70].any(0).float().mean() > 0.9  # both bars
    for build in (DRIVE, CHASEDB1):
        real("retina")
        sample = build("test")[0]
        green = sample["inputs"][1].float()
        assert green[sample["mask"] == 1].mean() < green[(sample["mask"] == 0) & (green > 30)].mean() - 10
    real("samson_hsi")
    assert Samson("test")[0]["mask"].flatten().bincount().tolist() == [2359, 1270, 836]
    infrared, mask = Samson("trainval").load(0)[..., 120:].mean(-1), Samson("trainval")[0]["mask"].numpy()
    assert [round(infrared[mask == label].mean(), 1) for label in range(3)] == [0.5, 0.6, 0.1]  # water is dark there
