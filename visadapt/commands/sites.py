"""Show the sites of a backbone: the places where adapters can be attached; or how large its projections get."""

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
    parser.add_argument("backbone", help="a config file, a timm model name, or '<backbone>:<model name>'")
    parser.add_argument("--norms", action="store_true", help="of a config: sizes of q, k, v over sqrt(ln tokens)")
    parser.add_argument("--adapter", help="with --norms: adapter file to load first")
    parser.add_argument("--images", type=int, default=8, help="with --norms: training images to look at")
    parser.add_argument("--json", action="store_true", help="print one list of objects")


def run(args: argparse.Namespace) -> int:
    if args.norms:
        return norms(args)
    if args.adapter is not None:
        raise InputError("--adapter goes with --norms; the sites are those of the backbone alone")
    found = [{column: getattr(site, column) for column in COLUMNS} for site in build(args.backbone).sites()]
    if args.json:
        print_json(found)
    else:
        print_table(found, COLUMNS)
    return 0


def norms(args: argparse.Namespace) -> int:
    """The norm check of "Computational Limits of LoRA" on training images of a config."""
    from ..benchmark.norms import attention_norms
    from ..config import load
    from ..datasets.base import collate
    from ..registry import DATASETS, TASKS

    if not args.backbone.endswith(".py"):
        raise InputError(f"--norms needs a config with weights and images, got '{args.backbone}'")
    if args.images < 1:
        raise InputError(f"--images must be at least 1, got {args.images}")
    cfg = load(args.backbone)
    task = TASKS.build(cfg.model).eval()
    if args.adapter is not None:
        task.adapted.load(args.adapter, heads=task.heads)
    dataset = DATASETS.build(cfg.train_dataloader["dataset"])
    batch = collate([dataset[i] for i in range(min(args.images, len(dataset)))])
    rows = attention_norms(task.adapted, task.data_preprocessor(batch)["inputs"])
    if args.json:
        print_json(rows)
    else:
        print_table([{k: f"{v:.3f}" if isinstance(v, float) else v for k, v in r.items()} for r in rows], list(rows[0]))
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
    from ..backbones.timm_model import TimmModel, family_of

    family, colon, name = text.partition(":")
    if text in BACKBONES.names():
        if issubclass(BACKBONES.get(text), TimmModel):
            raise InputError(f"{text} stands for many models; name one, as in {text}:vit_small_patch14_dinov2")
        return BACKBONES.build({"type": text})
    if not colon:
        family, name = family_of(text), text
    return BACKBONES.build({"type": family, "name": name, "weights": None})
