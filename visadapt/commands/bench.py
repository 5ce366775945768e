"""`visadapt bench`: `offline`, `vtab`, `fgvc` and `fewshot` compare methods, `report` shows what is stored of them,
`train` stores results of single configs, `speed` takes ratios within one run, `parameters` counts on a ViT-B, `scene`
and `clips` measure whole scenes and the decoding of videos.
"""

from __future__ import annotations

import argparse
import json

from ..errors import InputError, hint
from . import _sweeps
from ._arguments import positive
from ._output import write_json

OVER = ("floor", "peft", "textbook")
COLUMNS = {f"{kind} {over}": f"{kind}_over_{over}" for kind in ("step", "peak") for over in OVER}
COLUMNS |= {
    "step flops": "step_over_flops",
    "attn explicit": "attention_over_explicit",
    "merged base": "merged_over_base",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=[*_sweeps.SUITES, "report", "speed", "train", "parameters", "scene", "clips"],
        help="a comparison of methods, the report of all stored results, step times, single configs whose results are "
        "stored, the counts that 'visadapt list' shows, a whole scene, or decoding of videos",
    )
    parser.add_argument("config", nargs="?", help="train: the config to run")
    parser.add_argument("overrides", nargs="*", default=[], help="train: a.b.c=value")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run and stored line each")
    parser.add_argument("--work-dir", default="work_dirs/bench", help="where the runs go")
    parser.add_argument("--method", nargs="+", default=[], metavar="NAME", help="speed: adapters to time too, or 'all'")
    parser.add_argument("--model", help="timm model; scene: vit (4 blocks of a ViT-S), tiny (4 of width 64) or conv")
    parser.add_argument("--size", type=positive, help="side of images in pixels; scene: of the scene")
    parser.add_argument("--tile", type=positive, default=512, help="scene: side of a tile in pixels")
    parser.add_argument("--batch", type=positive, help="images per training step; speed: 8")
    parser.add_argument("--mixed", type=positive, default=32, help="speed: images and adapters of the mixed batch")
    parser.add_argument("--rounds", type=positive, default=9, help="speed: measured rounds; of single methods a third")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="speed: where to run")
    parser.add_argument("--json", action="store_true", help="speed: print one JSON object")
    parser.add_argument("--out", help="speed, scene, clips: also write the JSON object to this file")
    _sweeps.add_arguments(parser)


def methods(names: list[str]) -> list[str]:
    """Adapter names that have pieces to time.

    Raises:
        InputError: an unknown name.
    """
    from ..registry import ADAPTERS

    known = ADAPTERS.names()
    if names == ["all"]:
        return [e.name for e in ADAPTERS.entries() if e.attributes.get("kinds") and e.name != "PEFT"]
    for name in names:
        if name not in known:
            raise InputError(f"unknown adapter '{name}'{hint(name, known)}")
    return names


def run(args: argparse.Namespace) -> int:
    if args.what in _sweeps.SUITES:
        return _sweeps.run(args)
    if args.what == "speed":
        return speed(args)
    if args.what == "scene":
        return scene(args)
    if args.what == "clips":
        return clips(args)
    if args.what == "parameters":
        from ..benchmark.parameters import write_parameters

        print(f"wrote {write_parameters()}")
        return 0
    from pathlib import Path

    from ..benchmark.report import write_report
    from ..benchmark.results import train_and_store

    if args.what == "train":
        if args.config is None:
            raise InputError("bench train needs a config: visadapt bench train configs/lora/….py --seeds 0 1 2")
        train_and_store(args.config, args.overrides, args.seeds, Path(args.work_dir))
    for path in write_report():
        print(f"wrote {path}")
    return 0


def scene(args: argparse.Namespace) -> int:
    from ..benchmark.scene import measure_scene

    text = json.dumps(measure_scene(args.size or 5000, args.model or "vit", args.tile), indent=1)
    write_json(args.out, text)
    print(text)
    return 0


def clips(args: argparse.Namespace) -> int:
    from ..benchmark.clips import measure_clips
    from ..benchmark.setup import Setup

    setup = Setup(args.model or "vit_small_patch16_224", args.size or 224, device=args.device)
    setup.check()
    text = json.dumps(measure_clips(setup), indent=1)
    write_json(args.out, text)
    print(text)
    return 0


def speed(args: argparse.Namespace) -> int:
    chosen = methods(args.method)

    from ..benchmark.setup import Setup
    from ..benchmark.speed import measure

    model, size = args.model or "vit_small_patch16_224", args.size or 224
    setup = Setup(model, size, args.batch or 8, args.mixed, args.rounds, args.device)
    setup.check()
    found = measure(setup, chosen)
    text = json.dumps(found, indent=1)
    write_json(args.out, text)
    print(text if args.json else table(found))
    return 0


def table(found: dict) -> str:
    """The figures for a person."""
    rows = [(k, v) for k, v in found.items() if isinstance(v, float)]
    where = f"{found['model']} at {found['size']} px, batch {found['batch']}, {found['device']}: {found['machine']}"
    lines = [where, *(f"{name:<36}{value:>10.3f}" for name, value in rows)]
    if found["methods"]:
        lines += ["", "training step and peak memory, ours over", f"{'':<18}" + "".join(f"{c:>16}" for c in COLUMNS)]
    for name, row in found["methods"].items():
        cells = [f"{row[c]:.2f}" if c in row else "" for c in COLUMNS.values()]
        lines.append(f"{name:<18}" + row.get("not_measured", "".join(f"{c:>16}" for c in cells)))
    return "\n".join(lines)
