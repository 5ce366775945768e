"""Published segmentation sets: their layouts on small files written here, and on real files where these are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visadapt.datasets import sen1floods11
from visadapt.datasets.base import data_root
from visadapt.datasets.cloud_sets import GF12MS_WHU, HRC_WHU, CloudSEN12, L8Biome
from visadapt.datasets.dubai_aerial import DubaiAerial
from visadapt.datasets.gid import GID
from visadapt.datasets.isaid import iSAID
from visadapt.datasets.isprs import Potsdam, Vaihingen
from visadapt.datasets.loveda import LoveDA
from visadapt.datasets.masks import collate_masks
from visadapt.datasets.sen1floods11 import Sen1Floods11
from visadapt.datasets.wsiseg import WSISEG
from visadapt.errors import InputError
from visadapt.registry import DATASETS

FOLDERS = [LoveDA, Potsdam, Vaihingen, iSAID, GID, HRC_WHU, GF12MS_WHU, CloudSEN12, L8Biome]
ZERO_IGNORED = {LoveDA, Potsdam, Vaihingen, GID}


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)
    return path


def real(name: str) -> Path:
    try:
        return data_root(name)
    except InputError:
        pytest.skip(f"{name} is not on this machine")


def counts(data) -> dict[int, int]:
    """Pixels of each class in a whole data set."""
    total = sum(torch.bincount(data[i]["mask"].flatten(), minlength=256) for i in range(len(data)))
    return {i: n for i, n in enumerate(total.tolist()) if n}


@pytest.mark.parametrize("cls", FOLDERS)
def test_split_folders(tmp_path, cls):
    k, first = len(cls.CLASSES), int(cls in ZERO_IGNORED)
    stored = np.append(np.arange(k + first), 255).reshape(1, -1)
    for split in ("train", "test"):
        save(tmp_path / "img_dir" / split / f"{split}.png", np.zeros((1, stored.size, 3)))
        save(tmp_path / "ann_dir" / split / f"{split}{cls.MASK_SUFFIX}", stored)
    data = cls("test", root=tmp_path)
    assert [Path(p).name for p in data.paths] == ["test.png"] and data.classes == cls.CLASSES
    last = 3 if cls is L8Biome else 255  # its own number of clouds
    assert data[0]["mask"].tolist() == [[255] * first + [*range(k), last]]
    assert len(data.metainfo["palette"]) == len(set(data.palette)) == k
    assert DATASETS.build(dict(type=cls.__name__, root=tmp_path)).paths[0].endswith("train.png")
    with pytest.raises(InputError, match=f"{cls.__name__} has no split 'tets'.*'test'"):
        cls("tets", root=tmp_path)
    with pytest.raises(InputError, match=r"no folder .*img_dir/val"):
        cls("val", root=tmp_path)


def test_other_folders_and_lists(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / "Train" / "Rural" / "images_png" / f"{name}.png", np.zeros((8, 8, 3)))
        save(tmp_path / "Train" / "Rural" / "masks_png" / f"{name}.png", np.full((8, 8), 7))
    rural = dict(split=None, image_dir="Train/Rural/images_png", mask_dir="Train/Rural/masks_png", root=tmp_path)
    assert len(LoveDA(**rural)) == 2 and len(LoveDA(**rural, tile=4)) == 8
    (tmp_path / "few.txt").write_text("b\n")
    data = LoveDA(**rural, list_file=tmp_path / "few.txt")
    assert [Path(p).name for p in data.paths] == ["b.png"] and counts(data) == {6: 64}


def test_numbers_of_l8_biome(tmp_path):
    save(tmp_path / "img_dir" / "train" / "a.png", np.zeros((1, 5, 3)))
    save(tmp_path / "ann_dir" / "train" / "a.png", np.array([[0, 64, 128, 192, 255]]))
    assert L8Biome(root=tmp_path)[0]["mask"].tolist() == [[0, 1, 0, 2, 3]]


def test_wsiseg_mistakes(tmp_path):
    save(tmp_path / "whole sky images" / "a.jpg", np.zeros((4, 4, 3)))
    save(tmp_path / "annotation" / "a.png", np.zeros((4, 4)))
    with pytest.raises(InputError, match="has 1 images; the splits are those of 200"):
        WSISEG(root=tmp_path)
    with pytest.raises(InputError, match="WSISEG has no split 'val'"):
        WSISEG("val", root=tmp_path)


def test_dubai_layout(tmp_path):
    colors = ["3c1098", "8429f6", "6ec1e4", "fedd3a", "e2a929", "9b9b9b", "000000"]
    mask = np.array([[list(bytes.fromhex(c)) for c in colors]])
    for n in range(1, 7):
        save(tmp_path / f"Tile {n}" / "images" / f"image_part_00{n}.jpg", np.zeros((1, 7, 3)))
        save(tmp_path / f"Tile {n}" / "masks" / f"image_part_00{n}.png", mask)
    train, test = DubaiAerial(root=tmp_path), DubaiAerial("test", root=tmp_path)
    assert [Path(p).parts[-3] for p in train.paths] == [f"Tile {n}" for n in range(1, 6)]
    assert [Path(p).parts[-3] for p in test.paths] == ["Tile 6"]
    few, val = DubaiAerial("train4", root=tmp_path), DubaiAerial("val", root=tmp_path)
    assert few.paths + val.paths == train.paths and [Path(p).parts[-3] for p in val.paths] == ["Tile 5"]
    assert test[0]["mask"].tolist() == [[0, 1, 2, 3, 4, 255, 255]]
    with pytest.raises(InputError, match=r"DubaiAerial has no split 'trainval'.*'train'"):
        DubaiAerial("trainval", root=tmp_path)


@pytest.mark.parametrize(("hand", "labels"), [("", "Labels"), ("Hand", "LabelHand")])
def test_sen1floods11_layouts(tmp_path, hand, labels):
    pytest.importorskip("rasterio")
    from scenes import write

    for folder in (f"S1{hand}", f"S2{hand}", labels):
        (tmp_path / folder).mkdir()
    for chip, label in (("Ghana_1", 0), ("Spain_2", 1)):
        optical = np.arange(13, dtype=np.int16).reshape(13, 1, 1) + np.ones((13, 2, 3), np.int16)
        optical[:, 0, 0] = 0
        radar = np.array([-10, -20], np.float32).reshape(2, 1, 1) + np.zeros((2, 2, 3), np.float32)
        radar[1, 0, 1] = np.nan
        write(tmp_path / f"S2{hand}/{chip}_S2Hand.tif", optical, sen1floods11.S2, nodata=0)
        write(tmp_path / f"S1{hand}/{chip}_S1Hand.tif", radar, sen1floods11.S1, nodata=np.nan)
        write(tmp_path / f"{labels}/{chip}_LabelHand.tif", np.array([[[label] * 3, [label, label, -1]]], np.int16))

    data = Sen1Floods11(root=tmp_path)
    assert (len(data), data.channels, data.bands) == (2, 13, sen1floods11.S2)
    assert data[1]["mask"].tolist() == [[255, 1, 1], [1, 1, 255]]
    both = Sen1Floods11(["VH", "B12", "B8A", "VV"], root=tmp_path)
    assert both[1]["inputs"][:, 1, 1].tolist() == [-20, 13, 9, -10] and both[1]["inputs"].dtype == torch.float32
    assert both[1]["mask"].tolist() == [[255, 255, 1], [1, 1, 255]]  # empty in either
    (tmp_path / "few.txt").write_text("Spain_2\n")
    radar = Sen1Floods11(["VV"], list_file=tmp_path / "few.txt", root=tmp_path)
    assert (len(radar), radar.channels) == (1, 1) and radar.paths[0].endswith("Spain_2_S1Hand.tif")
    assert radar[0]["mask"].tolist() == [[1, 1, 1], [1, 1, 255]]

    with pytest.raises(InputError, match=r"has no band 'B13' \(did you mean"):
        Sen1Floods11(["B13"], root=tmp_path)
    with pytest.raises(InputError, match="names no band"):
        Sen1Floods11([], root=tmp_path)
    (tmp_path / f"S1{hand}" / "Ghana_1_S1Hand.tif").unlink()
    assert len(Sen1Floods11(root=tmp_path)) == 2
    with pytest.raises(InputError, match=r"1 of 4 listed images do not exist: .*Ghana_1_S1Hand\.tif"):
        Sen1Floods11(["VH", "B12"], root=tmp_path)


# real files


@pytest.mark.parametrize(
    ("cls", "folder", "expected"),
    [
        (LoveDA, "loveda", {0: 142441, 1: 14427, 2: 19208, 3: 3888, 6: 868612}),
        (Potsdam, "potsdam", {0: 100557, 1: 64023, 2: 34357, 3: 30670, 4: 7841, 255: 24696}),
        (Vaihingen, "vaihingen", {0: 135362, 1: 79847, 2: 16532, 3: 4908, 4: 4212, 255: 21283}),
    ],
)
def test_real_tiles(cls, folder, expected):
    data = cls(None, root=real("rs_mmseg_samples") / folder)
    raw = np.asarray(Image.open(data.masks[0]))
    sample = data[0]
    found, n = sample["mask"].unique(return_counts=True)
    assert dict(zip(found.tolist(), n.tolist())) == expected
    assert [(raw == i + 1).sum() for i in range(len(cls.CLASSES))] == [
        expected.get(i, 0) for i in range(len(cls.CLASSES))
    ]
    assert sample["inputs"].shape == (3, *raw.shape) and sample["inputs"].float().std() > 10


def test_real_wsiseg():
    real("wsiseg")
    train, test = WSISEG("train"), WSISEG("test", native_masks=True, transform=[dict(type="Resize", height=8, width=8)])
    assert (len(train), len(test)) == (140, 40) and not set(train.paths) & set(test.paths)
    assert max(train.paths) < min(test.paths)
    batch = collate_masks([test[i] for i in range(3)])
    assert batch["inputs"].shape == (3, 3, 8, 8) and {tuple(m.shape) for m in batch["masks"]} == {(225, 240)}
    raw = np.asarray(Image.open(test.masks[0]))
    assert [(batch["masks"][0] == i).sum() for i in (0, 1, 255)] == [(raw == i).sum() for i in (100, 255, 0)]
    # clouds are paler than the sky: blue stands out less
    sample = train[0]
    grey = sample["inputs"][2].float() - sample["inputs"][0]
    assert grey[sample["mask"] == 0].mean() > grey[sample["mask"] == 1].mean() + 20


def test_real_dubai():
    real("dubai_aerial")
    assert len(DubaiAerial()) == 45 and len(DubaiAerial("test")) == 9
    whole, windows = DubaiAerial("test")[0], DubaiAerial("test", tile=256)
    ours = [windows[i] for i, path in enumerate(windows.paths) if path == whole["path"]]
    assert whole["inputs"].shape == (3, 838, 859) and {tuple(s["inputs"].shape) for s in ours} == {(3, 256, 256)}
    expected = {0: 61179, 1: 375431, 2: 36090, 3: 10238, 4: 225658}
    assert counts([whole]) == expected | {255: 11246}
    assert {i: n for i, n in counts(ours).items() if i < 255} == expected
    assert len(ours) == 16 and len(windows) == 144


def test_real_sen1floods11():
    pytest.importorskip("rasterio")
    real("sen1floods11")
    data = Sen1Floods11(["VV", "B3", "B11"])
    assert counts(data) == {0: 192010, 1: 70035, 255: 99}
    vv, green, infrared = data[0]["inputs"]
    water = data[0]["mask"] == 1
    assert vv[water].mean() < vv[~water].mean() - 5  # water is dark to radar and in the infrared
    assert (green - infrared)[water].mean() > 0 > (green - infrared)[~water].mean()
