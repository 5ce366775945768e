"""Show the sites of a backbone: the places where adapters can be attached."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..registry import BACKBONES
from ._output import print_json, print_table

if TYPE_CHECKING:
    from ..backbones.base import Backbone

COLUMNS = ("key", "role", "layer", "path", "dim_in", "dim_out", "rows", "layout")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backbone", help="a config file, a timm model name, or 'TimmViT:<model name>'")
    parser.add_argument("--json", action="store_true", help="print one list of objects")


def run(args: argparse.Namespace) -> int:
    found = [{column: getattr(site, column) for column in COLUMNS} for site in build(args.backbone).sites()]
    if args.json:
        print_json(found)
    else:
        print_table(found, COLUMNS)
    return 0


def build(text: str) -> Backbone:
    """The backbone that a config or a name means, with random weights.

    Raises:
        InputError: no such config, family or model.
    """
    if text.endswith(".py") or Path(text).is_file():
        from ..config import load

        backbone = load(text).model.get("backbone")
        if backbone is None:
            raise InputError(f"{text}: its model has no backbone")
        return BACKBONES.build({**backbone, "weights": None})
    family, colon, name = text.partition(":")
    if text in BACKBONES.names():
        raise InputError(f"{text} stands for many models; name one, as in {text}:vit_small_patch14_dinov2")
    family, name = (family, name) if colon else ("TimmViT", text)
    return BACKBONES.build({"type": family, "name": name, "weights": None})
