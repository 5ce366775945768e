"""Published data sets of clips, as their archives are laid out."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from ..errors import InputError, Notice, hint
from ..registry import DATASETS
from .base import data_root, find_list, read_lines
from .clips import ClipDataset
from .files import read_json, read_text
from .folder import class_of
from .listfile import resolve_labels
from .video_lists import Listed, list_rows, read_list


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
            warnings.warn(f"{type(self).__name__}: {about}", Notice, stacklevel=3)
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
            return read_list(find_list(root / f"{split}.txt", root), videos, None)
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
        entries = read_json(source)
        if not isinstance(entries, list):
            raise InputError(f"{source} must hold one list of videos")
        for number, entry in enumerate(entries):
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
            for path, written, place in zip(*list_rows(source, videos / classes[label])):
                if written not in ("0", "1", "2"):
                    raise InputError(f"{place}: mark '{written}' is none of 0, 1 and 2")
                if written == mark:
                    paths.append(path)
                    labels.append(label)
        return Listed(paths, labels, classes)
