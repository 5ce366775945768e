"""The part of `visadapt predict` that writes class maps: PNG and overlay per picture, GeoTIFF per scene."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError
from ._output import write_predictions


def predict_masks(args: argparse.Namespace, paths: list[Path], names: dict[Path, str]) -> int:
    """Class maps of pictures and scenes.

    Args:
        args: of the command.
        paths: pictures and scenes.
        names: a PNG name for each.

    Raises:
        InputError: several images for one .tif, or no readable image.
    """
    from ..datasets.files import RASTERS
    from ..predict.mask import MaskPredictor

    out = Path(args.out)
    single = out.suffix.lower() in RASTERS
    if single and (len(paths) != 1 or paths[0].suffix.lower() not in RASTERS):
        raise InputError(f"--out {out} is one mask, for one scene in a .tif; give a folder for {len(paths)} images")
    predictor = MaskPredictor(args.adapter, weights=args.weights, device=args.device, task=args.task)
    if single:
        print("\n".join(_scene(args, predictor, paths[0], out).lines()))
        return 0
    write_predictions(out, len(paths), _answers(args, predictor, paths, out, names))
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

    from ..datasets.files import RASTERS
    from ..visualization.masks import comparison, default_palette, legend
    from ..visualization.picture import save_picture

    palette = predictor.palette or default_palette(len(predictor.classes))
    scenes = [p for p in paths if p.suffix.lower() in RASTERS]
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
