"""Rasters: bands by name, values without data, and windows that are read alone."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from visadapt.datasets.files import UnreadableImage
from visadapt.datasets.raster import RasterSegDataset
from visadapt.datasets.raster_files import Header, Window, read_bands, read_header, read_mask
from visadapt.errors import InputError
from visadapt.registry import DATASETS

rasterio = pytest.importorskip("rasterio")
from scenes import write  # noqa: E402, it needs rasterio

NAMES = ("B2", "B3", "B4", "B8")
CLASSES = ["land", "water"]


def tif(path, values, names=(), **profile):
    """Values (H, W, C)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, np.moveaxis(values, -1, 0), names, **profile)


def bands(height=5, width=6, count=4, dtype=np.int16):
    """Band i holds 1000 i and the number of the pixel."""
    pixel = np.arange(height * width).reshape(height, width, 1)
    return (pixel + 1000 * np.arange(count)).astype(dtype)


def scene(folder, values=None, names=NAMES, mask=None, **profile):
    values = bands() if values is None else values
    tif(folder / "images" / "a.tif", values, names, **profile)
    mask = np.arange(values[..., 0].size).reshape(values.shape[:2]) % 2 if mask is None else mask
    tif(folder / "masks" / "a.tif", mask[..., None].astype(np.int16))
    return folder


def dataset(folder, **options):
    return RasterSegDataset(folder / "images", folder / "masks", CLASSES, **options)


# files


def test_header_and_bands_of_every_format(tmp_path, recwarn):
    values = bands()
    np.save(tmp_path / "a.npy", values)
    assert read_header(tif(tmp_path / "a.tif", values, NAMES, nodata=-9)) == Header((5, 6), 4, NAMES, -9.0)
    assert read_header(tmp_path / "a.npy") == Header((5, 6), 4)
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
        tif(tmp_path / "half.tif", values, NAMES[:2], transform=None)
    recwarn.clear()
    assert read_header(tmp_path / "half.tif").names is None
    for name in ("a.tif", "a.npy"):
        out = read_bands(tmp_path / name)
        assert out.dtype == np.int16 and np.array_equal(out, values)
        assert np.array_equal(read_bands(tmp_path / name, [3, 0], Window(3, 4, 9, 9)), values[3:, 4:, [3, 0]])
    assert not recwarn.list  # of rasterio, about coordinates that are not there

    picture = bands(count=3, dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    Image.fromarray(picture[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(picture[..., :2], mode="LA").save(tmp_path / "la.png")
    assert read_header(tmp_path / "a.png") == Header((5, 6), 3) and read_header(tmp_path / "grey.png").count == 1
    assert np.array_equal(read_bands(tmp_path / "a.png", [2, 0]), picture[..., [2, 0]])
    assert np.array_equal(read_bands(tmp_path / "grey.png", window=Window(1, 1, 2, 2)), picture[1:3, 1:3, :1])
    with pytest.raises(InputError, match="picture of mode LA") as caught:
        read_header(tmp_path / "la.png")
    assert not isinstance(caught.value, UnreadableImage)


def test_a_tif_is_read_as_a_mask(tmp_path):
    labels = np.array([[-1, 0, 1, 300]], np.int16)
    raw, size = read_mask(tif(tmp_path / "m.tif", labels[..., None]), window=Window(0, 2, 2, 2))
    assert size == (1, 4) and raw.tolist() == [[1, 300]]
    color = np.zeros((1, 4, 3), np.uint8)
    assert read_mask(tif(tmp_path / "c.tif", color), colored=True)[0].shape == (1, 4, 3)
    with pytest.raises(InputError, match=r"c\.tif has 3 bands, 1 needed; give colors"):
        read_mask(tmp_path / "c.tif")


def test_damaged_rasters_and_no_rasterio(tmp_path, monkeypatch):
    path = tif(tmp_path / "a.tif", bands(64, 64))
    path.write_bytes(path.read_bytes()[:3000])
    for name in ("a.tif", "none.tif"):
        with pytest.raises(UnreadableImage, match=f"{name} is missing, damaged or not a raster"):
            read_bands(tmp_path / name)
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(InputError, match=r"pip install 'visadapt\[geo\]'"):
        read_header(path)


# bands


def test_bands_of_the_file_are_the_default(tmp_path):
    data = dataset(scene(tmp_path))
    assert (data.bands, data.channels, data.classes) == (NAMES, 4, ("land", "water"))
    sample = data[0]
    assert sample["inputs"].dtype == torch.float32 and np.array_equal(sample["inputs"], bands().transpose(2, 0, 1))
    assert sample["mask"][0].tolist() == [0, 1] * 3
    scene(tmp_path, names=())
    data = dataset(tmp_path)
    assert (data.bands, data.channels) == (None, 4) and data[0]["inputs"].shape == (4, 5, 6)


def test_bands_are_found_by_name(tmp_path):
    wanted = ["B8", "B2"]
    values = bands().transpose(2, 0, 1)
    assert np.array_equal(dataset(scene(tmp_path), bands=wanted)[0]["inputs"], values[[3, 0]])
    data = dataset(scene(tmp_path, names=()), bands=wanted, file_bands=["B8", "B4", "B3", "B2"])
    assert np.array_equal(data[0]["inputs"], values[[0, 3]]) and data.bands == ("B8", "B2")


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (NAMES, dict(bands=["B8", "B11"]), r"a\.tif has no band B11: it has B2, B3, B4, B8, the model gets B8, B11"),
        (NAMES, dict(bands=["B11"], fill=0.0), "has no band B11"),
        ((), dict(bands=["B8"]), "does not name its 4 bands; give file_bands"),
        ((), dict(bands=["B8"], file_bands=["B8"]), "has 4 bands, but file_bands names 1"),
        (NAMES, dict(bands=["B8", "B8"]), "named twice in B8, B8"),
        (
            NAMES,
            dict(bands=["B8", "B2"], transform=[dict(type="ColorJitter")]),
            "ColorJitter does not work on .* 2 bands",
        ),
    ],
)
def test_band_mistakes_are_told_at_once(tmp_path, names, options, message):
    with pytest.raises(InputError, match=message):
        dataset(scene(tmp_path, names=names), **options)


def test_a_later_file_with_other_bands(tmp_path):
    scene(tmp_path)
    for name, names in (("b", NAMES[::-1]), ("c", (*NAMES[:3], "B11"))):
        tif(tmp_path / "images" / f"{name}.tif", bands(), names)
        tif(tmp_path / "masks" / f"{name}.tif", np.zeros((5, 6, 1), np.int16))
    data = dataset(tmp_path, training=True)
    assert np.array_equal(data[1]["inputs"], bands().transpose(2, 0, 1)[::-1])
    with pytest.raises(InputError, match=r"c\.tif has no band B8"):
        data[2]
    tif(tmp_path / "images" / "a.tif", bands(), ())
    tif(tmp_path / "images" / "c.tif", bands(count=5), ())
    with pytest.raises(InputError, match=r"c\.tif has 5 bands, 4 are needed as in the first file"):
        dataset(tmp_path)[2]


def test_missing_bands_are_filled_on_demand(tmp_path):
    wanted = ["B3", "B11"]
    data = dataset(scene(tmp_path), bands=wanted, fill=7)
    assert data[0]["inputs"][1].unique().tolist() == [7] and (data[0]["mask"] < 255).all()
    assert np.array_equal(data[0]["inputs"][0], bands()[..., 1])
    eight = dataset(scene(tmp_path, bands(count=2, dtype=np.uint8), NAMES[:2]), bands=wanted, fill=7.0)
    assert eight[0]["inputs"].dtype == torch.uint8
    for fill in (-1, 0.5):
        with pytest.raises(InputError, match=f"fill={fill} is no value of uint8 images"):
            dataset(tmp_path, bands=wanted, fill=fill)[0]


# values without data


@pytest.mark.parametrize(
    ("profile", "options"), [(dict(nodata=-5), {}), ({}, dict(nodata=-5)), (dict(nodata=3), dict(nodata=-5))]
)
def test_nodata_is_ignored(tmp_path, profile, options):
    values = bands()
    values[0] = -5
    values[1, 0, 2] = -5  # one band of four
    data = dataset(scene(tmp_path, values, **profile), **options)
    inputs, mask = data[0]["inputs"], data[0]["mask"]
    assert (mask[0] == 255).all() and (mask[1:] < 255).all()
    assert not inputs[:, 0].any() and inputs[2, 1, 0] == 0
    rest = values.copy()
    rest[rest == -5] = 0
    assert np.array_equal(inputs, rest.transpose(2, 0, 1))


def test_what_is_not_finite_is_ignored(tmp_path):
    values = bands(dtype=np.float32)
    values[0, 0, 1], values[2, 3, 0] = np.nan, np.inf
    sample = dataset(scene(tmp_path, values))[0]
    assert sample["valid"] and sample["inputs"].isfinite().all() and sample["inputs"][0, 2, 3] == 0
    assert [tuple(p) for p in (sample["mask"] == 255).nonzero().tolist()] == [(0, 0), (2, 3)]
    # only the bands that the model gets count
    sample = dataset(tmp_path, bands=["B4"])[0]
    assert (sample["mask"] < 255).all()


# windows, formats, transforms


def test_windows_of_a_raster(tmp_path, monkeypatch):
    values = bands(5, 6)
    values[0, 0] = -5
    whole = dataset(scene(tmp_path, values, nodata=-5))[0]
    data = dataset(tmp_path, tile=4)
    assert len(data) == 4 and data[3]["inputs"].shape == (4, 4, 4)
    assert torch.equal(data[3]["inputs"], whole["inputs"][:, 1:, 2:])
    counted = sum(torch.bincount(s["mask"].flatten(), minlength=3)[:2] for s in (data[i] for i in range(4)))
    assert counted.sum() == 5 * 6 - 1  # but for the pixel without data
    read, real = [], rasterio.DatasetReader.read
    monkeypatch.setattr(
        rasterio.DatasetReader, "read", lambda *a, window: read.append(window) or real(*a, window=window)
    )
    data[3]
    assert read == [((1, 5), (2, 6))] * 2  # of image and mask, and nothing else


def test_arrays_and_pictures(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    np.save(tmp_path / "images" / "a_x.npy", bands().astype(np.int64))
    np.save(tmp_path / "masks" / "a_y.npy", np.full((5, 6), 9))
    names = dict(image_suffix="_x.npy", mask_suffix="_y.npy", file_bands=NAMES)
    data = dataset(tmp_path, bands=["B4"], label_map={9: 1}, transform=[dict(type="VerticalFlip", p=1)], **names)
    assert np.array_equal(data[0]["inputs"][0], bands()[::-1, :, 2]) and (data[0]["mask"] == 1).all()

    Image.fromarray(bands(count=3, dtype=np.uint8)).save(tmp_path / "images" / "b.jpg")
    Image.fromarray(np.full((5, 6, 3), 50, np.uint8)).save(tmp_path / "masks" / "b.png")
    options = dict(type="RasterSegDataset", image_dir=tmp_path / "images", mask_dir=tmp_path / "masks", classes=CLASSES)
    options |= dict(image_suffix=".jpg", mask_suffix=".png", colors=["#000000", "#323232"])
    data = DATASETS.build(options)
    assert data.channels == 3 and (data[0]["mask"] == 1).all() and data[0]["inputs"].dtype == torch.uint8


def test_pixel_transforms_are_refused_on_raw_values(tmp_path):
    data = dataset(scene(tmp_path), transform=[dict(type="RandomGamma", p=1)])
    with pytest.raises(InputError, match="RandomGamma works on 8-bit images only"):
        data[0]


def test_a_damaged_first_file_is_skipped(tmp_path):
    scene(tmp_path)
    for folder in ("images", "masks"):
        (tmp_path / folder / "b.tif").write_bytes((tmp_path / folder / "a.tif").read_bytes())
    (tmp_path / "images" / "a.tif").write_bytes(b"nothing")
    data = dataset(tmp_path, training=True)
    assert data.bands == NAMES and data[0]["unreadable"].endswith("a.tif") and data[0]["valid"]
    (tmp_path / "images" / "b.tif").write_bytes(b"nothing")
    with pytest.raises(UnreadableImage, match=r"b\.tif is missing, damaged"):
        dataset(tmp_path)
