"""`visadapt bench`: `offline`, `vtab`, `fgvc` and `fewshot` compare methods, `report` shows what is stored of them,
`train` stores results of single configs, `speed` takes ratios within one run, `parameters` counts on a ViT-B, `scene`
and `clips` measure whole scenes and the decoding of videos.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from ..errors import InputError, hint
from . import _sweeps
from ._arguments import positive
from ._output import write_json

SUITES = _sweeps.SUITES
OVER = ("floor", "peft", "textbook")
COLUMNS = {f"{kind} {over}": f"{kind}_over_{over}" for kind in ("step", "peak") for over in OVER}
COLUMNS |= {
    "step flops": "step_over_flops",
    "attn explicit": "attention_over_explicit",
    "merged base": "merged_over_base",
}


TAKEN: dict[str, Sequence[str]] = {
    **dict.fromkeys(("config", "overrides"), ("train",)),
    **dict.fromkeys(("seeds", "work_dir"), (*SUITES, "train")),
    **dict.fromkeys(("model", "size"), (*SUITES, "speed", "scene", "clips")),
    "batch": (*SUITES, "speed"),
    **dict.fromkeys(("method", "mixed", "rounds", "json"), ("speed",)),
    "device": ("speed", "clips"),
    "tile": ("scene",),
    "out": ("speed", "scene", "clips"),
    **dict.fromkeys(_sweeps.OPTIONS, SUITES),
}
"""The benchmarks that take an argument. None has a default in the parser, so that one that is given can be told."""


def _users(name: str) -> str:
    """The benchmarks that take an argument, for a person."""
    return ", ".join(dict.fromkeys("comparisons" if user in SUITES else user for user in TAKEN[name]))


def _whole(text: str) -> int:
    """A seed."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"it is a whole number of at least 0, not '{text}'")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def option(name: str, text: str, **more: Any) -> None:
        parser.add_argument(name, help=f"{_users(name.lstrip('-').replace('-', '_'))}: {text}", **more)

    parser.add_argument(
        "what",
        choices=[*SUITES, "report", "speed", "train", "parameters", "scene", "clips"],
        help="a comparison of methods, the report of all stored results, step times, single configs whose results are "
        "stored, the counts that 'visadapt list' shows, a whole scene, or decoding of videos",
    )
    option("config", "the config to run", nargs="?")
    option("overrides", "a.b.c=value", nargs="*", default=[])
    option(
        "--seeds",
        "one run and stored line each; 1 2 3 by default for fewshot, else 0 1 2",
        nargs="+",
        type=_whole,
        metavar="SEED",
    )
    option("--work-dir", f"where the runs go; {_sweeps.WORK_DIR} by default")
    option("--method", "adapters to time too, or 'all'", nargs="+", metavar="NAME")
    option("--model", "timm model; scene: vit (4 blocks of a ViT-S), tiny (4 of width 64) or conv")
    option("--size", "side of images in pixels; scene: of the scene", type=positive)
    option("--tile", "side of a tile in pixels; 512 by default", type=positive)
    option("--batch", "images per training step; speed: 8 by default", type=positive)
    option("--mixed", "images and adapters of the mixed batch; 32 by default", type=positive)
    option("--rounds", "measured rounds; 9 by default, of single methods a third", type=positive)
    option("--device", "where to run; cpu by default", choices=["cpu", "cuda"])
    option("--json", "print one JSON object", action="store_true")
    option("--out", "also write the JSON object to this file")
    _sweeps.add_arguments(parser)


def check(args: argparse.Namespace) -> None:
    """Refuse what would be ignored.

    Raises:
        InputError: an argument of another benchmark is given.
    """
    wrong = [name for name, users in TAKEN.items() if args.what not in users and getattr(args, name)]
    if "config" in wrong:
        words = " ".join(f"'{word}'" for word in (args.config, *args.overrides))
        more = "; name methods by --adapters, tasks by --tasks" if args.what in SUITES else ""
        raise InputError(f"bench {args.what} takes no {words}{more}")
    if wrong:
        options = ", ".join(f"--{name.replace('_', '-')} (of {_users(name)})" for name in wrong)
        raise InputError(f"bench {args.what} takes no {options}")


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
    check(args)
    if args.what in SUITES:
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
        train_and_store(args.config, args.overrides, _sweeps.seeds(args), Path(args.work_dir or _sweeps.WORK_DIR))
    for path in write_report():
        print(f"wrote {path}")
    return 0


def scene(args: argparse.Namespace) -> int:
    from ..benchmark.scene import measure_scene

    text = json.dumps(measure_scene(args.size or 5000, args.model or "vit", args.tile or 512), indent=1)
    write_json(args.out, text)
    print(text)
    return 0


def clips(args: argparse.Namespace) -> int:
    from ..benchmark.clips import measure_clips
    from ..benchmark.setup import Setup

    setup = Setup(args.model or "vit_small_patch16_224", args.size or 224, device=args.device or "cpu")
    setup.check()
    text = json.dumps(measure_clips(setup), indent=1)
    write_json(args.out, text)
    print(text)
    return 0


def speed(args: argparse.Namespace) -> int:
    chosen = methods(args.method or [])

    from ..benchmark.setup import Setup
    from ..benchmark.speed import measure

    model, size = args.model or "vit_small_patch16_224", args.size or 224
    setup = Setup(model, size, args.batch or 8, args.mixed or 32, args.rounds or 9, args.device or "cpu")
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
