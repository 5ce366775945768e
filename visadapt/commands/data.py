"""`visadapt data check config.py`: read every sample and say what is in the data, and what is wrong with them."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ..errors import InputError, refusals
from ._output import print_table

SHOWN = 5
"""Examples of a problem that are named."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["check"], help="what to do with the data of a config")
    parser.add_argument("config", help="a config file")
    parser.add_argument("overrides", nargs="*", default=[], help="a.b.c=value, for keys that the config has")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from mmengine.runner import Runner

    from .. import config
    from ..datasets.inspect import inspect, misfit, twice

    cfg = config.load(args.config, args.overrides)
    statistics = normalisation(cfg.model.get("backbone"))
    datasets = {}
    for part in ("train", "val", "test"):
        if cfg.get(f"{part}_dataloader") is not None:
            with refusals(f"{part}_dataloader"):
                whole = Runner.build_dataloader(cfg[f"{part}_dataloader"], seed=0).dataset
            datasets |= inner(part, whole)
    findings = {part: inspect(dataset, progress=sys.stderr.isatty()) for part, dataset in datasets.items()}
    doubles = [*twice(findings)]
    told = {part: summary(found, datasets[part]) for part, found in findings.items()}
    for found in told.values():
        found["misfit"] = [] if statistics is None else misfit(found["bands"], *statistics)
    if args.json:
        print(json.dumps({**told, "equal_files": doubles}, indent=1))
    else:
        for part, found in told.items():
            show(part, found)
        for split, path, other, path2 in doubles[:SHOWN]:
            print(f"equal files: {path} ({split}) and {path2} ({other})")
    missing = missing_classes(findings["train"], datasets["train"]) if "train" in findings else []
    refuse(findings, doubles, missing)
    return 0


def normalisation(backbone: dict[str, Any] | None) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation per band that a backbone normalises by; None where a config cannot set them."""
    import torch

    from ..registry import BACKBONES

    if backbone is None:
        return None
    with torch.device("meta"):  # without values, which take seconds to fill
        built = BACKBONES.build({**backbone, "weights": None})
    return (built.mean, built.std) if {"mean", "std"} <= built.arguments().keys() else None


def inner(part: str, dataset: Any) -> dict[str, Any]:
    """The data sets that one is made of, by name; itself where it is made of none."""
    made_of = {f"{part} {n}": one for n, one in enumerate(getattr(dataset, "parts", ()))}
    made_of |= {f"{part} {name}": getattr(dataset, name) for name in ("source", "target") if hasattr(dataset, name)}
    return made_of or {part: dataset}


def summary(found: Any, dataset: Any) -> dict[str, Any]:
    """Findings as JSON values."""
    total = max(int(found.counts.sum()), 1)
    names = [*dataset.classes, "(ignored)"]
    rows = [{"class": n, found.unit: c, "share": round(c / total, 4)} for n, c in zip(names, found.counts.tolist())]
    return {
        "samples": found.samples,
        "frames": found.lengths(),
        "sizes": {f"{h}x{w}": n for (h, w), n in found.sizes.most_common()},
        "classes": rows if rows[-1][found.unit] else rows[:-1],
        "bands": found.bands.rows(getattr(dataset, "bands", None)),
        "unreadable": found.unreadable,
        "wrong": found.wrong,
    }


def show(part: str, found: dict[str, Any]) -> None:
    """A summary for a person."""
    sizes = ", ".join(f"{size} ({n})" for size, n in list(found["sizes"].items())[:SHOWN])
    more = f", … ({len(found['sizes'])} sizes)" if len(found["sizes"]) > SHOWN else ""
    print(f"{part}: {found['samples']:,} samples; height x width: {sizes}{more}")
    if found["frames"]:
        said = "frames: {min} to {max}, median {median}; clips with fewer than the {needed} asked for: {shorter}"
        print(said.format(**found["frames"]))
    print()
    for rows in (found["classes"], found["bands"]):
        if rows:
            shown = [{k: f"{v:,}" if isinstance(v, int) else v for k, v in row.items()} for row in rows]
            print_table(shown, [*rows[0]])
            print()
    if found["bands"]:
        listed = (f"{key}=[{', '.join(f'{row[key]:.4g}' for row in found['bands'])}]" for key in ("mean", "std"))
        print(*listed, sep=", ", end="\n\n")
    for problem in ("misfit", "unreadable", "wrong"):
        for line in found[problem][:SHOWN]:
            print(f"{problem}: {line}")


def refuse(findings: dict[str, Any], doubles: list[tuple[str, str, str, str]], more: list[str]) -> None:
    """Raise where something is wrong, `more` too; equal files within one split are told above and are no error."""
    shared = sum(split != other for split, _, other, _ in doubles)
    empty = [
        f"{part} has no labelled {found.unit}" for part, found in findings.items() if not int(found.counts[:-1].sum())
    ]
    counts = {
        "unreadable samples": sum(len(f.unreadable) for f in findings.values()),
        "samples with wrong labels or sizes": sum(len(f.wrong) for f in findings.values()),
        "files that are in two splits": shared,
    }
    problems = [f"{n} {what}" for what, n in counts.items() if n] + empty + more
    if problems:
        raise InputError(f"the data have problems: {', '.join(problems)}; examples stand above, all with --json")


def missing_classes(found: Any, dataset: Any) -> list[str]:
    """Classes of a training set that nothing is labelled with, as one problem; none where all of them are missing."""
    names = [name for name, count in zip(dataset.classes, found.counts.tolist()) if not count]
    if not names or len(names) == len(dataset.classes):
        return []
    ignored = found.unit == "pixels" and int(found.counts[-1])
    advice = " (255 is ignored: masks of 0 and 255 need label_map={0: 0, 255: 1})" if ignored else ""
    return [f"train has no {found.unit} of {', '.join(names[:5])}{advice}"]
