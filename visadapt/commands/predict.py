"""`visadapt predict adapter.safetensors images`: JSON lines and overlay pictures."""

from __future__ import annotations

import argparse
import glob
import json
import sys
from collections import Counter
from pathlib import Path

from ..errors import InputError
from ._arguments import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="adapter file of a training run")
    parser.add_argument("images", nargs="+", help="files, folders or globs")
    parser.add_argument("--out", default="predictions", help="folder for predictions.jsonl and the pictures")
    parser.add_argument("--weights", help="base weights in place of those that the adapter file names")
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--no-pictures", action="store_true", help="write the JSON lines only")
    parser.add_argument("--strict", action="store_true", help="stop at the first unreadable image")
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
    from tqdm import tqdm

    from ..files import atomic
    from ..predict.image import Predictor
    from ..visualization.overlay import label_overlay
    from ..visualization.picture import save_picture

    paths = find_images(args.images)
    predictor = Predictor(args.adapter, weights=args.weights, device=args.device)
    out = Path(args.out)
    results, names = out / "predictions.jsonl", picture_names(paths)
    bad = 0
    with atomic(results) as temporary, open(temporary, "w") as file:
        answers = predictor.predict_files(paths, args.batch_size, args.strict)
        for path, image, answer in tqdm(answers, total=len(paths), unit="image", disable=not sys.stderr.isatty()):
            file.write(json.dumps({"path": str(path), **answer}) + "\n")
            bad += "error" in answer
            if "error" not in answer and not args.no_pictures:
                picture = label_overlay(image, [f"{answer['label']} {answer['score']:.0%}"])
                save_picture(out / names[path], picture)
    if bad == len(paths):
        raise InputError(f"none of the {bad} images could be read; {results} says why")
    print(f"{len(paths) - bad} images, wrote {results}" + (f"; {bad} unreadable, marked with 'error'" if bad else ""))
    return 0


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
