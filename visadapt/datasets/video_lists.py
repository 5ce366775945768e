"""Clips in folders and lists."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError, Notice, hint
from ..registry import DATASETS
from .base import data_root, find_list, read_lines
from .clips import ClipDataset
from .folder import class_of, folders_below
from .listfile import resolve_labels
from .video_files import VIDEO_SUFFIXES, frame_files

SPLITS = ("train", "val", "test")
LABEL = re.compile(r"(\s+|\s*,\s*)[^\s,/]+$")
"""What follows the path in a line of a list."""


class Listed(NamedTuple):
    """Clips of a split, with their class indices and the class names."""

    paths: Sequence[str | Path]
    labels: Sequence[int]
    classes: Sequence[str]


def clips_below(folder: Path) -> list[Path]:
    """Video files below a folder at any depth, and folders that hold pictures and no videos, in a fixed order.

    Raises:
        InputError: a folder cannot be read, or frames lie in `folder` itself.
    """
    found = []
    for here, names in folders_below(folder):
        frames = frame_files(here)
        videos = [here / name for name in names if Path(name).suffix.lower() in VIDEO_SUFFIXES]
        if frames and not videos and here == folder:
            raise InputError(f"{folder} holds pictures; the frames of a clip need a folder of their own below it")
        found += videos or [here] * bool(frames)
    return sorted(found)


def list_rows(source: Path, folder: Path) -> tuple[list[Path], list[str], list[str]]:
    """Of the lines `path label` of a list: paths below `folder`, labels, and where each stands.

    Lists of frame folders may have the number of frames between the two; it is passed over, as frames are counted.

    Raises:
        InputError: a line without a label, or with a comma before it.
    """
    paths, labels, places = [], [], []
    for n, line in read_lines(source):
        path, *label = line.rsplit(maxsplit=1)
        before = Path(line.rpartition(",")[0].rstrip())
        comma = "," in line if not label else before.suffix.lower() in VIDEO_SUFFIXES and not (folder / path).exists()
        if comma or not label:
            advice = ", with a blank in place of the comma" if comma else ""
            raise InputError(f"{source}:{n}: '{line}' has no label; a line is 'path label'{advice}")
        paths.append(folder / _without_count(path, folder))
        labels += label
        places.append(f"{source}:{n}")
    return paths, labels, places


def _without_count(path: str, folder: Path) -> str:
    """A listed path without the number of frames behind it, if only so it is a folder."""
    frames, *count = path.rsplit(maxsplit=1)
    counted = bool(count) and count[0].isdigit() and not (folder / path).exists() and (folder / frames).is_dir()
    return frames if counted else path


def read_list(source: Path, folder: Path, classes: Sequence[str] | None) -> Listed:
    """The clips of a list of lines `path label`, relative to `folder`.

    Warns of labels that do not start at 0 where there are no class names.

    Raises:
        InputError: a line without a label, or a label that is no class.
    """
    paths, written, places = list_rows(source, folder)
    labels, names = resolve_labels(written, places, classes)
    if classes is None and (lowest := min(labels)):
        shown = f"classes=['{lowest}', '{lowest + 1}', ...]"
        about = f"labels start at {lowest} and no clip has label 0, which is a class too; count from 0, or give {shown}"
        warnings.warn(f"{source}: {about}", Notice, stacklevel=3)
    return Listed(paths, labels, names)


@DATASETS.register_module()
class ClipFolder(ClipDataset):
    """Clips in `<root>/<class>/` or `<root>/<split>/<class>/`; class names in alphabetical order give the class index.

    Args:
        root: folder of class folders or of split folders, see `data_root`. A clip is a video file, or a folder of
            frames.
        split: folder below `root`: train, val or test. The classes are those of all of these folders.
        list_file: lines `<class>/<clip>` without labels, relative to the class folders; the list itself is looked for
            as it stands, and below `<root>/<split>`. None takes all clips.
        transform: see ClipDataset, as is everything that follows.

    Raises:
        InputError: no such folder, no class folders or those of splits, an empty one, or a list that names what is not
            there.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        list_file: str | Path | None = None,
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
        found = self._find(data_root(root), split, list_file)
        sampled = (num_frames, sampling, stride, clips, size, crops, short, flip, flip_labels, decoder)
        super().__init__(*found, transform, *sampled, strict, seed, training)

    def _find(self, root: Path, split: str | None, list_file: str | Path | None) -> Listed:
        name = type(self).__name__
        if split is not None and split not in SPLITS:
            raise InputError(f"{name} has no split '{split}'{hint(split, SPLITS)}")
        base = root / (split or "")
        if not base.is_dir():
            raise InputError(f"{name}: no folder {base}; put clips in {base}/<class>/")
        parts = [base] if split is None else [root / s for s in SPLITS if (root / s).is_dir()]
        names = {p.name for part in parts for p in part.iterdir() if p.is_dir()}
        classes = tuple(sorted(c for c in names if not c.startswith(".")))
        if not classes:
            raise InputError(f"{name}: {base} has no class folders; put clips in {base}/<class>/")
        splits = [s for s in SPLITS if s in names]
        if split is None and (len(splits) > 1 or len(splits) == len(classes)):
            raise InputError(f"{name}: {base} has folders of splits in place of classes; give split='{splits[0]}'")
        if list_file is not None:
            lines = read_lines(source := find_list(list_file, base))
            labels = [class_of(line, classes, f"{source}:{n}") for n, line in lines]
            for n, line in lines:
                if not (base / line).exists() and (base / LABEL.sub("", line)).exists():
                    raise InputError(
                        f"{source}:{n}: '{line}' ends in a label; lines of {name} are '<class>/<clip>', as the folder "
                        "is the class; leave the labels out, or take ClipList"
                    )
            return Listed([base / line for _, line in lines], labels, classes)
        found = {c: clips_below(base / c) for c in classes if (base / c).is_dir()}
        if empty := [c for c, clips in found.items() if not clips]:
            raise InputError(
                f"{name}: {base} has class folders without a clip: {', '.join(empty[:5])}; remove them or fill them"
            )
        pairs = [(path, classes.index(c)) for c, clips in found.items() for path in clips]
        return Listed([path for path, _ in pairs], [label for _, label in pairs], classes)


@DATASETS.register_module()
class ClipList(ClipDataset):
    """Clips from a text file with lines `path label`.

    Args:
        list_file: the lines; a path is a video file or a folder of frames, the label, after the last blank, is a class
            index from 0 or a class name. Lines `folder frames label` are read as well; the frames are counted anew.
        root: folder that the paths are relative to, see `data_root`; None takes the folder of the list.
        classes: class names in order. Without them each list makes its own from what occurs in it, so give them where a
            list may lack a class.
        transform: see ClipDataset, as is everything that follows.

    Raises:
        InputError: no such list, a line without label, a label that is no class, or clips that do not exist.
    """

    def __init__(
        self,
        list_file: str | Path,
        root: str | Path | None = None,
        classes: Sequence[str] | None = None,
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
        folder = None if root is None else data_root(root)
        source = find_list(list_file, folder or Path())
        found = read_list(source, folder or source.parent, classes)
        sampled = (num_frames, sampling, stride, clips, size, crops, short, flip, flip_labels, decoder)
        super().__init__(*found, transform, *sampled, strict, seed, training)
