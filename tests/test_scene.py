"""Class maps of whole scenes: blending, the file, pixels without a class, checks."""

from __future__ import annotations

import json
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from visadapt.datasets.files import UnreadableImage
from visadapt.errors import InputError
from visadapt.predict.windows import Grid, RowBlend, ramp

rasterio = pytest.importorskip("rasterio")
from scenes import ABC, VALUES, WHERE, noise, predict, read, scene_in, uneven, write  # noqa: E402

from visadapt.benchmark.scene import mapped, measure_scene  # noqa: E402
from visadapt.predict.scene import predict_scene  # noqa: E402
from visadapt.predict.tiles import ahead, plan  # noqa: E402


@pytest.fixture
def scene(tmp_path):
    return scene_in(tmp_path)


@pytest.fixture
def run(tmp_path):
    return partial(predict, tmp_path)


def blended(values, score, tile, overlap):
    """Averaged scores (K, H, W) of a whole array, written down plainly."""
    _, height, width = values.shape
    missing = max(0, tile - height), max(0, tile - width)
    values = np.pad(values, ((0, 0), (0, missing[0]), (0, missing[1])), mode="reflect")
    shared = int(overlap * tile)
    edge = min(shared, tile // 2)
    weight = np.ones(tile)
    for i in range(edge):
        weight[i] = weight[tile - 1 - i] = np.sin(np.pi / 2 * (i + 0.5) / edge) ** 2

    def firsts(size):
        found = [0]
        while found[-1] + tile < size:
            found.append(found[-1] + tile - shared)
        return [(first, min(first, size - tile)) for first in found]

    total, weights = 0.0, np.zeros(values.shape[1:])
    for y, read_y in firsts(values.shape[1]):
        for x, read_x in firsts(values.shape[2]):
            seen = values[:, read_y : read_y + tile, read_x : read_x + tile]
            scores = score(torch.from_numpy(seen)[None])[0].double().numpy()[:, y - read_y :, x - read_x :]
            part = np.s_[:, y : y + tile, x : x + tile]
            weight_here = weight[: scores.shape[1], None] * weight[: scores.shape[2]]
            if np.isscalar(total):
                total = np.zeros((len(scores), *values.shape[1:]))
            total[part] += weight_here * scores
            weights[part[1:]] += weight_here
    return (total / weights)[:, :height, :width]


# the result
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("size", [(150, 230), (64, 64), (65, 129), (37, 200), (200, 41), (1, 1)])
def test_equals_blending_in_memory(run, tmp_path, size, overlap):
    values = noise(3, *size)
    _, mask = run(uneven, write(tmp_path / "odd.tif", values), overlap=overlap)
    wanted = blended(values, uneven, 64, overlap)
    second, first = np.sort(wanted, 0)[-2:]
    sure = first - second > 1e-5
    assert sure.mean() > 0.99
    assert (mask == wanted.argmax(0))[sure].all()


def test_odd_tiles(run, tmp_path):
    values = noise(3, 90, 101)
    _, mask = run(uneven, write(tmp_path / "odd.tif", values), tile=33, overlap=0.5)
    wanted = blended(values, uneven, 33, 0.5)
    second, first = np.sort(wanted, 0)[-2:]
    assert (mask == wanted.argmax(0))[first - second > 1e-5].all()


def test_seamless(run):
    """A score that looks at single pixels gives what it gives for the whole scene."""
    _, mask = run(lambda x: (x.float() - 100) ** 2)
    assert (mask == ((VALUES.astype(float) - 100) ** 2).argmax(0)).all()


def test_strips_of_columns(run):
    """A narrow budget cuts the scene into strips and changes nothing."""
    _, whole = run(uneven)
    grid, _ = plan(230, 150, 3, 3, 64, 0.25, 3, memory=350_000)
    assert grid.strips == 3
    report, mask = run(uneven, memory=350_000)
    assert (mask == whole).all()
    assert report.tiles > 5 * 3


def test_scene_smaller_than_a_tile_is_mirrored(run, tmp_path):
    values, seen = noise(3, 40, 50), []
    run(lambda x: seen.append(x) or x.float(), write(tmp_path / "small.tif", values))
    (tiles,) = seen
    assert tiles.dtype == torch.uint8
    assert (tiles[0].numpy() == np.pad(values, ((0, 0), (0, 24), (0, 14)), mode="reflect")).all()


def test_scene_that_fits_is_one_tile(run):
    report, _ = run(tile=None)
    assert (report.tile, report.tiles) == (256, 1)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
@pytest.mark.parametrize("bands", [1, 13])
def test_other_types(run, tmp_path, dtype, bands):
    values = noise(bands, 70, 80, dtype=dtype) * 40
    seen = []

    def score(x):
        seen.append(x)
        return torch.cat([x, -x[:, :1]], 1)

    names = [f"class {i}" for i in range(bands + 1)]
    _, mask = run(score, write(tmp_path / "t.tif", values), names, channels=bands)
    assert {x.dtype for x in seen} == {torch.float32}
    assert seen[0].shape[1] == bands
    assert (mask == values.argmax(0)).all()


# the file
def test_coordinates_names_and_colours(run, tmp_path):
    colors = [(0, 0, 200), (0, 150, 0), (200, 0, 0)]
    report, _ = run(colors=colors)
    with rasterio.open(tmp_path / "mask.tif") as mask:
        assert (mask.crs, mask.transform) == (WHERE["crs"], WHERE["transform"])
        assert (mask.dtypes, mask.nodata, mask.count) == (("uint8",), 255, 1)
        assert json.loads(mask.tags()["classes"]) == ABC
        assert [mask.colormap(1)[i][:3] for i in range(3)] == colors
        assert mask.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
    assert report.crs == "EPSG:32633"
    assert report.lines()[0].startswith(f"wrote {tmp_path / 'mask.tif'}: 230 x 150 pixels, 15 tiles of 64 px")
    assert not [*tmp_path.glob("*partial*")]


def test_many_classes(run, tmp_path):
    source = write(tmp_path / "grey.tif", noise(1, 70, 70))
    _, mask = run(
        lambda x: torch.arange(300)[:, None, None] * (x > 0).float(), source, [str(i) for i in range(300)], channels=1
    )
    assert mask.dtype == np.uint16
    assert (mask == 299).all()
    with rasterio.open(tmp_path / "mask.tif") as raster:
        assert raster.nodata == 65535


def test_no_coordinates(run, tmp_path):
    source = write(tmp_path / "plain.tif", noise(3, 70, 70), crs=None, transform=None)
    report, _ = run(source=source)
    with rasterio.open(tmp_path / "mask.tif") as mask:
        assert mask.crs is None and report.crs is None
    assert "no coordinate system" in report.lines()[1]


# pixels without a class
def test_nodata_of_unsigned_types(run, tmp_path):
    values = noise(3, 100, 100)
    values[:, 20:90, 30:40] = 0
    values[0, 5, 5] = 0  # dark in one band
    report, mask = run(source=write(tmp_path / "holes.tif", values, nodata=0))
    assert ((mask == 255) == (values == 0).all(0)).all()
    assert mask[5, 5] != 255
    assert report.nodata == pytest.approx(700 / 10_000)


@pytest.mark.parametrize("dtype, hole", [("float32", np.nan), ("float32", np.inf), ("float64", 1e200)])
def test_what_is_not_finite_has_no_class(run, tmp_path, dtype, hole):
    """In one band of three; what float32 cannot hold is not finite either."""
    values = noise(3, 100, 100).astype(dtype)
    values[1, 20:90, 30:40] = hole
    seen = []
    source = write(tmp_path / "holes.tif", values, nodata=hole if np.isnan(hole) else None)
    _, mask = run(lambda x: seen.append(x) or x, source)
    assert (mask[20:90, 30:40] == 255).all()
    assert (mask == 255).sum() == 700
    assert torch.cat(seen).isfinite().all() and torch.cat(seen).min() >= 0


def test_tiles_without_data_are_not_scored(run, tmp_path):
    values = noise(3, 64, 200)
    values[:, :, 64:] = 0
    scored = []
    run(lambda x: scored.append(len(x)) or x.float(), write(tmp_path / "half.tif", values, nodata=0), overlap=0)
    assert sum(scored) == 1


def test_scores_of_half_precision_behind_tiles_without_data(run, tmp_path):
    values = noise(3, 150, 230)
    values[:, :, :100] = 0
    source = write(tmp_path / "half.tif", values, nodata=0)
    _, mask = run(lambda x: (x.float() / 256).half(), source, overlap=0.6)
    assert (mask[:, :100] == 255).all()
    assert (mask[:, 100:] == values.argmax(0)[:, 100:]).all()


def test_alpha_band(run, tmp_path):
    """A band beyond those of the model is a mask; one that the model takes is data, whatever the file calls it."""
    values = noise(4, 70, 80)
    values[3] = 255
    values[3, :10] = 0
    source = write(tmp_path / "rgba.tif", values, photometric="RGB", alpha="YES")
    with rasterio.open(source) as raster:
        assert raster.colorinterp[3].name == "alpha"
    _, mask = run(source=source)
    assert (mask[:10] == 255).all() and (mask[10:] != 255).all()
    _, mask = run(source=source, channels=4, classes=[*ABC, "infrared"])
    assert (mask == values.argmax(0)).all()


def test_scores_that_are_not_finite(run):
    def score(x):
        return torch.where(x[:, :1] == 7, torch.nan, x.float())

    report, mask = run(score)
    assert ((mask == 255) == (VALUES[0] == 7)).all()
    assert report.unscored == (mask == 255).sum() > 0


@pytest.mark.parametrize("tiled", [True, False])
def test_damaged_block(run, tmp_path, tiled):
    layout = dict(tiled=True, blockxsize=48, blockysize=32) if tiled else dict(blockysize=10)
    source = write(tmp_path / "damaged.tif", VALUES, compress="deflate", interleave="pixel", **layout)
    with rasterio.open(source) as raster:
        place = "1_2" if tiled else "0_4"
        start = int(raster.get_tag_item(f"BLOCK_OFFSET_{place}", "TIFF", bidx=1))
    data = bytearray(source.read_bytes())
    data[start : start + 60] = b"\xff" * 60
    source.write_bytes(data)
    report, mask = run(source=source)
    x, y, w, h = block = (48, 64, 48, 32) if tiled else (0, 40, 230, 10)
    assert report.unreadable == [block]
    assert (mask[y : y + h, x : x + w] == 255).all()
    mask[y : y + h, x : x + w] = VALUES.argmax(0)[y : y + h, x : x + w]
    assert (mask == VALUES.argmax(0)).all()
    assert f"{w} x {h} at column {x}, row {y}" in report.lines()[-1]


def test_nothing_readable(run, scene, tmp_path):
    data = scene.read_bytes()
    with rasterio.open(scene) as raster:
        start = int(raster.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1))
    scene.write_bytes(data[: start + 10])
    with pytest.raises(UnreadableImage, match=r"scene\.tif is damaged"):
        run()
    assert not [*tmp_path.glob("mask*")]


# the plan
@pytest.mark.parametrize("classes", [2, 10, 150])
def test_plan_keeps_to_the_budget(classes):
    held = {}
    for width in (5_000, 10_000, 20_000, 100_000):
        grid, batch = plan(width, width, 4, classes, None, 0.25, None, 1 << 30)
        assert grid.columns()[0][0] == 0 and grid.columns()[-1][1] == width
        assert batch * grid.tile**2 * (1024 + 8 * (4 + classes)) <= 1 << 28
        held[width] = bytes_held(classes, grid)
        assert held[width] <= 1 << 29
    assert held[100_000] < 1.2 * held[20_000] < 1.2**3 * held[5_000]


def bytes_held(classes, grid):
    blend = RowBlend(classes, ramp(grid.tile, grid.shared), grid.shared, grid.columns()[0], 255)
    blend.add(0, 1, 1, torch.zeros(classes, grid.tile, grid.tile), torch.zeros(grid.tile, grid.tile) > 0)
    return sum(x.nbytes for x in (blend.window, blend.pending, blend.labels, blend.unscored))


@pytest.mark.parametrize("height", [700, 769, 900, 1200, 5000])
def test_plan_for_all_heights(height):
    grid, _ = plan(5000, height, 4, 150, 768, 0.25, None, 1 << 30)
    assert bytes_held(150, grid) <= 1 << 29


def test_plan_with_too_little():
    with pytest.raises(
        InputError, match=r"2 MB of memory are not enough for tiles of 512 px with 10 classes; allow 32"
    ):
        plan(5000, 5000, 4, 10, 512, 0.25, None, 2_000_000)


def test_every_tile_once_without_strips():
    jobs = [*Grid(230, 150, 64, 16).jobs(3, {})]
    assert sum(len(job.lefts) for job in jobs) == 3 * 5
    assert [job.until for job in jobs if job.last] == [48, 96, 150]


# checks before the first call of the model
@pytest.mark.parametrize(
    "out, message",
    [
        ("mask.png", "ends in .tif"),
        ("scene.tif", "would be overwritten"),
        ("a.tif/mask.tif", "cannot write .*a.tif/mask.partial.tif: (Not a directory|File exists)"),
        ("folder.tif", "it is a folder"),
    ],
)
def test_bad_places(scene, tmp_path, out, message):
    (tmp_path / "a.tif").write_bytes(b"")
    (tmp_path / "folder.tif").mkdir()
    with pytest.raises(InputError, match=message):
        predict_scene(scene, tmp_path / out, pytest.fail, ABC, channels=3)
    assert read(scene).shape == (150, 230)


def test_scene_with_the_name_of_the_partial_file(scene, tmp_path):
    source = scene.rename(tmp_path / "mask.partial.tif")
    with pytest.raises(InputError, match="would be overwritten"):
        predict_scene(source, tmp_path / "mask.tif", pytest.fail, ABC, channels=3)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(channels=4), r"scene.tif has 3 bands and the model takes 4"),
        (dict(channels=4, bands=["R", "G", "B", "NIR"]), r"has 3 bands and the model takes 4 \(R, G, B, NIR\)"),
        (dict(overlap=1), r"overlap must be in \[0, 1\), got 1"),
        (dict(tile=0), "tile must be 1 or more"),
        (dict(colors=[(0, 0, 0)]), "3 classes and 1 colours"),
        (dict(source=Path("nowhere.tif")), "nowhere.tif is missing, damaged or not a raster"),
        (dict(source=Path(__file__)), "test_scene.py is missing, damaged or not a raster"),
    ],
)
def test_refusals(run, options, message):
    with pytest.raises(InputError, match=message):
        run(pytest.fail, **options)


def test_bands_by_name(run, tmp_path):
    values = noise(4, 70, 70)
    source = write(tmp_path / "named.tif", values, ["B2", "B3", "B4", "B8"])
    _, mask = run(source=source, bands=["B8", "B4", "B2"])
    assert (mask == values[[3, 2, 0]].argmax(0)).all()
    with pytest.raises(InputError, match=r"has the bands B2, B3, B4, B8 and the model takes B8, B5, B2; missing: B5"):
        run(pytest.fail, source=source, bands=["B8", "B5", "B2"])


def test_scores_of_another_shape(run):
    with pytest.raises(InputError, match=r"gives scores \(3, 3, 32, 32\) for tiles; \(3, 3, 64, 64\) are needed"):
        run(lambda x: x[..., ::2, ::2].float())


def test_reads_ahead():
    started = {i: threading.Event() for i in range(3)}
    for item, result in ahead(lambda i: started[i].set() or i * i, range(3)):
        assert result == item**2
        assert item == 2 or started[item + 1].wait(5)


@pytest.mark.parametrize("model", ["conv", "vit"])
def test_benchmark(model):
    found = mapped(100, model, tile=64, threads=1)
    assert (found["tiles"], found["size"]) == (4, 100)
    assert found["peak_mib"] >= 0 and 0 < found["model_share"] < 1
    with pytest.raises(InputError, match="unknown model 'resnet'; it is one of: vit-s, vit, tiny, conv"):
        measure_scene(model="resnet")
