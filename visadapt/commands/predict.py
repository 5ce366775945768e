"""`visadapt predict adapter.safetensors images`: JSON lines and pictures of images or clips, or class maps."""

from __future__ import annotations

import argparse
import glob
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..errors import InputError, counted
from ._arguments import positive
from ._masks import given_for_tiles, predict_masks
from ._output import is_file_name, write_predictions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="adapter file of a training run")
    parser.add_argument("images", nargs="+", help="images, or videos and folders of frames: files, folders or globs")
    out = "folder for predictions.jsonl, masks and pictures; or the mask of one image: a .png, of a scene a .tif"
    parser.add_argument("--out", default="predictions", help=out)
    parser.add_argument("--weights", help="base weights in place of those that the adapter file names")
    parser.add_argument("--task", type=int, help="number of the task, for adapters of several tasks")
    parser.add_argument("--batch-size", type=positive, help="images or tiles at once; not for clips")
    tile = "class maps: side of a tile in pixels, for scenes and for pictures that are larger; not given, that of the "
    tile += "square images of the evaluation, or by the memory"
    parser.add_argument("--tile", type=positive, help=tile)
    parser.add_argument("--overlap", type=float, help="class maps: share of a tile that neighbours have too; 0.25")
    memory = "class maps: for all but the model, 1074; pictures that need more, at 1 KiB per pixel, are tiled"
    parser.add_argument("--memory", type=positive, metavar="MB", help=memory)
    parser.add_argument("--no-pictures", action="store_true", help="write the JSON lines and masks only")
    parser.add_argument("--strict", action="store_true", help="stop at the first image or clip that cannot be read")
    parser.add_argument("--device", help="cpu or cuda; what there is by default")


def find_images(patterns: list[str], out: Path) -> list[Path]:
    """Image files of files, folders (with their subfolders) and globs, in a stable order.

    Of folders and globs what lies below `out` is left out, and unfinished masks of scenes: this command wrote them.

    Raises:
        InputError: a pattern gives nothing, or an image is where results go, among which it could not be told.
    """
    from ..datasets.files import IMAGE_SUFFIXES
    from ..datasets.folder import images_below, is_image

    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            matches = _without_results(images_below(path), path, out)
        elif path.is_file():
            matches = [path]
        else:
            matches = _without_results([p for p in _globbed(pattern) if is_image(p)], _base(path), out)
        if not matches:
            raise InputError(
                f"no images at '{pattern}'; give a file, a folder or a glob of {', '.join(IMAGE_SUFFIXES)}"
            )
        found |= dict.fromkeys(matches)
    _refuse_among_results(found, out)
    return [*found]


def _globbed(pattern: str) -> list[Path]:
    return sorted(map(Path, glob.glob(pattern, recursive=True)))


def _base(pattern: Path) -> Path:
    """The folder that all matches of a glob are below."""
    return Path(*takewhile(lambda part: not glob.has_magic(part), pattern.parts))


def _refuse_among_results(paths: Iterable[Path], out: Path) -> None:
    results = out.resolve(), (out / "masks").resolve()
    folders: dict[Path, Path] = {}
    for path in paths:
        for folder in (path.parent, path) if path.is_dir() else (path.parent,):  # a clip may be a folder
            folders.setdefault(folder, path)
    for folder, path in folders.items():
        if folder.resolve() in results:
            raise InputError(f"{path} is where --out {out} puts results; write them to another folder")


def _without_results(paths: list[Path], base: Path, out: Path, noun: str = "image") -> list[Path]:
    """Images or clips below a folder without what an earlier call wrote there; says how many were left out."""
    root, home = base.resolve(), out.resolve()
    kept = [p for p in paths if not p.name.endswith(".partial.tif")]
    if root in home.parents:  # results are among the images, not the images among results
        kept = [p for p in kept if not (root / p.relative_to(base)).is_relative_to(home)]
    if left := len(paths) - len(kept):
        print(f"left out {counted(left, noun)} in {base} as results of earlier calls", file=sys.stderr)
    return kept


def run(args: argparse.Namespace) -> int:
    from ..predict.from_file import manifest_of_task
    from ..registry import TASKS
    from ..tasks.segment import Segmenter
    from ..tasks.video import VideoClassifier

    task = TASKS.get(manifest_of_task(args.adapter)["task"]["type"])
    if issubclass(task, VideoClassifier):
        paths = find_clips(args.images, Path(args.out))
        return predict_clips(args, paths, picture_names(paths))
    paths = find_images(args.images, Path(args.out))
    predict = predict_masks if issubclass(task, Segmenter) else predict_labels
    return predict(args, paths, picture_names(paths))


def find_clips(patterns: list[str], out: Path) -> list[Path]:
    """Videos and folders of frames that files, folders (with their subfolders) and globs name, in a stable order.

    Of folders and globs what lies below `out` is left out: this command wrote it.

    Raises:
        InputError: a pattern gives nothing, or a clip is where results go, among which it could not be told.
    """
    from ..datasets.video_files import VIDEO_SUFFIXES

    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_file():
            matches = [path]
        else:
            places, base = ([path], path) if path.is_dir() else (_globbed(pattern), _base(path))
            clips = dict.fromkeys(clip for place in places for clip in _clips_at(place))
            matches = _without_results([*clips], base, out, "clip")
        if not matches:
            raise InputError(
                f"no clips at '{pattern}'; give a video ({', '.join(VIDEO_SUFFIXES)}), a folder of frames, a folder of "
                "these, or a glob"
            )
        found |= dict.fromkeys(matches)
    _refuse_among_results(found, out)
    return [*found]


def _clips_at(place: Path) -> list[Path]:
    """A video or a folder of frames, as it is; or all of them below another folder."""
    from ..datasets.video_files import VIDEO_SUFFIXES, frame_files
    from ..datasets.video_lists import clips_below

    if not place.is_dir():
        return [place] if place.suffix.lower() in VIDEO_SUFFIXES else []
    videos = any(path.suffix.lower() in VIDEO_SUFFIXES for path in place.iterdir())  # a picture among them is no frame
    return [place] if frame_files(place) and not videos else clips_below(place)


def predict_labels(args: argparse.Namespace, paths: list[Path], names: dict[Path, str]) -> int:
    """Labels of images, and with them pictures under their names.

    Raises:
        InputError: --out is the name of a file, options are about tiles, or no readable image.
    """
    from ..predict.image import Predictor

    _check_folder(args, "image")
    predictor = Predictor(args.adapter, weights=args.weights, device=args.device, task=args.task)
    answers = predictor.predict_files(paths, args.batch_size or 32, args.strict)
    write_predictions(Path(args.out), len(paths), _labelled(args, answers, paths, names))
    return 0


def predict_clips(args: argparse.Namespace, paths: list[Path], names: dict[Path, str]) -> int:
    """Labels of clips, and with them pictures of four frames under their names.

    Raises:
        InputError: as `predict_labels`; a batch size, as clips come one at a time.
    """
    from ..predict.clip import ClipPredictor

    _check_folder(args, "clip")
    if args.batch_size:
        raise InputError("clips are predicted one at a time, all frames and views at once; leave out --batch-size")
    predictor = ClipPredictor(args.adapter, weights=args.weights, device=args.device, task=args.task)
    answers = predictor.predict_files(paths, args.strict)
    write_predictions(Path(args.out), len(paths), _labelled(args, answers, paths, names, "clip"), "clip")
    return 0


def _check_folder(args: argparse.Namespace, noun: str) -> None:
    """Refuse what makes no sense for labels."""
    if is_file_name(Path(args.out)):
        raise InputError(f"--out {args.out} names a file; labels and pictures go to a folder, give its name")
    if given := given_for_tiles(args):
        raise InputError(f"{args.adapter} labels whole {noun}s; leave out {', '.join(given)}, made for class maps")


def _labelled(
    args: argparse.Namespace,
    answers: Iterator[tuple[Path, Any, dict[str, Any]]],
    paths: list[Path],
    names: dict[Path, str],
    noun: str = "image",
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Results as JSON values, the pictures being written on the way."""
    from tqdm import tqdm

    from ..visualization.overlay import label_overlay
    from ..visualization.picture import save_picture

    of_task = {} if args.task is None else {"task": args.task}
    for path, image, answer in tqdm(answers, total=len(paths), unit=noun, disable=not sys.stderr.isatty()):
        if "error" not in answer and not args.no_pictures:
            picture = label_overlay(image, [f"{answer['label']} {answer['score']:.0%}"])
            save_picture(Path(args.out) / names[path], picture)
        yield path, of_task | answer


def picture_names(paths: list[Path]) -> dict[Path, str]:
    """A PNG name for every image: its last folders and its own name, numbered where two would be alike."""
    names: dict[Path, str] = {}
    used: Counter[str] = Counter()
    for path in paths:
        parts = [part for part in path.with_suffix("").parts if part not in (path.anchor, "..", ".")]
        whole = "__".join(parts[-3:]).encode(errors="surrogateescape")
        stem = whole[-200:].decode(errors="ignore")  # file systems take 255 bytes
        name = stem
        while name in used:
            used[stem] += 1
            name = f"{stem}_{used[stem]}"
        used[name] = 1
        names[path] = f"{name}.png"
    return names
