"""Where the clips of published data sets lie, and clips in folders and lists."""

from __future__ import annotations

import csv
import io
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ..errors import InputError, hint
from ..registry import DATASETS
from .base import data_root, find_list, read_lines
from .clips import ClipDataset
from .files import read_text
from .folder import class_of
from .listfile import resolve_labels
from .video_files import VIDEO_SUFFIXES, frame_files

SPLITS = ("train", "val", "test")


class Listed(NamedTuple):
    """Clips of a split, with their class indices and the class names."""

    paths: Sequence[str | Path]
    labels: Sequence[int]
    classes: Sequence[str]


def clips_below(folder: Path) -> list[Path]:
    """Video files below a folder at any depth, and folders that hold pictures, in a fixed order.

    Raises:
        InputError: a folder cannot be read, or pictures lie in `folder` itself.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"folder {error.filename} cannot be read: {error.strerror.lower()}") from error

    if frame_files(folder):
        raise InputError(f"{folder} holds pictures; the frames of a clip need a folder of their own below it")
    found = []
    for base, _, names in os.walk(folder, onerror=refuse):
        found += [Path(base, name) for name in names if Path(name).suffix.lower() in VIDEO_SUFFIXES]
        found += [Path(base)] if frame_files(Path(base)) else []
    return sorted(found)


def list_rows(source: Path) -> tuple[list[str], list[str], list[str]]:
    """Of the lines `path label` of a list: paths, labels, and where each stands.

    Raises:
        InputError: a line without a label.
    """
    lines = read_lines(source)
    rows, places = [line.rsplit(maxsplit=1) for _, line in lines], [f"{source}:{n}" for n, _ in lines]
    for row, place in zip(rows, places):
        if len(row) < 2:
            raise InputError(f"{place}: '{row[0]}' has no label; a line is 'path label'")
    return [path for path, _ in rows], [label for _, label in rows], places


def read_json(path: Path) -> Any:
    """What a json file holds.

    Raises:
        InputError: it is not json.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not json: {error.msg.lower()}") from error


@DATASETS.register_module()
class ClipFolder(ClipDataset):
    """Clips in `<root>/<class>/` or `<root>/<split>/<class>/`; class names in alphabetical order give the class index.

    Args:
        root: folder of class folders or of split folders, see `data_root`. A clip is a video file, or a folder of
            frames.
        split: folder below `root`: train, val or test. The classes are those of all of these folders.
        list_file: lines `<class>/<clip>`, relative to the class folders. None takes all clips.
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
            index or a class name.
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
        paths, written, places = list_rows(source)
        labels, names = resolve_labels(written, places, classes)
        found = Listed([(folder or source.parent) / path for path in paths], labels, names)
        sampled = (num_frames, sampling, stride, clips, size, crops, short, flip, flip_labels, decoder)
        super().__init__(*found, transform, *sampled, strict, seed, training)


class PublishedClips(ClipDataset):
    """A published data set as its archive is laid out; a subclass says how its lists are read.

    Args:
        split: see the subclass.
        root: folder of the data set, see `data_root`; None takes the usual one.
        video_dir: folder of the videos below `root`; None takes the usual one.
        missing: what to do about listed videos that are not there: "refuse" is an error, "skip" leaves them out with
            one warning.
        transform: see ClipDataset, as is everything that follows.

    Attributes:
        FLIP_LABELS: what `flip_labels=None` stands for.
        absent: paths of the listed videos that are not there.

    Raises:
        InputError: an unknown split, no such folder or list, labels that are no class, or videos that are not there.
    """

    ROOT: ClassVar[str]
    SPLITS: ClassVar[tuple[str, ...]]
    FLIP_LABELS: ClassVar[dict[int, int] | None] = None

    def __init__(
        self,
        split: str,
        root: str | Path | None = None,
        video_dir: str | None = None,
        missing: str = "refuse",
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
        if split not in self.SPLITS:
            raise InputError(f"{type(self).__name__} has no split '{split}'{hint(split, self.SPLITS)}")
        if missing not in ("refuse", "skip"):
            raise InputError(f"{type(self).__name__}: missing is 'refuse' or 'skip', got '{missing}'")
        found, self.absent = self._list(data_root(root or self.ROOT), split, video_dir), []
        if missing == "skip":
            found = self._present(found)
        flip_labels = self.FLIP_LABELS if flip_labels is None else flip_labels
        sampled = (num_frames, sampling, stride, clips, size, crops, short, flip, flip_labels, decoder)
        super().__init__(*found, transform, *sampled, strict, seed, training)

    def _list(self, root: Path, split: str, video_dir: str | None) -> Listed:
        """The clips of a split, whether they are there or not."""
        raise NotImplementedError

    def _present(self, listed: Listed) -> Listed:
        there = [Path(p).exists() for p in listed.paths]
        self.absent = [str(p) for p, found in zip(listed.paths, there) if not found]
        if self.absent:
            shown = ", ".join(self.absent[:3]) + (", …" if len(self.absent) > 3 else "")
            about = f"{len(self.absent)} of {len(there)} listed videos are not there and left out: {shown}"
            warnings.warn(f"{type(self).__name__}: {about}", stacklevel=3)
        paths, labels = ([x for x, found in zip(column, there) if found] for column in listed[:2])
        return Listed(paths, labels, listed.classes)


@DATASETS.register_module()
class Kinetics(PublishedClips):
    """Kinetics (Kay et al. 2017) with any number of classes: 10-second clips from YouTube, of which many have gone.

    `<root>/<split>.csv` has the columns label, youtube_id, time_start, time_end and split; its videos are
    `<root>/<split>/<label>/<id>_<start>_<end>.mp4` with six digits of seconds, blanks in labels may be underscores.
    Where there is `<root>/<split>.txt` instead, its lines are `path label`, relative to the folder of videos, and the
    label is a class index or a class name. Each list gives its own classes, so it must have all of them.

    The splits are train and val; the arguments are those of PublishedClips.
    """

    ROOT = "kinetics400"
    SPLITS = ("train", "val")

    def _list(self, root: Path, split: str, video_dir: str | None) -> Listed:
        videos, table = root / (video_dir or split), root / f"{split}.csv"
        if not table.is_file():
            paths, written, places = list_rows(find_list(root / f"{split}.txt", root))
            return Listed([videos / p for p in paths], *resolve_labels(written, places, None))
        rows = list(csv.DictReader(io.StringIO(read_text(table), newline=""), skipinitialspace=True))
        if not rows:
            raise InputError(f"{table} has no rows below its header")
        for column in ("label", "youtube_id", "time_start", "time_end"):
            if rows[0].get(column) is None:
                raise InputError(f"{table}: no column '{column}'{hint(column, map(str, rows[0]))}")
        places = [f"{table}:{n}" for n in range(2, len(rows) + 2)]
        labels, classes = resolve_labels([r["label"] for r in rows], places, None)
        folders = [next((f for f in (c, c.replace(" ", "_")) if (videos / f).is_dir()), c) for c in classes]
        try:
            times = [[int(r[key].removesuffix(".0")) for key in ("time_start", "time_end")] for r in rows]
        except (AttributeError, ValueError) as error:
            raise InputError(f"{table}: time_start and time_end are whole seconds: {error}") from error
        names = [f"{r['youtube_id']}_{start:06d}_{end:06d}.mp4" for r, (start, end) in zip(rows, times)]
        return Listed([videos / folders[label] / name for label, name in zip(labels, names)], labels, classes)


@DATASETS.register_module()
class SomethingSomethingV2(PublishedClips):
    """Something-Something v2 (Goyal et al. 2017): 174 hand movements, videos `<id>.webm`.

    `<root>/labels.json` gives the index of each class, `<root>/train.json` and `validation.json` list id and template,
    or id and label, of each video; all of them may be named something-something-v2-<name>.json or lie in
    `<root>/labels/`. Videos are in `<root>/20bn-something-something-v2/`.

    Six classes are told apart by left and right; `flip` exchanges them. The splits are train and val; the arguments are
    those of PublishedClips.
    """

    ROOT = "sthv2"
    SPLITS = ("train", "val")
    FLIP_LABELS = {86: 87, 87: 86, 93: 94, 94: 93, 166: 167, 167: 166}

    def _list(self, root: Path, split: str, video_dir: str | None) -> Listed:
        source, of_labels = (
            _official(root, name) for name in ("train" if split == "train" else "validation", "labels")
        )
        indices = read_json(of_labels)
        try:
            indices = {str(name): int(index) for name, index in indices.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"{of_labels} must hold one object of class names and their indices") from error
        if sorted(indices.values()) != list(range(len(indices))):
            raise InputError(f"{of_labels}: class indices are not 0 to {len(indices) - 1}, each once")
        videos, paths, labels = root / (video_dir or "20bn-something-something-v2"), [], []
        for number, entry in enumerate(read_json(source)):
            if not isinstance(entry, dict) or "id" not in entry or not {"template", "label"} & set(entry):
                raise InputError(f"{source}: entry {number} has no id, or neither template nor label")
            name = str(entry.get("template", entry.get("label"))).translate({ord("["): None, ord("]"): None})
            if name not in indices:
                raise InputError(f"{source}: entry {number}: '{name}' is none of the {len(indices)} classes")
            paths.append(videos / f"{entry['id']}.webm")
            labels.append(indices[name])
        return Listed(paths, labels, sorted(indices, key=indices.__getitem__))


def _official(root: Path, name: str) -> Path:
    """A json file of Something-Something v2 in one of the places where archives have it."""
    places = [f"{name}.json", f"something-something-v2-{name}.json", f"labels/{name}.json"]
    found = next((root / p for p in places if (root / p).is_file()), None)
    if found is None:
        raise InputError(f"Something-Something v2: none of {', '.join(places)} is in {root}")
    return found


@DATASETS.register_module()
class UCF101(PublishedClips):
    """UCF101 (Soomro et al. 2012): 101 actions, 13,320 clips.

    Videos are in `<root>/UCF-101/<class>/`, the lists trainlist01.txt to testlist03.txt and classInd.txt in
    `<root>/ucfTrainTestlist/`. The splits are train1 to train3 and test1 to test3; the arguments are those of
    PublishedClips.
    """

    ROOT = "ucf101"
    SPLITS = tuple(f"{part}{fold}" for part in ("train", "test") for fold in (1, 2, 3))

    def _list(self, root: Path, split: str, video_dir: str | None) -> Listed:
        folder, videos = root / "ucfTrainTestlist", root / (video_dir or "UCF-101")
        index = find_list(folder / "classInd.txt", folder)
        numbered = [line.split(maxsplit=1) for _, line in read_lines(index)]
        if [row[0] for row in numbered] != [str(i + 1) for i in range(len(numbered))] or min(map(len, numbered)) < 2:
            raise InputError(f"{index}: lines are '1 ClassName', counted up from 1")
        classes = tuple(name for _, name in numbered)
        source = find_list(folder / f"{split[:-1]}list0{split[-1]}.txt", folder)
        paths, labels = [], []
        for n, line in read_lines(source):
            path, _, number = line.partition(" ")
            labels.append(class_of(path, classes, f"{source}:{n}"))
            if number and number != str(labels[-1] + 1):
                raise InputError(f"{source}:{n}: label {number} is not that of '{Path(path).parts[0]}' in {index}")
            paths.append(videos / path)
        return Listed(paths, labels, classes)


@DATASETS.register_module()
class HMDB51(PublishedClips):
    """HMDB51 (Kuehne et al. 2011): 51 actions, 6,766 clips.

    Videos are in `<root>/videos/<class>/`, the lists `<class>_test_split<1, 2 or 3>.txt` in
    `<root>/testTrainMulti_7030_splits/`, where a 1 marks training, a 2 test and a 0 neither. The splits are train1 to
    train3 and test1 to test3; the arguments are those of PublishedClips.
    """

    ROOT = "hmdb51"
    SPLITS = UCF101.SPLITS

    def _list(self, root: Path, split: str, video_dir: str | None) -> Listed:
        folder, videos = root / "testTrainMulti_7030_splits", root / (video_dir or "videos")
        ending = f"_test_split{split[-1]}.txt"
        lists = sorted(folder.glob(f"*{ending}"))
        if not lists:
            raise InputError(f"HMDB51: no list {folder}/<class>{ending}; unpack the splits there")
        classes, mark = tuple(p.name.removesuffix(ending) for p in lists), "1" if split.startswith("train") else "2"
        paths, labels = [], []
        for label, source in enumerate(lists):
            for path, written, place in zip(*list_rows(source)):
                if written not in ("0", "1", "2"):
                    raise InputError(f"{place}: mark '{written}' is none of 0, 1 and 2")
                if written == mark:
                    paths.append(videos / classes[label] / path)
                    labels.append(label)
        return Listed(paths, labels, classes)
