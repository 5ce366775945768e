"""Class maps of whole scenes: going on after a kill, and what happens when memory or disk do not suffice."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import threading
from functools import partial

import pytest
import torch

from visadapt.errors import InputError

pytest.importorskip("rasterio")
from scenes import ABC, VALUES, noise, predict, scene_in, uneven, write

from visadapt.predict import _growing


@pytest.fixture
def scene(tmp_path):
    return scene_in(tmp_path)


@pytest.fixture
def run(tmp_path):
    return partial(predict, tmp_path)


# going on
class Stop(Exception):
    pass


def counted(limit=10**9):
    """A score that fails after so many tiles, and the tiles that it saw."""
    seen = []

    def score(x):
        if len(seen) >= limit:
            raise Stop
        seen.extend(x)
        return uneven(x)

    return score, seen


@pytest.mark.parametrize("overlap", [0, 0.25, 0.6])
@pytest.mark.parametrize("memory", [1 << 30, 300_000])
def test_goes_on_after_a_failure(run, tmp_path, capsys, overlap, memory):
    options = dict(overlap=overlap, memory=memory)
    report, whole = run(uneven, **options)
    (tmp_path / "mask.tif").write_bytes(b"old")
    with pytest.raises(Stop):
        run(counted(report.tiles * 3 // 4)[0], **options)
    journal = tmp_path / "mask.partial.jsonl"
    with open(journal, "a") as file:
        file.write('{"column": 0, "ro')  # cut off by a kill
    with pytest.raises(Stop):
        run(counted(1)[0], **options)
    assert [json.loads(line) for line in journal.read_text().splitlines()]
    assert (tmp_path / "mask.tif").read_bytes() == b"old"
    score, seen = counted()
    again, mask = run(score, **options)
    assert (mask == whole).all()
    assert 0 < len(seen) < report.tiles and 0.2 < again.resumed < 1
    assert capsys.readouterr().err.count("going on with") == 2


def test_goes_on_many_times(run, tmp_path):
    values = VALUES.copy()
    values[:, ::3] = 0
    source = write(tmp_path / "rows.tif", values, nodata=0)
    report, whole = run(uneven, source, tile=32)
    starts = 0
    while True:
        starts += 1
        assert starts < 10
        try:
            again, mask = run(counted(25)[0], source, tile=32)
            break
        except Stop:
            pass
    assert starts > 2
    assert (mask == whole).all()
    assert again.nodata == report.nodata == 1 / 3


@pytest.mark.parametrize(
    "other, said",
    [
        (dict(tile=48), "tile, overlap"),
        (dict(key="b"), "model"),
        (dict(overlap=0), "overlap"),
        (dict(classes=["a", *ABC[1:]]), "classes"),
    ],
)
def test_partial_file_of_other_settings(run, capsys, other, said):
    with pytest.raises(Stop):
        run(counted(9)[0])
    score, seen = counted()
    report, _ = run(score, **other)
    assert len(seen) == report.tiles and report.resumed == 0
    assert f"of other settings ({said}); starting anew" in capsys.readouterr().err


def test_changed_scene(run, scene, capsys):
    with pytest.raises(Stop):
        run(counted(9)[0])
    write(scene, noise(3, 150, 230, seed=1))
    score, seen = counted()
    run(score)
    assert len(seen) == 15
    assert "of other settings (scene); starting anew" in capsys.readouterr().err


def test_not_going_on(run):
    with pytest.raises(Stop):
        run(counted(9)[0])
    score, seen = counted()
    run(score, resume=False)
    assert len(seen) == 15


def test_goes_on_after_a_kill(run, tmp_path):
    _, whole = run(uneven)
    (tmp_path / "mask.tif").unlink()
    calls = []

    def score(x):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return uneven(x)

    process = multiprocessing.get_context("fork").Process(target=run, args=(score,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "mask.tif").exists()
    score, seen = counted()
    _, mask = run(score)
    assert 0 < len(seen) < 15 and (mask == whole).all()


def test_a_failure_leaves_no_thread_behind(run):
    with pytest.raises(Stop) as caught:
        run(counted(1)[0])
    assert caught.tb is not None  # and so are the frames of the run
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


# memory and disk
@pytest.mark.parametrize("fits, sizes", [(1, [5, 2, *[1] * 15]), (2, [5, *[2, 2, 1] * 3])])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_batch_is_halved(run, capsys, error, fits, sizes):
    _, whole = run(uneven)
    seen = []

    def score(x):
        seen.append(len(x))
        if len(x) > fits:
            raise error
        return uneven(x)

    report, mask = run(score, batch=5)
    assert (mask == whole).all()
    assert seen == sizes
    assert (report.batch, report.halvings) == (fits, 3 - fits)
    assert "going on with 2 tiles at once" in capsys.readouterr().err


def test_memory_for_no_tile(run):
    def score(x):
        raise torch.OutOfMemoryError

    with pytest.raises(InputError, match="one tile of 64 px; use a smaller tile"):
        run(score)
    with pytest.raises(RuntimeError, match="a bug"):
        run(lambda x: (_ for _ in ()).throw(RuntimeError("a bug")))


@pytest.fixture
def small_disk():
    """Makes files beyond a size impossible until the end of the test."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_space_for_the_mask(run, scene, tmp_path, small_disk):
    small_disk(30_000)
    with pytest.raises(InputError, match=r"no space left for .*mask.partial.tif: it takes 0.0 MB.* MB are free"):
        run(lambda x: pytest.fail("scored before the check"))
    assert not [*tmp_path.glob("mask*")]


def test_disk_that_takes_no_more(run, tmp_path, small_disk):
    _, whole = run(uneven)
    calls = []

    def score(x):
        calls.append(1)
        if len(calls) == 5:
            small_disk(1000)
        return uneven(x)

    with pytest.raises(InputError, match=r"cannot write .*mask.partial.tif: the disk did not take it"):
        run(score)
    small_disk(resource.RLIM_INFINITY)
    score, seen = counted()
    _, mask = run(score)
    assert len(seen) < 15 and (mask == whole).all()


def test_no_space_at_the_end(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(_growing, "copy", lambda *a, **k: (_ for _ in ()).throw(OSError("Write error at scanline 512")))
        with pytest.raises(InputError, match=r"Write error at scanline 512; it takes .*mask.partial.tif is complete"):
            run()
    report, mask = run(lambda x: pytest.fail("all was scored"))
    assert report.resumed == 1 and (mask == VALUES.argmax(0)).all()
