"""`visadapt convert file`: published backbone weights in timm's layout, or a published adapter as an adapter file."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        help="checkpoint: official or Hugging Face DINOv2, CLIP, ConvNeXt, torchvision's ResNets, timm; with --config "
        "one of Cloud-Adapter, Rein or Earth-Adapter with its head",
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--model", help="timm model that the weights are for")
    target.add_argument("--config", help="config of the published model, whose adapter and head are filled")
    parser.add_argument("--out", required=True, help="safetensors file to write")


def run(args: argparse.Namespace) -> int:
    from ._output import check_out

    check_out(args.out, args.file)
    return weights(args) if args.model else adapter(args)


def weights(args: argparse.Namespace) -> int:
    from safetensors.torch import save_file

    from ..backbones.timm_model import family_of
    from ..files import atomic
    from ..registry import BACKBONES

    backbone = BACKBONES.build({"type": family_of(args.model), "name": args.model, "weights": args.file})
    state = {k: v.contiguous().clone() for k, v in backbone.body.state_dict().items()}
    with atomic(args.out) as temporary:
        save_file(state, temporary)
    print(backbone.weight_report)
    print(f"wrote {args.out}; use it as weights='{args.out}'")
    return 0


def adapter(args: argparse.Namespace) -> int:
    from .. import config
    from ..backbones.weights import read_file
    from ..convert.published import fill
    from ..core.io import save_adapter
    from ..registry import TASKS

    cfg = config.load(args.config)
    card = data_card(cfg)
    try:
        state = read_file(args.file)
    except InputError as error:
        raise InputError(f"{args.file}: {error}") from error
    task = TASKS.build(cfg.model).eval()
    for line in fill(task, state):
        print(line)
    save_adapter(task.adapted, args.out, heads=task.heads, extra=task.card() | card)
    print(f"wrote {args.out}; predict takes it, and test with the config")
    return 0


def data_card(cfg: Any) -> dict[str, Any]:
    """Classes and transforms of the config's evaluation set, which need not be on this machine."""
    from ..hooks.files import OF_FILES, of_files
    from ..registry import DATASETS

    dataset = (cfg.get("val_dataloader") or {}).get("dataset") or {}
    kind = DATASETS.get(dataset.get("type")) if dataset.get("type") is not None else None
    classes = dataset.get("classes") or getattr(kind, "CLASSES", None)
    if classes is None:
        raise InputError("the config's val_dataloader does not say the names of the classes")
    told = of_files({key: dataset.get(key) for key in OF_FILES} | {"palette": getattr(kind, "PALETTE", None)})
    channels = dataset.get("channels") or len(told.get("bands") or told.get("file_bands") or "rgb")
    transforms = [dict(entry) for entry in dataset.get("transform") or ()]
    return {"classes": [*classes], "transforms": transforms, "channels": channels, **told}
