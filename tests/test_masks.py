"""Masks: what files hold, what it stands for, and samples and batches of images with masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from visadapt.datasets.base import Draw
from visadapt.datasets.files import UnreadableImage
from visadapt.datasets.labels import Labels
from visadapt.datasets.masks import SegmentationDataset, collate_masks, find_pairs
from visadapt.datasets.raster_files import Window, read_mask
from visadapt.datasets.sampler import EpochSampler
from visadapt.errors import InputError

ABC = ["water", "forest", "town"]
COLORS = ["#0000ff", (0, 255, 0), "#FF0000"]
RESIZE = dict(type="Resize", height=4, width=4)
MASK = np.array([[0, 1, 2, 255], [0, 0, 1, 1]], np.uint8)


def save(path: Path, array: np.ndarray, palette=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
        return path
    image = Image.fromarray(array)
    if palette is not None:
        image = Image.frombytes("P", array.shape[::-1], array.tobytes())
        image.putpalette(np.array(palette, np.uint8).tobytes())
    image.save(path)
    return path


def pairs(folder: Path, masks, suffix=".png"):
    """Image i has the value of its class times 100 in red, its index in green, and the row in blue."""
    images = []
    for i, mask in enumerate(masks):
        mask = np.asarray(mask, np.uint8)
        rows = np.broadcast_to(np.arange(mask.shape[0])[:, None], mask.shape)
        save(folder / "masks" / f"{i}{suffix}", mask)
        red = np.where(mask < 3, mask, 0) * 100
        images.append(save(folder / "images" / f"{i}.png", np.stack([red, 0 * red + i, rows], -1).astype(np.uint8)))
    return images, [folder / "masks" / f"{i}{suffix}" for i in range(len(masks))]


def dataset(folder, masks, **options):
    return SegmentationDataset(*pairs(folder, masks), ABC, **options)


# what masks stand for


@pytest.mark.parametrize(
    ("options", "raw", "expected"),
    [
        (dict(), [0, 2, 255], [0, 2, 255]),
        (dict(reduce_zero=True), [0, 1, 3, 255], [255, 0, 2, 255]),
        (dict(label_map={0: 255, 100: 0, 255: 1}), [0, 100, 255], [255, 0, 1]),
        (dict(label_map={"-1": 255, "7": 2}), [-1, 7, 255], [255, 2, 255]),
        (dict(ignore=[9, -1]), [9, -1, 1], [255, 255, 1]),
        (dict(label_map={1000: 0, 70000: 1}), [1000, 70000], [0, 1]),
    ],
)
def test_numbers_become_class_indices(options, raw, expected):
    labels = Labels(ABC, **options)
    kinds = [np.int16, np.int64] if min(raw) < 0 else [np.uint8] if max(raw) < 256 else []
    for dtype in [*kinds, np.int32]:
        out = labels(np.array([raw], dtype), "a.png")
        assert out.dtype == np.uint8 and out.tolist() == [expected]


def test_colors_become_class_indices():
    labels = Labels(ABC, colors=COLORS, ignore=["#9b9b9b", (0, 0, 0)])
    raw = np.array([[[0, 0, 255], [0, 255, 0], [255, 0, 0], [0x9B] * 3, [0, 0, 0]]], np.uint8)
    assert labels(raw, "a.png").tolist() == [[0, 1, 2, 255, 255]]
    assert labels.colors == ((0, 0, 255), (0, 255, 0), (255, 0, 0))


def test_what_stands_for_no_class_is_named():
    with pytest.raises(
        InputError, match=r"mask m\.png holds 3 \(2 pixels\), 9 \(1 pixels\).*known are 0 water, 1 forest, 2"
    ) as e:
        Labels(ABC)(np.array([[3, 3, 9, 0]], np.uint8), "m.png")
    assert "255 ignored" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(InputError, match=r"holds -1 \(1 pixels\), 70000 \(1 pixels\)"):
        Labels(ABC)(np.array([[-1, 70000]]), "m.png")
    with pytest.raises(InputError, match=r"holds #010203 \(1 pixels\).*#0000ff water"):
        Labels(ABC, colors=COLORS)(np.array([[[1, 2, 3], [0, 0, 255]]], np.uint8), "m.png")
    with pytest.raises(InputError, match=r"holds 0 \(1 pixels\)"):  # of the map, not of the classes
        Labels(ABC, label_map={7: 0})(np.array([[0]], np.uint8), "m.png")
    with pytest.raises(InputError, match=r"… \(97 in all\)"):
        Labels(ABC)(np.arange(100)[None], "m.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(colors=COLORS[:2]), "2 colors but 3 classes"),
        (dict(colors=[*COLORS[:2], (0, 255, 0)]), r"'forest' and 'town' have the same color \(0, 255, 0\)"),
        (dict(colors=[*COLORS[:2], "#12345"]), "a color is .* got '#12345'"),
        (dict(colors=[*COLORS[:2], (0, 256, 0)]), "a color is"),
        (dict(colors=COLORS, reduce_zero=True), "colors and reduce_zero exclude each other"),
        (dict(label_map={0: 0}, reduce_zero=True), "label_map and reduce_zero exclude"),
        (dict(label_map={0: 3}), r"turns 0 into 3, but there are 3 classes \(0 to 2"),
        (dict(label_map={"sea": 0}), "whole numbers, got 'sea'"),
        (dict(ignore=["#000000"]), "ignore: masks hold whole numbers.*colors"),
    ],
)
def test_tables_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        Labels(ABC, **options)
    with pytest.raises(InputError, match="1 to 255 classes, got 256"):
        Labels([str(i) for i in range(256)])


# what mask files hold


def test_a_palette_holds_indices_and_colors(tmp_path):
    path = save(tmp_path / "p.png", MASK, palette=[(0, 0, 255), (0, 255, 0), (255, 0, 0)] + [(9, 9, 9)] * 253)
    raw, size = read_mask(path)
    assert np.array_equal(raw, MASK) and size == (2, 4)
    raw, _ = read_mask(path, colored=True)
    assert raw.shape == (2, 4, 3) and raw[0].tolist() == [[0, 0, 255], [0, 255, 0], [255, 0, 0], [9, 9, 9]]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.int64, np.float32])
def test_arrays_and_their_windows(tmp_path, dtype):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    path = save(tmp_path / "m.npy", array)
    raw, size = read_mask(path, window=Window(1, 2, 4, 4))
    assert size == (3, 4) and np.array_equal(raw, array[1:, 2:]) and raw.dtype.kind in "biu"
    assert Labels([str(i) for i in range(12)])(raw, path).tolist() == array[1:, 2:].astype(int).tolist()


@pytest.mark.parametrize(
    ("name", "array", "colored", "message"),
    [
        ("a.png", np.zeros((2, 2, 3), np.uint8), False, r"a\.png has 3 bands, 1 needed; give colors"),
        ("a.png", np.zeros((2, 2), np.uint8), True, "has 1 band, 3 needed; leave out colors"),
        ("a.jpg", np.zeros((8, 8), np.uint8), False, r"masks of type '\.jpg' are not read"),
        ("a.npy", np.full((2, 2), 0.5), False, "holds fractions"),
        ("a.npy", np.full((2, 2), np.nan), False, "holds fractions or NaN"),
        ("a.npy", np.full((2, 2), np.inf), False, "holds fractions"),
    ],
)
def test_files_that_are_no_masks(tmp_path, name, array, colored, message):
    with pytest.raises(InputError, match=message) as caught:
        read_mask(save(tmp_path / name, array), colored)
    assert not isinstance(caught.value, UnreadableImage)  # those would be skipped


def test_damaged_masks_are_unreadable(tmp_path):
    for name in ("a.png", "a.npy"):
        path = save(tmp_path / name, np.zeros((64, 64), np.uint8))
        for data in (path.read_bytes()[:60], b""):
            path.write_bytes(data)
            with pytest.raises(UnreadableImage, match=f"{name} is"):
                read_mask(path)
    with pytest.raises(UnreadableImage, match=r"none\.png is missing"):
        read_mask(tmp_path / "none.png")


# samples


def test_sample_and_batch(tmp_path):
    data = dataset(tmp_path, [MASK, MASK[:, ::-1], np.zeros((2, 4))])
    assert data.metainfo == {"classes": tuple(ABC)} and (data.channels, data.bands, len(data)) == (3, None, 3)
    sample = data[1]
    assert sample["inputs"].dtype == torch.uint8 and sample["inputs"].shape == (3, 2, 4)
    assert sample["mask"].dtype == torch.int64 and np.array_equal(sample["mask"], MASK[:, ::-1])
    assert (sample["index"], sample["valid"], sample["unreadable"]) == (1, True, "")
    batch = collate_masks([data[i] for i in (0, 2)])
    assert batch["inputs"].shape == (2, 3, 2, 4) and batch["inputs"][:, 1, 0, 0].tolist() == [0, 2]
    assert [m.tolist() for m in batch["masks"]] == [MASK.tolist(), [[0] * 4] * 2]
    assert batch["valid"].tolist() == [True, True] and batch["index"].tolist() == [0, 2]
    assert [Path(p).name for p in batch["path"]] == ["0.png", "2.png"] and batch["unreadable"] == []


def test_image_and_mask_move_together(tmp_path):
    mask = np.random.default_rng(0).integers(0, 3, (12, 16)).astype(np.uint8)
    moves = [dict(type="RandomCrop", height=9, width=9), dict(type="D4", p=1), dict(type="Pad", padding=1)]
    data = dataset(tmp_path, [mask] * 4, transform=moves, training=True)
    order = list(EpochSampler(data, seed=1))
    loaders = [DataLoader(data, 2, sampler=order, num_workers=n, collate_fn=collate_masks) for n in (0, 2)]
    for one, other in zip(*loaders):
        assert torch.equal(one["inputs"], other["inputs"]) and all(map(torch.equal, one["masks"], other["masks"]))
        for image, found in zip(one["inputs"], one["masks"]):
            inside = found[1:-1, 1:-1]
            assert torch.equal(image[0, 1:-1, 1:-1], inside * 100) and (found == 255).sum() == 11 * 11 - 9 * 9
    assert not torch.equal(data[Draw(0, 0)]["mask"], data[Draw(1, 0)]["mask"])


def test_native_masks_keep_their_size(tmp_path):
    data = dataset(tmp_path, [MASK], transform=[dict(RESIZE, height=8)], native_masks=True)
    assert data[0]["inputs"].shape == (3, 8, 4) and torch.equal(data[0]["mask"], torch.from_numpy(MASK).long())
    assert dataset(tmp_path, [MASK], transform=[RESIZE])[0]["mask"].shape == (4, 4)
    for transform, message in [
        ([RESIZE, dict(type="HorizontalFlip")], "may only be resized.*HorizontalFlip"),
        ([dict(type="CenterCrop", height=2, width=2)], "CenterCrop"),
        ([dict(RESIZE, p=0.5)], "random"),
        ([dict(type="LongestMaxSize", max_size=[2, 4])], "random"),
    ]:
        with pytest.raises(InputError, match=message):
            dataset(tmp_path, [MASK], transform=transform, native_masks=True)
    with pytest.raises(InputError, match="native_masks is for evaluation"):
        dataset(tmp_path, [MASK], transform=[RESIZE], native_masks=True, training=True)


@pytest.mark.parametrize("part", ["images", "masks"])
def test_unreadable_files(tmp_path, part):
    masks = [MASK, MASK[:, ::-1], np.ones((2, 4))]
    dataset(tmp_path, masks)
    broken = tmp_path / part / "1.png"

    def make(**options):
        files = pairs(tmp_path, masks)
        broken.write_bytes(b"nothing")
        return SegmentationDataset(*files, ABC, **options)

    sample = make(training=True)[1]
    assert (sample["index"], sample["valid"]) == (2, True) and (sample["mask"] == 1).all()
    assert sample["unreadable"].endswith("images/1.png") and sample["path"].endswith("images/2.png")
    sample = make()[1]
    assert (sample["index"], sample["valid"]) == (1, False) and not sample["inputs"].any()
    assert (sample["mask"] == 255).all() and sample["mask"].shape == (2, 4)
    assert collate_masks([make()[0], sample])["valid"].tolist() == [True, False]
    with pytest.raises(UnreadableImage, match=f"{part}/1.png"):
        make(strict=True)[1]


def test_wrong_masks_are_never_skipped(tmp_path):
    images, masks = pairs(tmp_path, [MASK, MASK])
    save(masks[1], np.full((2, 4), 3, np.uint8))
    with pytest.raises(InputError, match=r"masks/1\.png holds 3 \(8 pixels\)"):
        SegmentationDataset(images, masks, ABC, training=True)[1]
    save(masks[1], np.zeros((3, 4), np.uint8))
    with pytest.raises(InputError, match=r"images/1\.png is \(2, 4\), its mask .*masks/1\.png is \(3, 4\) \(height"):
        SegmentationDataset(images, masks, ABC, training=True)[1]
    with pytest.raises(InputError, match=r"its mask .* is \(3, 4\)"):  # though both have the first window
        SegmentationDataset(images, masks, ABC, tile=2)[2]


def test_construction_checks(tmp_path):
    images, masks = pairs(tmp_path, [MASK, MASK])
    with pytest.raises(InputError, match="2 images but 1 masks"):
        SegmentationDataset(images, masks[:1], ABC)
    with pytest.raises(InputError, match=r"1 of 2 images have no mask: .*none\.png not found; add them"):
        SegmentationDataset(images, [masks[0], tmp_path / "none.png"], ABC)
    with pytest.raises(InputError, match="class 'a' is named twice"):
        SegmentationDataset(images, masks, ["a", "a"])
    with pytest.raises(InputError, match="tile must be 0 or a number of pixels, got -1"):
        SegmentationDataset(images, masks, ABC, tile=-1)
    palette = SegmentationDataset(images, masks, ABC, colors=COLORS).metainfo["palette"]
    assert palette == ((0, 0, 255), (0, 255, 0), (255, 0, 0))
    with pytest.raises(InputError, match=r"\(3, 2, 4\).*\(3, 4, 4\).*Resize"):
        resized = SegmentationDataset(images, masks, ABC, transform=[RESIZE])
        collate_masks([SegmentationDataset(images, masks, ABC)[0], resized[0]])


# windows


@pytest.mark.parametrize("shape", [(8, 8), (7, 10), (3, 9), (2, 2), (4, 5)])
def test_windows_count_every_pixel_once(tmp_path, shape):
    mask = np.random.default_rng(0).integers(0, 3, shape).astype(np.uint8)
    data = dataset(tmp_path, [mask, mask], tile=4)
    rows, columns = (-(-n // 4) for n in shape)
    assert len(data) == 2 * rows * columns and len(data.paths) == len(data.masks) == len(data)
    samples = [data[i] for i in range(rows * columns)]
    assert {tuple(s["inputs"].shape) for s in samples} == {(3, 4, 4)}
    counted = sum(torch.bincount(s["mask"].flatten(), minlength=256)[:3] for s in samples)
    assert counted.tolist() == np.bincount(mask.flatten(), minlength=3).tolist()
    for i, sample in enumerate(samples):
        known = sample["mask"] < 3
        assert torch.equal(sample["inputs"][0][known], (sample["mask"] * 100)[known].byte())
        assert np.array_equal(data.load(i).transpose(2, 0, 1), sample["inputs"])
        if min(shape) >= 4:  # moved back, not filled up: blue is the row
            first = min(i // columns * 4, shape[0] - 4)
            assert sample["inputs"][2, :, 0].tolist() == list(range(first, first + 4))


def test_a_mask_without_header_is_one_sample(tmp_path):
    images, masks = pairs(tmp_path, [np.zeros((4, 8)), np.ones((4, 8))])
    masks[0].write_bytes(b"nothing")
    data = SegmentationDataset(images, masks, ABC, tile=4, training=True)
    assert len(data) == 3 and data[0]["unreadable"] and data[0]["inputs"].shape == (3, 4, 4)


# pairs of files


def test_pairs_of_files(tmp_path):
    for name in ("b/x_img.png", "a_img.png", "a_other.png"):
        save(tmp_path / "images" / name, np.zeros((2, 2, 3), np.uint8))
    folders = tmp_path / "images", tmp_path / "masks"
    with pytest.raises(InputError, match=r"no folder .*masks"):
        find_pairs(*folders, "_img.png", "_mask.png")
    folders[1].mkdir()
    images, masks = find_pairs(*folders, "_img.png", "_mask.png")
    assert [str(p.relative_to(tmp_path)) for p in images] == ["images/a_img.png", "images/b/x_img.png"]
    assert [str(p.relative_to(tmp_path)) for p in masks] == ["masks/a_mask.png", "masks/b/x_mask.png"]
    (tmp_path / "list.txt").write_text("# some\nb/x\na_img.png\n")
    assert find_pairs(*folders, "_img.png", "_mask.png", tmp_path / "list.txt")[0] == images[::-1]
    with pytest.raises(InputError, match=r"no image below .* ends with '\.tif'; found \.png"):
        find_pairs(*folders, ".tif", ".png")
