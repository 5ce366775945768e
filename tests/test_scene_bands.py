"""Scenes are read as the data set of the training reads its files: bands, values without data, empty pixels."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from visadapt.datasets.files import UnreadableImage
from visadapt.datasets.raster import RasterSegDataset

rasterio = pytest.importorskip("rasterio")
from scenes import noise, predict, write  # noqa: E402

from visadapt.predict._geotiff import Scene  # noqa: E402
from visadapt.predict.bands import Bands, UnsuitableImage  # noqa: E402

NAMES = ["B2", "B3", "B4", "B8"]


OPTIONS = (
    dict(),
    dict(bands=["B8", "B3"]),
    dict(bands=["B4"]),  # GDAL calls the last of four 8-bit bands alpha
    dict(bands=["B3"], file_bands=NAMES),
    dict(bands=["B4", "B11", "B2"], file_bands=NAMES, fill=7),
)


@pytest.fixture
def run(tmp_path):
    return partial(predict, tmp_path)


def holed(dtype, void, height=40, width=50):
    """Four bands with `void` in all of them, in one, and in two; a NaN in types that have one."""
    values = noise(4, height, width).astype(dtype)
    values[:, 3:9, 4:30] = void
    values[1, 12:20, 6:16] = void
    values[[0, 3], 30:33] = void
    if np.dtype(dtype).kind == "f":
        values[2, 25, 7], values[0, 26, 8] = np.nan, np.inf
    return values


def in_training(folder: Path, **options):
    """Image (C, H, W) and empty pixels (H, W) of the one file in a folder, as a model is trained on it."""
    (folder / "masks").mkdir(exist_ok=True)
    for path in (folder / "images").iterdir():
        with rasterio.open(path) as raster:
            write(folder / "masks" / path.name, np.zeros((1, *raster.shape), np.uint8))
    data = RasterSegDataset(folder / "images", folder / "masks", ["land", "water"], **options)
    sample = data[0]
    return data, sample["inputs"].numpy(), (sample["mask"] == 255).numpy()


@pytest.mark.parametrize(
    "dtype, void",
    [
        *(("uint8", 0), ("uint16", 0), ("int16", 0), ("int16", -9999), ("int32", 2**31 - 1)),
        *(("float32", -3.4028235e38), ("float64", -1.7e308), ("float32", 0)),
    ],
)
@pytest.mark.parametrize("told", ["by the file", "by the user", "by both"])
def test_one_rule_for_training_and_scenes(tmp_path, dtype, void, told):
    given = {} if told == "by the file" else {"nodata": void}
    values, in_file = holed(dtype, void), {"by the file": void, "by the user": None, "by both": 1}[told]
    for number, options in enumerate(OPTIONS):
        folder = tmp_path / str(number) / "images"
        folder.mkdir(parents=True)
        source = write(folder / "a.tif", values, [] if "file_bands" in options else NAMES, nodata=in_file)
        data, image, empty = in_training(folder.parent, **options, **given)
        reading = Bands(data.channels, data.bands, data.file_bands, data.nodata, data.fill)
        found, nothing = Scene(source, reading).tile(0, 0, 50)
        found, nothing = found[:, :40], nothing[:40]
        assert found.dtype == image.dtype and np.array_equal(found, image)
        assert np.array_equal(nothing, empty) and empty.any() and not empty.all()


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_a_value_without_data_in_one_band_is_0_and_its_pixel_has_a_class(run, tmp_path, dtype):
    values = noise(3, 64, 64).astype(dtype)
    values[:, :10] = -9999
    values[2, 20:40] = -9999
    seen = []
    _, mask = run(lambda x: seen.append(x) or x, write(tmp_path / "a.tif", values), nodata=-9999)
    assert (mask[:10] == 255).all()
    values[values == -9999] = 0
    assert np.array_equal(seen[0][0].numpy(), values) and np.array_equal(mask[10:], values.argmax(0)[10:])


def test_mask_of_the_file_empties_pixels_beside_its_nodata_value(run, tmp_path):
    values = noise(3, 64, 70)
    values[:, 40:50] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        source = write(tmp_path / "a.tif", values, nodata=0)
        with rasterio.open(source, "r+") as raster:
            raster.write_mask(np.arange(64)[:, None] >= np.full(70, 12))
    _, mask = run(source=source)
    wanted = values.argmax(0)
    wanted[:12] = wanted[40:50] = 255
    assert np.array_equal(mask, wanted)


@pytest.mark.parametrize(
    "names, options, places, taken",
    [
        (NAMES, dict(names=["B8", "B2"]), [3, 0], None),
        (NAMES, dict(names=["B8", "B2"], file_bands=NAMES[::-1]), [3, 0], None),  # the file's own names are surer
        (["B8", "B8", "B2"], dict(names=["B2", "B8"]), [2, 0], None),
        (NAMES, dict(names=["B11", "B2"], fill=0), [None, 0], None),
        ([None] * 2, dict(names=["B8", "B2"]), [0, 1], ["B8", "B2"]),
        ([None] * 4, dict(names=["B8", "B2"], file_bands=NAMES), [3, 0], NAMES),
        ([None] * 2, dict(names=["B8", "B2"], file_bands=NAMES), [0, 1], ["B8", "B2"]),
        ([None] * 2, dict(names=["B8", "B2"], file_bands=["B2", "B8"]), [1, 0], ["B2", "B8"]),
        ([None] * 4, dict(names=["B8", "B11"], file_bands=NAMES, fill=0), [3, None], NAMES),
        ([None] * 2, dict(names=None), [0, 1], None),
        (NAMES[:2], dict(names=None), [0, 1], None),
    ],
)
def test_places_of_bands(names, options, places, taken):
    assert Bands(2, **options).places("a.tif", names) == (places, taken)


def test_alpha_is_no_band_where_others_suffice():
    bands = Bands(2, ["B8", "B2"], NAMES)
    assert bands.places("a.tif", [None] * 5, alpha=[0]) == ([4, 1], NAMES)
    assert bands.places("a.tif", [None] * 4, alpha=[3]) == ([3, 0], NAMES)


@pytest.mark.parametrize(
    "names, options, message",
    [
        (NAMES, dict(names=["B8", "B5"]), r"has the bands B2, B3, B4, B8 and the model takes B8, B5; missing: B5"),
        (["VV", "VH"], dict(names=["B8", "B2"], file_bands=["B2", "B8"]), "has the bands VV, VH .* missing: B8, B2"),
        (NAMES, dict(names=["B5", "B6"], fill=0), "missing: B5, B6"),
        (["B2", None], dict(names=["B2", "B8"]), "has the bands B2, unnamed and"),
        ([None] * 3, dict(names=["B8", "B2"]), r"a.tif has 3 bands and the model takes 2 \(B8, B2\)"),
        ([None] * 3, dict(names=["B8", "B2"], file_bands=NAMES), r"takes 2 \(B8, B2\) of 4 \(B2, B3, B4, B8\)"),
        ([None] * 3, dict(names=None), "a.tif has 3 bands and the model takes 2$"),
    ],
)
def test_other_bands_are_refused(names, options, message):
    with pytest.raises(UnsuitableImage, match=message):
        Bands(2, **options).places("a.tif", names)


def test_the_report_says_which_bands_were_supposed(run, tmp_path):
    values = noise(3, 64, 64)
    report, mask = run(source=write(tmp_path / "bare.tif", values), bands=["B8", "B4", "B3"])
    assert report.lines()[1] == "the scene does not name its bands; taken as B8, B4, B3"
    assert np.array_equal(mask, values.argmax(0))
    report, mask = run(source=tmp_path / "bare.tif", bands=["B8", "B4", "B3"], file_bands=["B3", "B4", "B8"])
    assert report.lines()[1].endswith("taken as B3, B4, B8") and np.array_equal(mask, values[::-1].argmax(0))
    report, _ = run(source=write(tmp_path / "named.tif", values, ["B3", "B4", "B8"]), bands=["B8", "B4", "B3"])
    assert len(report.lines()) == 1


def test_a_band_that_scenes_do_not_have(run, tmp_path):
    values = noise(2, 64, 64)
    source = write(tmp_path / "a.tif", values, ["B2", "B8"])
    options = dict(source=source, bands=["B8", "B11", "B2"])
    _, mask = run(**options, fill=120)
    whole = np.stack([values[1], np.full((64, 64), 120, np.uint8), values[0]])
    assert np.array_equal(mask, whole.argmax(0)) and (mask == 1).any()
    with pytest.raises(UnsuitableImage, match="fill=-1 is no value of uint8 images"):
        run(pytest.fail, **options, fill=-1)


def test_errors_tell_damaged_files_from_unsuitable_ones(run, tmp_path):
    (tmp_path / "cut.tif").write_bytes(b"II*")
    with pytest.raises(UnreadableImage):
        run(pytest.fail, tmp_path / "cut.tif")
    with pytest.raises(UnsuitableImage, match="complex numbers"):
        run(pytest.fail, write(tmp_path / "c.tif", noise(3, 20, 20).astype(np.complex64)))


def test_other_values_without_data_start_anew(run, tmp_path, capsys):
    source = write(tmp_path / "a.tif", noise(3, 64, 200))

    def fails(x):
        if calls.append(1) or len(calls) > 1:
            raise KeyError
        return x.float()

    calls = []
    options = dict(source=source, batch=1, overlap=0)
    with pytest.raises(KeyError):
        run(fails, **options)
    report, _ = run(**options, nodata=5)
    assert report.resumed == 0 and "of other settings (nodata); starting anew" in capsys.readouterr().err
    assert report.nodata == 0
