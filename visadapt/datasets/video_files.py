"""Reading single frames of video files and of folders of frames.

A clip is opened, says how many frames it has, and gives those that are asked for. Its length is counted, never taken
from the header: headers of cut files are wrong, and those of webm and mkv have none.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..errors import InputError, hint
from .files import PICTURES, UnreadableImage, read_image

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov")
DECODERS = ("auto", "av", "cv2")
SKIPPING = ("h264", "hevc", "mpeg4", "vp8", "vp9")
"""FFmpeg's decoders that may be told between packets which frames to pass over. That of AV1 listens at the first only,
and would then leave out frames that are wanted."""

# OpenCV's copy of FFmpeg writes complaints to stderr without the name of the file; the errors raised here carry it.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")


def open_clip(path: str | Path, decoder: str = "auto") -> FrameFolder | AvVideo | CvVideo:
    """Open a video file, or a folder of frames. Use it in a `with` block.

    Args:
        path: the file; or a folder with one picture per frame, in natural order of the names (2.jpg before 10.jpg).
        decoder: of video files: "av" (PyAV), "cv2" (OpenCV), or "auto": PyAV where it is installed.

    Returns:
        What has `len()`, the number of frames that are there, and `frames(indices)`, an array (N, H, W, 3) uint8 RGB.

    Raises:
        UnreadableImage: it is missing or damaged.
        InputError: it is no clip, or the decoder is unknown or not installed.
    """
    path = Path(path)
    if path.is_dir():
        return FrameFolder(path)
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise InputError(
            f"{path}: videos of type '{path.suffix.lower()}' are not read; use one of {', '.join(VIDEO_SUFFIXES)}, or "
            "a folder of frames"
        )
    if not path.is_file():
        raise UnreadableImage(f"{path} cannot be read: no such file")
    return AvVideo(path) if choose(decoder) == "av" else CvVideo(path)


def choose(decoder: str) -> str:
    """The decoder that a name stands for: "av" or "cv2".

    Raises:
        InputError: it is unknown or not installed.
    """
    if decoder not in DECODERS:
        raise InputError(f"unknown decoder '{decoder}'{hint(decoder, DECODERS)}")
    installed = find_spec("av") is not None
    if decoder == "av" and not installed:
        raise InputError("decoder 'av' needs PyAV: pip install 'visadapt[video]', or set decoder='cv2'")
    return "av" if decoder == "av" or (decoder == "auto" and installed) else "cv2"


def natural(path: Path) -> list[str | int]:
    """Sorts names by the numbers in them."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", path.name)]


def frame_files(folder: Path) -> list[Path]:
    """The pictures in a folder, in natural order."""
    return sorted((p for p in folder.iterdir() if p.suffix.lower() in PICTURES), key=natural)


class Clip:
    """What all sorts of clips share.

    Args:
        path: for messages.
    """

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """The frames of these indices, which may repeat and stand in any order.

        Returns:
            (N, H, W, 3) uint8 RGB.

        Raises:
            UnreadableImage: one of them cannot be decoded, or they differ in size.
        """
        wanted = sorted(set(indices))
        found = self._decode(wanted)
        missing = [i for i in wanted if i not in found]
        if missing:
            raise UnreadableImage(f"{self.path}: frame {missing[0]} of {len(self)} cannot be decoded")
        sizes = {frame.shape[:2] for frame in found.values()}
        if len(sizes) > 1:
            raise UnreadableImage(f"{self.path} has frames of different size: {', '.join(map(str, sorted(sizes)))}")
        return np.stack([found[i] for i in indices])

    def _decode(self, wanted: list[int]) -> dict[int, np.ndarray]:
        """Those of the ascending indices that can be decoded, (H, W, 3) each."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError


class FrameFolder(Clip):
    """A folder with one picture per frame.

    Raises:
        UnreadableImage: no picture is in it.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self.files = frame_files(path)
        if not self.files:
            raise UnreadableImage(f"{path} holds no frames ({', '.join(PICTURES)})")

    def __len__(self) -> int:
        return len(self.files)

    def _decode(self, wanted: list[int]) -> dict[int, np.ndarray]:
        return {i: read_image(self.files[i]) for i in wanted}


class AvVideo(Clip):
    """A video file read by PyAV.

    All packets are looked at once, which takes milliseconds and tells the number of frames, their times and from where
    one can start to decode. Where packets have no time of their own, frames are counted by decoding.

    Raises:
        UnreadableImage: the file is damaged, or holds no video.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        import av

        self._error = av.error.FFmpegError
        self._to_rgb = av.video.reformatter.VideoReformatter()
        self._container = self._open()
        whole = (p for p in self._packets() if p.size and not p.is_discard and not p.is_corrupt)
        packets = [(p.pts, p.is_keyframe) for p in whole]
        self._keys = sorted(time for time, is_key in packets if is_key and time is not None)
        times = {time for time, _ in packets}
        # the frames of an avi are numbered as they are stored, not as they are shown
        timed = None not in times and len(times) == len(packets) and self._container.format.name != "avi"
        self._times = sorted(times) if timed else None
        self._length = len(packets) if timed else sum(1 for _ in self._from_start())
        if not self._length:
            self.close()
            raise UnreadableImage(f"{path} is damaged: no frame can be decoded")

    def _open(self) -> Any:
        import av

        try:
            container = av.open(str(self.path), metadata_errors="ignore")  # titles are in any encoding
        except self._error as error:
            raise UnreadableImage(f"{self.path} is damaged or not a video") from error
        self._stream = container.streams.best("video")  # not the picture on the cover
        if self._stream is None or self._stream.codec_context is None:
            container.close()
            raise UnreadableImage(f"{self.path} holds no video" + " of a known codec" * (self._stream is not None))
        self._stream.codec_context.thread_count = 1  # loaders run one process per core
        return container

    def close(self) -> None:
        self._container.close()

    def __len__(self) -> int:
        return self._length

    def _packets(self) -> Iterator[Any]:
        """What is left of the file, up to its end or to where it is damaged."""
        try:
            yield from self._container.demux(self._stream)
        except self._error:
            return

    def _frames(self, wanted: set[int] | None = None) -> Iterator[Any]:
        """What the packets from here on decode to. Some decoders pass over what is not wanted and no other frame needs.

        Args:
            wanted: times; None takes every frame.
        """
        context = self._stream.codec_context
        skips = wanted is not None and context.name in SKIPPING
        for packet in self._packets():
            context.skip_frame = "NONREF" if skips and packet.pts not in wanted else "DEFAULT"
            try:
                yield from packet.decode()
            except self._error:  # others may still decode; who asked for this one misses it
                continue

    def _from_start(self) -> Iterator[Any]:
        self.close()
        self._container = self._open()
        yield from self._frames()

    def _array(self, frame: Any) -> np.ndarray:
        rgb = self._to_rgb.reformat(frame, format="rgb24").to_ndarray()
        return np.rot90(rgb, frame.rotation // 90) if frame.rotation else rgb

    def _decode(self, wanted: list[int]) -> dict[int, np.ndarray]:
        if self._times is None:
            last, chosen = wanted[-1], set(wanted)
            shown = zip(range(last + 1), self._from_start())
            return {i: self._array(frame) for i, frame in shown if i in chosen}
        found: dict[int, np.ndarray] = {}
        for _, group in groupby(wanted, lambda i: bisect_right(self._keys, self._times[i])):
            found |= self._decode_from_key({self._times[i]: i for i in group})
        return found

    def _decode_from_key(self, wanted: dict[int, int]) -> dict[int, np.ndarray]:
        """Frames that follow one key frame, by index.

        Args:
            wanted: their indices by their times.
        """
        before = bisect_right(self._keys, min(wanted))
        found: dict[int, np.ndarray] = {}
        try:
            self._container.seek(self._keys[before - 1] if before else self._times[0], stream=self._stream)
        except self._error:  # who asked for these frames misses them
            return found
        for frame in self._frames(set(wanted)):
            if frame.pts in wanted:
                found[wanted[frame.pts]] = self._array(frame)
            if len(found) == len(wanted):
                break
        return found


class CvVideo(Clip):
    """A video file read by OpenCV, which can neither tell its length nor go to a frame reliably: it is decoded twice.

    Raises:
        UnreadableImage: the file is damaged, or holds no video.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self._capture = self._open()
        self._length = 0
        while self._capture.grab():
            self._length += 1
        if not self._length:
            self.close()
            raise UnreadableImage(f"{path} is damaged: no frame can be decoded")

    def _open(self) -> cv2.VideoCapture:
        capture = cv2.VideoCapture(str(self.path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        if not capture.isOpened():
            raise UnreadableImage(f"{self.path} is damaged or not a video")
        return capture

    def close(self) -> None:
        self._capture.release()

    def __len__(self) -> int:
        return self._length

    def _decode(self, wanted: list[int]) -> dict[int, np.ndarray]:
        self.close()
        self._capture = self._open()
        found, chosen = {}, set(wanted)
        for i in range(wanted[-1] + 1):
            if not self._capture.grab():
                break
            if i in chosen:
                decoded, image = self._capture.retrieve()
                if decoded:
                    found[i] = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        return found
