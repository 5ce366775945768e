"""`visadapt predict adapter.safetensors images`: JSON lines and overlay pictures, or class maps."""

from __future__ import annotations

import argparse
import glob
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError
from ._arguments import positive
from ._masks import predict_masks
from ._output import write_predictions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="adapter file of a training run")
    parser.add_argument("images", nargs="+", help="files, folders or globs")
    parser.add_argument(
        "--out", default="predictions", help="folder for predictions.jsonl and the pictures, or the .tif of one scene"
    )
    parser.add_argument("--weights", help="base weights in place of those that the adapter file names")
    parser.add_argument("--task", type=int, help="number of the images' task, for adapters of several tasks")
    parser.add_argument("--batch-size", type=positive, help="images or tiles at once")
    tile = "scenes: side of a tile in pixels; not given, that of the square images of the evaluation, or by the memory"
    parser.add_argument("--tile", type=positive, help=tile)
    parser.add_argument("--overlap", type=float, default=0.25, help="scenes: share of a side that tiles have in common")
    parser.add_argument("--memory", type=positive, metavar="MB", help="scenes: for all but the model; 1074 by default")
    parser.add_argument("--no-pictures", action="store_true", help="write the JSON lines only")
    parser.add_argument("--strict", action="store_true", help="stop at the first image that cannot be read")
    parser.add_argument("--device", help="cpu or cuda; what there is by default")


def find_images(patterns: list[str]) -> list[Path]:
    """Image files of files, folders (with their subfolders) and globs, in a stable order.

    Raises:
        InputError: a pattern gives nothing.
    """
    from ..datasets.files import IMAGE_SUFFIXES
    from ..datasets.folder import images_below, is_image

    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            matches = images_below(path)
        elif path.is_file():
            matches = [path]
        else:
            matches = sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if is_image(p))
        if not matches:
            raise InputError(
                f"no images at '{pattern}'; give a file, a folder or a glob of {', '.join(IMAGE_SUFFIXES)}"
            )
        found |= dict.fromkeys(matches)
    return list(found)


def run(args: argparse.Namespace) -> int:
    from ..predict.from_file import manifest_of_task
    from ..registry import TASKS
    from ..tasks.segment import Segmenter

    paths = find_images(args.images)
    segments = issubclass(TASKS.get(manifest_of_task(args.adapter)["task"]["type"]), Segmenter)
    return (predict_masks if segments else predict_labels)(args, paths, picture_names(paths))


def predict_labels(args: argparse.Namespace, paths: list[Path], names: dict[Path, str]) -> int:
    """Labels of images, and with them pictures under their names."""
    from ..predict.image import Predictor

    predictor = Predictor(args.adapter, weights=args.weights, device=args.device, task=args.task)
    write_predictions(Path(args.out), len(paths), _labelled(args, predictor, paths, names))
    return 0


def _labelled(
    args: argparse.Namespace, predictor: Any, paths: list[Path], names: dict[Path, str]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Results as JSON values, the pictures being written on the way."""
    from tqdm import tqdm

    from ..visualization.overlay import label_overlay
    from ..visualization.picture import save_picture

    of_task = {} if args.task is None else {"task": args.task}
    answers = predictor.predict_files(paths, args.batch_size or 32, args.strict)
    for path, image, answer in tqdm(answers, total=len(paths), unit="image", disable=not sys.stderr.isatty()):
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
