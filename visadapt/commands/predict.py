"""`visadapt predict adapter.safetensors images`: JSON lines and overlay pictures."""

from __future__ import annotations

import argparse
import glob
import json
import sys
from pathlib import Path

from ..errors import InputError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".npy"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="adapter file of a training run")
    parser.add_argument("images", nargs="+", help="files, folders or globs")
    parser.add_argument("--out", default="predictions", help="folder for predictions.jsonl and the pictures")
    parser.add_argument("--weights", help="base weights in place of those that the adapter file names")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--no-pictures", action="store_true", help="write the JSON lines only")
    parser.add_argument("--strict", action="store_true", help="stop at the first unreadable image")
    parser.add_argument("--device", help="cpu or cuda; what there is by default")


def find_images(patterns: list[str]) -> list[Path]:
    """Image files of files, folders (with their subfolders) and globs, in a stable order.

    Raises:
        InputError: a pattern gives nothing.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            matches = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        elif path.is_file():
            matches = [path]
        else:
            matches = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).suffix.lower() in SUFFIXES)
        if not matches:
            raise InputError(
                f"no images at '{pattern}'; give a file, a folder or a glob of {', '.join(sorted(SUFFIXES))}"
            )
        found |= dict.fromkeys(matches)
    return list(found)


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..files import atomic
    from ..predict.image import Predictor

    paths = find_images(args.images)
    predictor = Predictor(args.adapter, weights=args.weights, device=args.device)
    out = Path(args.out)
    results = out / "predictions.jsonl"
    bad = 0
    with atomic(results) as temporary, open(temporary, "w") as file:
        answers = predictor.predict_files(paths, args.batch_size, args.strict)
        for path, image, answer in tqdm(answers, total=len(paths), unit="image", disable=not sys.stderr.isatty()):
            file.write(json.dumps({"path": str(path), **answer}) + "\n")
            bad += image is None
            if image is not None and not args.no_pictures:
                save_picture(out, path, image, answer)
    print(f"{len(paths) - bad} images, wrote {results}" + (f"; {bad} unreadable, marked with 'error'" if bad else ""))
    return 0


def save_picture(out: Path, path: Path, image, answer: dict) -> None:
    """The image with its label, as PNG under a name that keeps same-named files of other folders apart."""
    import cv2

    from ..files import atomic
    from ..visualization.overlay import label_overlay

    picture = label_overlay(image, [f"{answer['label']} {answer['score']:.0%}"])
    name = "__".join([p for p in path.with_suffix("").parts if p not in ("/", "..", ".")][-3:])
    with atomic(out / f"{name}.png") as temporary:
        cv2.imwrite(str(temporary), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
