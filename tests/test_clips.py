"""Decoding of video files and folders of frames, the frames that are taken, views, augmentation and batches."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from visadapt.datasets import video_files
from visadapt.datasets.base import Draw
from visadapt.datasets.clips import ClipDataset, collate_clips
from visadapt.datasets.files import UnreadableImage
from visadapt.datasets.video_files import open_clip
from visadapt.errors import InputError
from visadapt.hooks.files import dataset_card
from visadapt.transforms.albu import Albu
from visadapt.transforms.clips import for_each_frame, three_crops

STEP = 12
"""Frame i of a test video has the grey value STEP * i."""


def pictures(count: int, height: int = 24, width: int = 32) -> list[np.ndarray]:
    return [np.full((height, width, 3), STEP * i, np.uint8) for i in range(count)]


def folder(path: Path, count: int = 16, height: int = 24, width: int = 32) -> Path:
    path.mkdir(parents=True)
    for i, frame in enumerate(pictures(count, height, width), 1):
        cv2.imwrite(str(path / f"img_{i}.png"), frame)
    return path


def video(path: Path, count: int = 16, height: int = 24, width: int = 32, code: str = "mp4v") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), 10, (width, height))
    for frame in pictures(count, height, width):
        writer.write(frame)
    writer.release()
    return path


def numbers(frames) -> list[int]:
    """Which frames these are, (N, H, W, 3) or (N, 3, H, W)."""
    means = torch.as_tensor(frames).float().flatten(1).mean(1)
    return (means / STEP).round().int().tolist()


def dataset(path: Path, **options) -> ClipDataset:
    return ClipDataset([path], [0], ["a", "b"], **options)


# decoding


@pytest.fixture(params=["av", "cv2"])
def decoder(request):
    if request.param == "av":
        pytest.importorskip("av", reason="PyAV is not installed")
    return request.param


@pytest.mark.parametrize(("suffix", "code"), [(".mp4", "mp4v"), (".avi", "MJPG"), (".mkv", "mp4v"), (".webm", "VP80")])
def test_any_frames_are_read_in_any_order(tmp_path, decoder, suffix, code):
    with open_clip(video(tmp_path / f"a{suffix}", code=code), decoder) as clip:
        frames = clip.frames([15, 3, 3, 0])
        assert len(clip) == 16 and frames.shape == (4, 24, 32, 3) and frames.dtype == np.uint8
        assert numbers(frames) == [15, 3, 3, 0]
        assert numbers(clip.frames(range(16))) == [*range(16)]


def test_colours_are_rgb(tmp_path, decoder):
    writer = cv2.VideoWriter(str(tmp_path / "a.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (32, 24))
    writer.write(np.full((24, 32, 3), (10, 30, 240), np.uint8))  # BGR
    writer.release()
    with open_clip(tmp_path / "a.mp4", decoder) as clip:
        assert np.abs(clip.frames([0]).mean((0, 1, 2)) - (240, 30, 10)).max() < 12


def encode(path: Path, frames: list[np.ndarray], codec: str = "mpeg4", pixels: str = "yuv420p", **options: str) -> Path:
    """Write a video as OpenCV cannot: `g` is the distance of key frames, `bf` the number of two-way predicted ones."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pixels
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_frames_are_found_across_key_frames_and_reordered_packets(tmp_path, suffix):
    """Two-way prediction stores frames in another order than they are shown in; short groups make many seeks."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 32, 3), dtype=np.uint8)
    path = encode(tmp_path / f"a{suffix}", [*noise], g="4", bf="2")
    capture = cv2.VideoCapture(str(path))
    shown = np.stack([capture.read()[1][..., ::-1] for _ in range(20)])
    with open_clip(path, "av") as clip:
        assert len(clip) == 20
        for taken in ([19], [0, 9, 18], [17, 5, 6, 5], [*range(20)]):
            assert np.abs(clip.frames(taken).astype(int) - shown[taken]).max() <= 2


def test_frames_of_av1_are_found(tmp_path, monkeypatch):
    """Its decoder does not take back what it was first told to pass over."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    if "libsvtav1" not in av.codecs_available:
        pytest.skip("PyAV comes without an encoder of AV1")
    monkeypatch.setenv("SVT_LOG", "1")
    path = encode(tmp_path / "a.mp4", pictures(21, 96, 128), "libsvtav1", preset="10")
    for taken in ([19], [0, 9, 18], [17, 5, 6, 5]):
        with open_clip(path, "av") as clip:
            assert numbers(clip.frames(taken)) == taken


def test_few_frames_are_decoded_of_a_long_video(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", pictures(21), g="12", bf="0", sc_threshold="1000000000")
    with open_clip(path, "av") as clip:
        assert len(clip._keys) == 2
        converted, decoded, to_array, frames = [], [], clip._array, clip._frames
        monkeypatch.setattr(clip, "_array", lambda frame: converted.append(frame) or to_array(frame))
        monkeypatch.setattr(clip, "_frames", lambda wanted: (decoded.append(f) or f for f in frames(wanted)))
        clip.frames([14, 16])
    assert len(converted) == 2 and len(decoded) == 5  # from frame 12 to frame 16


def test_length_is_counted_where_the_header_lies(tmp_path, decoder):
    path = video(tmp_path / "a.avi", 16, code="MJPG")
    data = bytearray(path.read_bytes())
    at = data.index(b"strh") + 40
    assert data[at : at + 4] == (16).to_bytes(4, "little")
    data[at : at + 4] = (999).to_bytes(4, "little")
    path.write_bytes(data)
    assert cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT) == 999
    with open_clip(path, decoder) as clip:
        assert len(clip) == 16 and numbers(clip.frames([0, 15])) == [0, 15]


def test_what_is_left_of_a_cut_file_is_used(tmp_path, decoder):
    path = video(tmp_path / "a.mkv", 21, 96, 128)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with open_clip(path, decoder) as clip:
        assert 4 < len(clip) < 20
        assert numbers(clip.frames([len(clip) - 2])) == [len(clip) - 2]


def test_damaged_files_are_unreadable(tmp_path, decoder, capfd):
    path = video(tmp_path / "a.mp4")
    for data in (path.read_bytes()[:300], b"", b"no video at all" * 50):
        path.write_bytes(data)
        with pytest.raises(UnreadableImage, match=r"a\.mp4 is damaged"):
            open_clip(path, decoder)
    with pytest.raises(UnreadableImage, match="no such file"):
        open_clip(tmp_path / "b.mp4", decoder)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".avi", ".mkv"])
def test_files_with_wrong_bytes_give_frames_or_are_unreadable(tmp_path, suffix):
    pytest.importorskip("av", reason="PyAV is not installed")
    whole, rng = video(tmp_path / f"whole{suffix}").read_bytes(), np.random.default_rng(0)
    path, seen = tmp_path / f"a{suffix}", set()
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 20):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        try:
            with open_clip(path, "av") as clip:
                seen.add(clip.frames([0, len(clip) - 1]).shape[0])
        except UnreadableImage as error:
            assert str(path) in str(error)
            seen.add("unreadable")
    assert seen == {2, "unreadable"}


def test_titles_of_any_encoding_and_unknown_codecs(tmp_path):
    path = video(tmp_path / "a.mkv")
    data = path.read_bytes()
    at = data.index(b"Lavf")  # the name of the writer
    path.write_bytes(data[:at] + b"\xe9" + data[at + 1 :])
    with open_clip(path, "av") as clip:
        assert numbers(clip.frames([3])) == [3]
    path.write_bytes(data.replace(b"V_MPEG4", b"V_OTHER"))
    with pytest.raises(UnreadableImage, match=r"a\.mkv holds no video of a known codec"):
        open_clip(path, "av")


def test_the_picture_on_the_cover_is_no_video(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        cover, film = out.add_stream("mjpeg", rate=1), out.add_stream("mpeg4", rate=10)
        cover.height, cover.width, cover.pix_fmt = 24, 32, "yuvj420p"
        film.height, film.width, film.pix_fmt = 48, 64, "yuv420p"
        for stream, shown in ((cover, pictures(1)), (film, pictures(16, 48, 64))):
            for frame in shown:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            out.mux(stream.encode())
    with open_clip(tmp_path / "a.mkv", "av") as clip:
        assert len(clip) == 16 and numbers(clip.frames([3])) == [3]


def test_frames_that_cannot_be_gone_to_are_unreadable(tmp_path, monkeypatch):
    av = pytest.importorskip("av", reason="PyAV is not installed")

    def seek(*_, **__):
        raise av.error.PermissionError(1, "Operation not permitted")

    with open_clip(video(tmp_path / "a.mp4"), "av") as clip:
        monkeypatch.setattr(clip, "_container", SimpleNamespace(seek=seek, close=clip._container.close))
        with pytest.raises(UnreadableImage, match=r"a\.mp4: frame 3 of 16 cannot be decoded"):
            clip.frames([3])


def test_frames_of_two_sizes_are_unreadable(tmp_path):
    path = folder(tmp_path / "a")
    cv2.imwrite(str(path / "img_5.png"), pictures(1, 9, 9)[0])
    with open_clip(path) as clip:
        assert numbers(clip.frames([3, 5])) == [3, 5]
        with pytest.raises(UnreadableImage, match=r"a has frames of different size: \(9, 9\), \(24, 32\)"):
            clip.frames([3, 4])


def test_a_frame_that_does_not_decode_is_unreadable(tmp_path):
    path = folder(tmp_path / "a")
    (path / "img_5.png").write_bytes(b"hole")
    with open_clip(path) as clip:
        assert numbers(clip.frames([3, 5])) == [3, 5]
        with pytest.raises(UnreadableImage, match=r"img_5\.png"):
            clip.frames([3, 4])
    path = encode(tmp_path / "b.mov", pictures(16), "png", "rgb24")
    data = path.read_bytes()
    start = [m.start() for m in re.finditer(b"\x89PNG", data)][4]
    path.write_bytes(data[:start] + bytes(16) + data[start + 16 :])
    with open_clip(path, "av") as clip:
        assert len(clip) == 16 and numbers(clip.frames([3, 5])) == [3, 5]
        with pytest.raises(UnreadableImage, match=r"b\.mov: frame 4 of 16 cannot be decoded"):
            clip.frames([3, 4])


def test_videos_of_turned_cameras_are_turned(tmp_path, decoder):
    writer = cv2.VideoWriter(str(tmp_path / "a.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (32, 16))
    writer.write(np.linspace(0, 250, 32).astype(np.uint8)[None, :, None].repeat(16, 0).repeat(3, 2))  # dark at the left
    writer.release()
    data, one = (tmp_path / "a.mp4").read_bytes(), 1 << 16
    upright, turned = (struct.pack(">9i", *m, 0, 0, 1 << 30) for m in ((one, 0, 0, 0, one, 0), (0, one, 0, -one, 0, 0)))
    at = data.index(upright, data.index(b"tkhd"))
    (tmp_path / "b.mp4").write_bytes(data[:at] + turned + data[at + len(turned) :])
    with open_clip(tmp_path / "b.mp4", decoder) as clip:
        frame = clip.frames([0])[0]
    assert frame.shape == (32, 16, 3) and frame[:8].mean() < 50 and frame[-8:].mean() > 200  # left is now above


def test_frames_of_a_folder_are_in_natural_order(tmp_path):
    path = folder(tmp_path / "a", 12)
    (path / "notes.txt").write_text("no frame")
    with open_clip(path) as clip:
        assert len(clip) == 12 and numbers(clip.frames([1, 9, 10])) == [1, 9, 10]
    (tmp_path / "b").mkdir()
    with pytest.raises(UnreadableImage, match="holds no frames"):
        open_clip(tmp_path / "b")
    cv2.imwrite(str(path / "img_13.png"), np.zeros((8, 8, 3), np.uint8))
    with open_clip(path) as clip, pytest.raises(InputError, match=r"different size: \(8, 8\), \(24, 32\)"):
        clip.frames([0, 12])


def test_decoders_are_chosen(tmp_path, monkeypatch):
    path = video(tmp_path / "a.mp4")
    with pytest.raises(InputError, match="unknown decoder 'decord'; it is one of: auto, av, cv2"):
        open_clip(path, "decord")
    with pytest.raises(InputError, match=r"'\.gif' are not read"):
        open_clip(tmp_path / "a.gif")
    monkeypatch.setattr(video_files, "find_spec", lambda name: None)
    with open_clip(path) as clip:
        assert isinstance(clip, video_files.CvVideo)
    with pytest.raises(InputError, match=r"pip install 'visadapt\[video\]'"):
        dataset(path, decoder="av")


# which frames are taken


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        (dict(num_frames=4), [2, 6, 10, 14]),
        (dict(num_frames=4, clips=2), [1, 5, 9, 13, 3, 7, 11, 15]),
        (dict(num_frames=3, sampling="dense", stride=2), [6, 8, 10]),
        (dict(num_frames=3, sampling="dense", stride=2, clips=3), [2, 4, 6, 6, 8, 10, 10, 12, 14]),
        (dict(num_frames=16), [*range(16)]),
        (dict(num_frames=18), [*range(16), 15, 15]),
        (dict(num_frames=4, sampling="dense", stride=7), [0, 7, 14, 15]),
    ],
)
def test_frames_in_evaluation(tmp_path, options, taken):
    data = dataset(folder(tmp_path / "a"), **options)
    assert numbers(data[0]["inputs"]) == taken == numbers(data[Draw(5, 0)]["inputs"])


def test_frames_in_training_are_drawn_from_seed_epoch_and_index(tmp_path):
    data = ClipDataset([folder(tmp_path / "a"), tmp_path / "a"], [0, 0], ["a"], num_frames=4, training=True)
    drawn = {(e, i): numbers(data[Draw(e, i)]["inputs"]) for e in range(12) for i in (1, 0)}
    assert all(4 * s <= n < 4 * s + 4 for taken in drawn.values() for s, n in enumerate(taken))
    assert {n for taken in drawn.values() for n in taken} == set(range(16))
    again = ClipDataset([tmp_path / "a"] * 2, [0, 0], ["a"], num_frames=4, training=True)
    assert all(numbers(again[Draw(*draw)]["inputs"]) == taken for draw, taken in drawn.items())
    assert drawn[0, 0] != drawn[0, 1] or drawn[1, 0] != drawn[1, 1]
    assert numbers(data[1]["inputs"]) == numbers(data[-1]["inputs"]) == numbers(data.read(1)) == drawn[0, 1]


def test_dense_clips_start_anywhere(tmp_path):
    data = dataset(folder(tmp_path / "a"), num_frames=3, sampling="dense", stride=6, training=True)
    taken = [numbers(data[Draw(e, 0)]["inputs"]) for e in range(40)]
    assert {t[0] for t in taken} == {0, 1, 2, 3} and all(np.diff(t).tolist() == [6, 6] for t in taken)


def test_short_clips_are_refused_on_request(tmp_path):
    data = dataset(folder(tmp_path / "a", 5), num_frames=3, sampling="dense", stride=4, short="refuse")
    with pytest.raises(InputError, match=r"/a has 5 frames, 9 are needed for num_frames=3 with stride=4"):
        data[0]


# views and augmentation


def test_three_crops_are_cut_along_the_longer_side(tmp_path):
    wide = np.broadcast_to(np.arange(10, dtype=np.uint8)[:, None], (1, 4, 10, 1))
    frames = np.concatenate([wide + 10 * i for i in range(4)])  # two views of two frames
    out = three_crops(frames, 2)
    assert out.shape == (12, 4, 4, 1)
    assert out[:, 0, 0, 0].tolist() == [0, 10, 3, 13, 6, 16, 20, 30, 23, 33, 26, 36]
    assert np.array_equal(three_crops(frames.transpose(0, 2, 1, 3), 2), out.transpose(0, 2, 1, 3))


def test_views_are_clips_times_crops(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    ramp = np.linspace(0, 250, 48).astype(np.uint8)[None, :, None].repeat(24, 0).repeat(3, 2)
    for i in range(4):
        cv2.imwrite(str(path / f"{i}.png"), ramp)
    data = dataset(path, num_frames=2, clips=2, size=12, crops=3)
    views = data[0]["inputs"].unflatten(0, (6, 2))
    assert views.shape == (6, 2, 3, 12, 12)
    left, centre, right = (views[i].float().mean().item() for i in range(3))
    assert left < centre - 40 < right - 80 and torch.equal(views[:3], views[3:])
    one = dataset(path, num_frames=2, clips=2, size=12)[0]["inputs"]
    assert torch.equal(one, views[[1, 4]].flatten(0, 1))
    assert [e["type"] for e in dataset_card(data)["transforms"]] == ["SmallestMaxSize", "CenterCrop"]


def test_all_frames_of_a_clip_share_one_draw():
    frames = np.random.default_rng(0).integers(0, 256, (1, 24, 32, 3), dtype=np.uint8).repeat(3, 0)
    entries = [
        dict(type="RandomResizedCrop", size=(16, 16)),
        dict(type="HorizontalFlip"),
        dict(type="ColorJitter"),
        dict(type="Erasing", fill="random", p=0.5),
    ]
    transform, found = Albu(entries), set()
    for seed in range(10):
        out = for_each_frame(transform, frames, seed)
        assert out.shape == (3, 16, 16, 3) and (out == out[:1]).all()
        found.add(out.tobytes())
    assert len(found) == 10


def test_rand_augment_draws_from_the_seed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds of GPUs would stay changed"))
    transform = Albu([dict(type="RandAugment", m=7, n=4)])
    frames = np.random.default_rng(0).integers(0, 256, (1, 24, 32, 3), dtype=np.uint8).repeat(2, 0)
    before, found = torch.get_rng_state(), set()
    for seed in range(8):
        out = for_each_frame(transform, frames, seed)
        assert out.shape == frames.shape and out.dtype == np.uint8 and (out == out[:1]).all()
        assert np.array_equal(out, for_each_frame(transform, frames, seed))
        found.add(out.tobytes())
    assert len(found) > 6 and torch.equal(torch.get_rng_state(), before) and transform.is_random
    for wrong, message in (
        (dict(m=11), "m must be 0 to 10"),
        (dict(n=0), "n at least 1"),
        (dict(k=1), "no argument 'k'"),
    ):
        with pytest.raises(InputError, match=message):
            Albu([dict(type="RandAugment", **wrong)])


def test_flips_exchange_labels(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    half = np.zeros((8, 8, 3), np.uint8)
    half[:, :4] = 255
    for i in range(4):
        cv2.imwrite(str(path / f"{i}.png"), half)
    options = dict(num_frames=2, flip=0.5, flip_labels={0: "b", "b": 0}, training=True)
    data = ClipDataset([path] * 3, [0, 1, 2], "abc", **options)
    seen = set()
    for epoch in range(20):
        for index in range(3):
            sample = data[Draw(epoch, index)]
            left = sample["inputs"][:, :, 0, 0].flatten().tolist()
            assert len(set(left)) == 1
            flipped = left[0] == 0
            assert sample["label"] == ([1, 0, 2][index] if flipped else index)
            seen.add((index, flipped))
    assert len(seen) == 6 and data.labels == [0, 1, 2]


# samples and batches


def test_unreadable_clips(tmp_path):
    good, bad = folder(tmp_path / "good"), tmp_path / "bad.mp4"
    bad.write_bytes(b"nothing")
    options = dict(num_frames=2, size=8)
    sample = ClipDataset([bad, good], [1, 0], "ab", **options)[0]
    assert not sample["valid"] and sample["label"] == 1 and sample["unreadable"] == str(bad)
    assert sample["inputs"].shape == (2, 3, 8, 8) and not sample["inputs"].any()
    sample = ClipDataset([bad, good], [1, 0], "ab", num_frames=2, training=True)[0]
    assert sample["valid"] and sample["label"] == 0 and sample["path"] == str(good)
    with pytest.raises(UnreadableImage, match=r"bad\.mp4"):
        ClipDataset([bad, good], [1, 0], "ab", strict=True, **options)[0]


def test_batches(tmp_path):
    paths = [folder(tmp_path / "a"), video(tmp_path / "b.mp4")]
    data = ClipDataset(paths, [0, 1], "ab", num_frames=4, size=16)
    (batch,) = DataLoader(data, 2, collate_fn=collate_clips, num_workers=1)
    assert batch["inputs"].shape == (2, 4, 3, 16, 16) and batch["inputs"].dtype == torch.uint8
    assert batch["labels"].tolist() == [0, 1] and batch["valid"].all() and batch["index"].tolist() == [0, 1]
    assert numbers(batch["inputs"][1]) == [2, 6, 10, 14]
    mixed = ClipDataset([paths[0], folder(tmp_path / "c", 16, 30, 30)], [0, 1], "ab", num_frames=4)
    with pytest.raises(
        InputError, match=r"clips of a batch differ.*\(4, 3, 24, 32\).*\(4, 3, 30, 30\) \(frames, bands"
    ):
        collate_clips([mixed[0], mixed[1]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sampling="densely"), r"unknown sampling 'densely' \(did you mean 'dense'\?\)"),
        (dict(num_frames=0), "num_frames must be a whole number of at least 1, got 0"),
        (dict(stride=0), "stride must be"),
        (dict(stride=2), "stride is for sampling='dense'"),
        (dict(short="pad"), "short is 'repeat' or 'refuse'"),
        (dict(clips=0), "clips must be"),
        (dict(crops=2), "crops must be 1 or 3, got 2"),
        (dict(crops=3), "crops=3 needs size"),
        (dict(size=0), "size must be"),
        (dict(size=8, training=True), "are for evaluation"),
        (dict(clips=2, training=True), "are for evaluation"),
        (dict(flip=0.5), "for training alone"),
        (dict(flip=0.5, training=True, flip_labels={0: 1}), "but not back"),
        (dict(flip=0.5, training=True, flip_labels={1: 2, 2: 1}), "there are 2 classes"),
        (dict(flip_labels={"a": "d", "d": "a"}), "names the class 'd', there is none; it is one of: a, b"),
        (dict(transform=[dict(type="HorizontalFlip")], flip_labels={0: 1, 1: 0}), "HorizontalFlip mirrors clips"),
        (dict(transform=[dict(type="RandomRotate90")], flip_labels={0: 1, 1: 0}), "RandomRotate90 mirrors clips"),
        (dict(decoder="ffmpeg"), "unknown decoder"),
    ],
)
def test_options_are_checked(tmp_path, options, message):
    with pytest.raises(InputError, match=message) as error:
        dataset(folder(tmp_path / "a"), **options)
    assert "\n" not in str(error.value)
