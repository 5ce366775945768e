"""The part of `visadapt predict` that writes class maps: PNG and overlay per picture, GeoTIFF per scene."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError, counted
from ._output import is_file_name, write_predictions


def predict_masks(args: argparse.Namespace, paths: list[Path], names: dict[Path, str]) -> int:
    """Class maps of pictures and scenes.

    Args:
        args: of the command.
        paths: pictures and scenes.
        names: a PNG name for each.

    Raises:
        InputError: a name of one mask that does not fit the images, or no readable image.
    """
    from ..predict.mask import MaskPredictor

    out = Path(args.out)
    if single := is_file_name(out):
        _check_single(out, paths)
    predictor = MaskPredictor(args.adapter, weights=args.weights, device=args.device, task=args.task)
    if not single:
        write_predictions(out, len(paths), _answers(args, predictor, paths, out, names))
    elif _is_scene(paths[0]):
        print("\n".join(_scene(args, predictor, paths[0], out).lines()))
    else:
        _picture(args, predictor, paths[0], out)
    return 0


def given_for_tiles(args: argparse.Namespace) -> list[str]:
    """The options about tiles that were given, as they are written."""
    return [f"--{name}" for name in ("tile", "overlap", "memory") if getattr(args, name) is not None]


def _is_scene(path: Path) -> bool:
    from ..datasets.files import RASTERS

    return path.suffix.lower() in RASTERS


def _check_single(out: Path, paths: list[Path]) -> None:
    """Refuse the name of one mask for several images, for an image whose mask is of another format, or for itself."""
    if len(paths) != 1:
        raise InputError(f"--out {out} is one mask, for one image; give a folder for {counted(len(paths), 'image')}")
    scene = _is_scene(paths[0])
    if _is_scene(out) if scene else out.suffix.lower() == ".png":
        if not scene and out.exists() and out.samefile(paths[0]):
            raise InputError(f"{paths[0]} would be overwritten; write the mask to another place than {out}")
        return
    what, suffix = ("scene is a GeoTIFF", ".tif") if scene else ("picture is a PNG", ".png")
    raise InputError(f"--out {out}: the mask of a {what}; give a name that ends in {suffix}, or a folder")


def _tiling(args: argparse.Namespace) -> dict[str, Any]:
    """What the user said about tiles, as arguments of the predictor."""
    memory = None if args.memory is None else args.memory * 1_000_000
    said = {"tile": args.tile, "overlap": args.overlap, "batch": args.batch_size, "memory": memory}
    return {name: value for name, value in said.items() if value is not None}


def _scene(args: argparse.Namespace, predictor: Any, path: Path, out: Path) -> Any:
    return predictor.predict_scene(path, out, key=predictor.key, **_tiling(args))


def _picture(args: argparse.Namespace, predictor: Any, path: Path, out: Path) -> None:
    """The mask of one picture in a file, and what is in it on the screen."""
    ((_, _, answer),) = predictor.predict_files([path], strict=True, **_tiling(args))
    if "error" in answer:
        raise InputError(f"{path}: {answer['error']}")
    _save(predictor, out, answer["mask"])
    height, width = answer["mask"].shape
    shares = ", ".join(f"{name} {share:.1%}" for name, share in answer["shares"].items()) or "no pixel has a class"
    print(f"wrote {out}: {width} x {height} pixels, {shares}")
    _say_without_tiles(args, "tile" in answer)


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
        found = {"mask": str(mask), "shares": report.shares, "tile": report.tile}
        yield path, {**found, "without_class": report.nodata, "unreadable_blocks": report.unreadable}


def _answers(
    args: argparse.Namespace, predictor: Any, paths: list[Path], out: Path, names: dict[Path, str]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Results as JSON values, the files being written on the way: scenes first, then pictures."""
    from tqdm import tqdm

    scenes = [p for p in paths if _is_scene(p)]
    yield from _scenes(args, predictor, {p: out / names[p].replace(".png", ".tif") for p in scenes})
    pictures, tiled = [p for p in paths if p not in scenes], bool(scenes)
    found = predictor.predict_files(pictures, args.batch_size or 8, args.strict, **_tiling(args))
    for path, image, answer in tqdm(found, total=len(pictures), unit="image", disable=not sys.stderr.isatty()):
        tiled |= "tile" in answer
        mask = answer.pop("mask", None)
        if mask is None:
            yield path, answer
            continue
        file = out / "masks" / names[path]
        _save(predictor, file, mask)
        if not args.no_pictures:
            _show(predictor, out / names[path], image, mask)
        yield path, {"mask": str(file), **answer}
    _say_without_tiles(args, tiled)


def _say_without_tiles(args: argparse.Namespace, tiled: bool) -> None:
    """Options about tiles that had no effect are told."""
    if not tiled and (given := given_for_tiles(args)):
        print(f"{', '.join(given)}: no image is larger than a tile; all were scored as a whole", file=sys.stderr)


def _save(predictor: Any, path: Path, mask: Any) -> None:
    from ..visualization.masks import default_palette, save_mask

    save_mask(path, mask, predictor.palette or default_palette(len(predictor.classes)))


def _show(predictor: Any, path: Path, image: Any, mask: Any) -> None:
    """The picture beside the classes in colour, with their names below; small, so of large ones not every pixel."""
    import numpy as np

    from ..visualization.masks import SIDE, comparison, default_palette, legend
    from ..visualization.picture import save_picture

    palette = predictor.palette or default_palette(len(predictor.classes))
    step = max(max(mask.shape) // (4 * SIDE), 1)
    shown = comparison(image[::step, ::step], None, mask[::step, ::step], palette)
    save_picture(path, np.concatenate([shown, legend(predictor.classes, palette, shown.shape[1])]))
