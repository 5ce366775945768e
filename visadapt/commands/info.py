"""Show what an adapter file holds: adapters, base, head, classes and checksums."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from ._output import print_json

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""What a batch norm keeps beside its parameters."""

PARTS = {"format", "visadapt", "adapters", "backbone", "heads", "tensors", "sha256"}
"""Keys of a manifest that are shown in a form of their own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="an adapter file (.safetensors)")
    parser.add_argument("--json", action="store_true", help="print the whole manifest as one object")


def run(args: argparse.Namespace) -> int:
    from ..core.io import read_manifest, read_tensors

    path = Path(args.file)
    manifest = read_manifest(path)
    read_tensors(path, manifest)  # what is shown has the right checksum
    if args.json:
        print_json({"file": str(path), "bytes": path.stat().st_size, **manifest})
        return 0
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, written by visadapt {manifest['visadapt']}")
    for name, adapter in manifest["adapters"].items():
        count = parameters(manifest["tensors"], f"adapters/{name}/") + parameters(manifest["tensors"], f"base/{name}/")
        roles = ", ".join(dict.fromkeys(site["role"] for site in adapter["sites"]))
        at = f"{len(adapter['sites'])} sites ({roles})" if roles else "no sites"
        print(f"adapter   {name}: {call(adapter)}, {at}, {count:,} parameters")
    for name, head in manifest["heads"].items():
        print(f"head      {name}: {call(head)}, {parameters(manifest['tensors'], f'heads/{name}/'):,} parameters")
    print(f"backbone  {call(manifest['backbone'])}")
    print(f"base      sha256 {manifest['backbone']['fingerprint']}")
    print(f"tensors   sha256 {manifest['sha256']}")
    for key, value in manifest.items():
        if key not in PARTS and value not in (None, [], {}):
            print(f"{key:<9} {short(value)}")
    return 0


def call(part: dict[str, Any]) -> str:
    """Type and arguments as they would stand in Python, without those that are None; "…" where they are not known."""
    if part["arguments"] is None:
        return f"{part['type']}(…)"
    given = {k: v for k, v in part["arguments"].items() if v is not None}
    return f"{part['type']}({', '.join(f'{k}={v!r}' for k, v in given.items())})"


def parameters(tensors: dict[str, dict[str, Any]], prefix: str) -> int:
    """Values of the tensors below a prefix, without the statistics of batch norms."""
    chosen = [t for name, t in tensors.items() if name.startswith(prefix) and not name.endswith(STATISTICS)]
    return sum(math.prod(t["shape"]) for t in chosen)


def short(value: Any) -> str:
    """A manifest value on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items())
    if isinstance(value, list):
        return f"{len(value)}: " + ", ".join(map(str, value))
    return str(value)
