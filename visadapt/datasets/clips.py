"""Video clips with one label each, and how they become a batch."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, Notice, counted, hint
from ..transforms.albu import Albu
from ..transforms.clips import for_each_frame, three_crops
from .base import ClassificationDataset, common, draw_seed, stack
from .video_files import choose, open_clip

SAMPLINGS = ("dense", "uniform")
SHORT = ("repeat", "refuse")
FLIPPING = ("HorizontalFlip", "D4", "SquareSymmetry", "Transpose", "RandomRotate90")
"""Transforms that exchange left and right, without a word to the label."""


class ClipDataset(ClassificationDataset):
    """Video files, or folders of frames, with one label each.

    A sample is `num_frames` frames of a clip, in evaluation `clips` times as many. All of them go through the same draw
    of the transforms. In evaluation `size` adds a resize and a centre crop behind the transforms, or three crops. Its
    "inputs" are (V * T, C, H, W) with V = clips * crops views, all frames of the first view first.

    Args:
        paths: a video file or a folder of frames per sample, see `visadapt.datasets.video_files.open_clip`.
        labels: class index of each sample.
        classes: class names; their order gives the class index.
        transform: see ImageDataset; entries that mirror images do not change labels, `flip` does, and `flip_labels`
            refuses them beside it. It does not know of angles: keep those of Rotate, SafeRotate and Affine small.
        num_frames: T, frames that a model sees at once.
        sampling: "uniform" cuts the clip into T equal segments and takes one frame of each, anywhere in it in training,
            the middle one in evaluation. "dense" takes T frames with `stride`, from anywhere in training, from the
            middle in evaluation.
        stride: for "dense": 1 takes neighbouring frames, 16 every sixteenth.
        clips: in evaluation, how often frames are taken: for "dense" from so many evenly spaced starts, for "uniform"
            at so many evenly spaced places in each segment.
        size: in evaluation, side of the square that is cut from each frame once its short side has this length. None
            leaves frames as the transforms make them.
        crops: in evaluation, 1 cuts the centre, 3 the left, centre and right, or top, centre and bottom, along the
            longer side.
        short: what to do about clips of fewer frames than are asked for: "repeat" goes on with the last frame, "refuse"
            is an error.
        flip: in training, chance that all frames are mirrored.
        flip_labels: labels that a mirrored clip changes, to what, in both directions, as class names or indices:
            {"left": "right", "right": "left"} or {86: 87, 87: 86}.
        decoder: "av", "cv2" or "auto", see `visadapt.datasets.video_files.open_clip`.
        strict: raise at the first unreadable clip.
        seed: of the draw of frames and the augmentation.
        training: what stands in for an unreadable clip, see ImageDataset; and whether frames are drawn at random.

    Attributes:
        needed: frames that a clip must have so that none is repeated.
        views_of_clips: arguments by which a clip is seen as in this evaluation, for adapter files; None in training.

    Raises:
        InputError: as ClassificationDataset; arguments that are out of range or have no use here.
    """

    unit = "clip"

    def __init__(
        self,
        paths: Sequence[str | Path],
        labels: Sequence[int],
        classes: Sequence[str],
        transform: list[dict] | None = None,
        num_frames: int = 8,
        sampling: str = "uniform",
        stride: int = 1,
        clips: int = 1,
        size: int | None = None,
        crops: int = 1,
        short: str = "repeat",
        flip: float = 0.0,
        flip_labels: Mapping[int | str, int | str] | None = None,
        decoder: str = "auto",
        strict: bool = False,
        seed: int = 0,
        training: bool = False,
    ):
        self.num_frames, self.sampling, self.stride, self.short = num_frames, sampling, stride, short
        self.clips, self.size, self.crops, self.flip, self.decoder = clips, size, crops, flip, decoder
        name = type(self).__name__
        pairs = (flip_labels or {}).items()
        self.flip_labels = {_label(name, a, classes): _label(name, b, classes) for a, b in pairs}
        _check_frames(name, num_frames, sampling, stride, short)
        self.needed = 1 + (num_frames - 1) * stride
        _check_views(name, clips, size, crops, training)
        choose(decoder)
        entries = [*(transform or [])]
        kept = dict(num_frames=num_frames, sampling=sampling, stride=stride, clips=clips, size=size, crops=crops)
        self.views_of_clips = None if training else {"transform": entries[:], **kept, "short": short}
        self._resize = None  # of three crops, which are cut from what it leaves
        if size is not None:
            entries.append(dict(type="SmallestMaxSize", max_size=size))
            self._resize = Albu(entries, 3) if crops == 3 else None
            entries.append(dict(type="CenterCrop", height=size, width=size))
        super().__init__(paths, labels, classes, entries, 3, strict, seed, training)

    def _check(self) -> None:
        name = type(self).__name__
        super()._check()
        if not 0 <= self.flip <= 1 or (self.flip and not self.training):
            raise InputError(f"{name}: flip is a chance from 0 to 1, and for training alone, got {self.flip}")
        mirrors = [n for n in (self.transform.names if self.transform else ()) if n in FLIPPING]
        if self.flip_labels and mirrors:
            raise InputError(f"{name}: {mirrors[0]} mirrors clips without changing their labels; use flip=...")
        for label, mirrored in self.flip_labels.items() if self.flip else ():
            if self.flip_labels.get(mirrored) != label:
                raise InputError(
                    f"{name}: flip_labels turns {label} into {mirrored} but not back; give both directions"
                )
            if not 0 <= label < len(self.classes):
                raise InputError(
                    f"{name}: flip_labels names label {label}, there are {len(self.classes)} classes; give "
                    "flip_labels the names of classes that a mirror exchanges, or {} where there are none"
                )
        if mirrors or self.flip:
            self._warn_of_sides("flip" if self.flip else mirrors[0])

    def _warn_of_sides(self, what: str) -> None:
        """Warn of classes that a mirror exchanges while clips keep their labels."""
        pairs = [(a, b) for a, b in mirrored_pairs(self.classes) if self.flip_labels.get(a) != b]
        if pairs:
            a, b = (self.classes[i] for i in pairs[0])
            more = f", and {counted(len(pairs) - 1, 'other pair')}" if pairs[1:] else ""
            advice = f"{'' if what == 'flip' else 'use flip and '}give flip_labels={{{a!r}: {b!r}, {b!r}: {a!r}}}"
            about = f"{what} makes '{a}' look like '{b}' and keeps the label{more}; {advice}"
            warnings.warn(f"{type(self).__name__}: {about}", Notice, stacklevel=5)

    def _check_files(self) -> None:
        self._refuse_missing(self.paths, "clips", Path.exists)  # a clip may be a folder

    def read(self, index: int) -> np.ndarray:
        """The frames that a sample is made of in epoch 0, (clips * T, H, W, 3) uint8 RGB.

        Raises:
            UnreadableImage: the clip is missing or damaged, or lacks one of these frames.
            InputError: it is too short, with short="refuse".
        """
        return self._read(index, draw_seed(self.seed, 0, index))

    def length(self, index: int) -> int:
        """How many frames a clip has.

        Raises:
            UnreadableImage: it is missing or damaged.
        """
        with open_clip(self.paths[index], self.decoder) as clip:
            return len(clip)

    def _read(self, index: int, seed: int) -> np.ndarray:
        with open_clip(self.paths[index], self.decoder) as clip:
            if len(clip) < self.needed and self.short == "refuse":
                raise InputError(
                    f"{self.paths[index]} has {counted(len(clip), 'frame')}, {self.needed} are needed for num_frames="
                    f"{self.num_frames} with stride={self.stride}; leave it out, or set short='repeat'"
                )
            taken = self._indices(max(len(clip), self.needed), seed)
            return clip.frames(taken.clip(max=len(clip) - 1).tolist())

    def _indices(self, length: int, seed: int) -> np.ndarray:
        """Indices (clips * T,) of the frames to take from so many."""
        frames, clips = np.arange(self.num_frames), np.arange(self.clips)[:, None]
        draws = np.random.default_rng([seed, 1])
        if self.sampling == "dense":
            starts = length - (self.num_frames - 1) * self.stride
            start = draws.integers(starts) if self.training else starts * (2 * clips + 1) // (2 * self.clips)
            return (start + frames * self.stride).reshape(-1)
        if self.training:
            places = frames + draws.random(self.num_frames)
            return (length * places / self.num_frames).astype(np.int64)
        parts = 2 * self.clips  # halves of the parts of a segment
        return (length * (parts * frames + 2 * clips + 1) // (parts * self.num_frames)).reshape(-1)

    def _sample(self, index: int, content: np.ndarray, seed: int) -> dict[str, Any]:
        label = self.labels[index]
        if self.flip and np.random.default_rng([seed, 2]).random() < self.flip:
            content, label = content[:, :, ::-1], self.flip_labels.get(label, label)
        if self._resize is not None:
            content = three_crops(for_each_frame(self._resize, content, seed), self.num_frames)
        elif self.transform is not None:
            content = for_each_frame(self.transform, content, seed)
        return {"inputs": to_tensors(content), "label": label}


def to_tensors(frames: np.ndarray) -> Tensor:
    """(N, H, W, C) to (N, C, H, W), in the same type."""
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))


def mirrored_pairs(classes: Sequence[str]) -> list[tuple[int, int]]:
    """Indices of two classes each whose names differ only by left and right being exchanged."""
    other = {"left": "right", "right": "left"}
    names = {name.lower(): i for i, name in enumerate(classes)}
    swapped = {i: names.get(re.sub("left|right", lambda m: other[m[0]], name), i) for name, i in names.items()}
    return [(i, j) for i, j in swapped.items() if i < j]


def _label(name: str, label: Any, classes: Sequence[str]) -> int:
    """The index of a class that `flip_labels` gives by its name or its index."""
    if type(label) is int:
        return label
    names = [str(c) for c in classes]
    if label not in names:
        raise InputError(f"{name}: flip_labels names the class {label!r}, there is none{hint(label, names)}")
    return names.index(label)


def _check_frames(name: str, num_frames: int, sampling: str, stride: int, short: str) -> None:
    if sampling not in SAMPLINGS:
        raise InputError(f"{name}: unknown sampling '{sampling}'{hint(sampling, SAMPLINGS)}")
    if short not in SHORT:
        raise InputError(f"{name}: short is 'repeat' or 'refuse', got '{short}'")
    for key, number in (("num_frames", num_frames), ("stride", stride)):
        if type(number) is not int or number < 1:
            raise InputError(f"{name}: {key} must be a whole number of at least 1, got {number!r}")
    if stride > 1 and sampling == "uniform":
        raise InputError(f"{name}: stride is for sampling='dense'; 'uniform' spreads frames over the whole clip")


def _check_views(name: str, clips: int, size: int | None, crops: int, training: bool) -> None:
    if type(clips) is not int or clips < 1:
        raise InputError(f"{name}: clips must be a whole number of at least 1, got {clips!r}")
    if crops not in (1, 3):
        raise InputError(f"{name}: crops must be 1 or 3, got {crops!r}")
    if size is not None and (type(size) is not int or size < 1):
        raise InputError(f"{name}: size must be a number of pixels, got {size!r}")
    if crops == 3 and size is None:
        raise InputError(f"{name}: crops=3 needs size=..., the side of the crops in pixels")
    if training and (clips > 1 or size is not None):
        raise InputError(
            f"{name}: clips, size and crops are for evaluation; in training use a transform such as "
            "dict(type='RandomResizedCrop', size=(224, 224))"
        )


def collate_clips(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack clips with labels into a batch.

    Returns:
        "inputs" (B, V * T, C, H, W), "labels" (B,) int64, and what `visadapt.datasets.base.common` adds.

    Raises:
        InputError: clips of different size.
    """
    advice = "add a transform such as dict(type='RandomResizedCrop', size=(224, 224)), or in evaluation size=224"
    labels = torch.tensor([s["label"] for s in samples], dtype=torch.int64)
    inputs = stack(samples, "inputs", "clips", "frames, bands, height, width", advice)
    return {"inputs": inputs, "labels": labels, **common(samples)}
