"""The part of `visadapt predict` that writes class maps: PNG and overlay per picture, GeoTIFF per scene."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError

SCENES = (".tif", ".tiff")


def predict_masks(args: argparse.Namespace, paths: list[Path], names: dict[Path, str]) -> int:
    """Class maps of pictures and scenes.

    Args:
        args: of the command.
        paths: pictures and scenes.
        names: a PNG name for each.

    Raises:
        InputError: several images for one .tif, or no readable image.
    """
    from ..files import atomic
    from ..predict.mask import MaskPredictor

    out = Path(args.out)
    single = out.suffix.lower() in SCENES
    if single and (len(paths) != 1 or paths[0].suffix.lower() not in SCENES):
        raise InputError(f"--out {out} is one mask, for one scene in a .tif; give a folder for {len(paths)} images")
    predictor = MaskPredictor(args.adapter, weights=args.weights, device=args.device, task=args.task)
    if single:
        print("\n".join(_scene(args, predictor, paths[0], out).lines()))
        return 0
    results, bad = out / "predictions.jsonl", 0
    with atomic(results) as temporary, open(temporary, "w") as file:
        for path, answer in _answers(args, predictor, paths, out, names):
            file.write(json.dumps({"path": str(path), **answer}) + "\n")
            bad += "error" in answer
    if bad == len(paths):
        raise InputError(f"none of the {bad} images could be read; {results} says why")
    print(f"{len(paths) - bad} images, wrote {results}" + (f"; {bad} unreadable, marked with 'error'" if bad else ""))
    return 0


def _scene(args: argparse.Namespace, predictor: Any, path: Path, out: Path) -> Any:
    memory = {} if args.memory is None else {"memory": args.memory * 1_000_000}
    tiles = {"tile": args.tile, "overlap": args.overlap, "batch": args.batch_size}
    return predictor.predict_scene(path, out, key=predictor.key, **tiles, **memory)


def _scenes(args: argparse.Namespace, predictor: Any, masks: dict[Path, Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Results of scenes, with the mask for each; what holds for many of them is printed once."""
    from ..datasets.files import UnreadableImage
    from ..predict.bands import UnsuitableImage

    told: set[str] = set()
    for path, mask in masks.items():
        try:
            report = _scene(args, predictor, path, mask)
        except (UnreadableImage, UnsuitableImage) as error:
            if args.strict:
                raise
            yield path, {"error": str(error)}
            continue
        report.notes = [note for note in report.notes if note not in told]
        told |= {*report.notes}
        print("\n".join(report.lines()))
        yield path, {"mask": str(mask), "without_class": report.nodata, "unreadable_blocks": report.unreadable}


def _answers(
    args: argparse.Namespace, predictor: Any, paths: list[Path], out: Path, names: dict[Path, str]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Results as JSON values, the files being written on the way: scenes first, then pictures."""
    import numpy as np
    from tqdm import tqdm

    from ..visualization.masks import comparison, default_palette, legend
    from ..visualization.picture import save_picture

    palette = predictor.palette or default_palette(len(predictor.classes))
    scenes = [p for p in paths if p.suffix.lower() in SCENES]
    yield from _scenes(args, predictor, {p: out / names[p].replace(".png", ".tif") for p in scenes})
    pictures = [p for p in paths if p not in scenes]
    found = predictor.predict_files(pictures, args.batch_size or 8, args.strict)
    for path, image, answer in tqdm(found, total=len(pictures), unit="image", disable=not sys.stderr.isatty()):
        mask = answer.pop("mask", None)
        if mask is None:
            yield path, answer
            continue
        file = out / "masks" / names[path]
        save_picture(file, mask)
        if not args.no_pictures:
            shown = comparison(image, None, mask, palette)
            key = legend(predictor.classes, palette, shown.shape[1])
            save_picture(out / names[path], np.concatenate([shown, key]))
        yield path, {"mask": str(file), **answer}
