"""`visadapt convert file`: published backbone weights in timm's layout, or a published adapter as an adapter file."""

from __future__ import annotations

import argparse
import inspect
import sys
from typing import Any

from ..errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        help="checkpoint: official or Hugging Face DINOv2, CLIP, ConvNeXt, torchvision's ResNets, timm; with --config "
        "one of Cloud-Adapter, Rein, Earth-Adapter or ZeroI2V with its head",
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
    from ..convert.published import fill, has_tower
    from ..core.io import save_adapter
    from ..registry import TASKS

    cfg = config.load(args.config)
    card = data_card(cfg)
    try:
        state = read_file(args.file)
    except InputError as error:
        raise InputError(f"{args.file}: {error}") from error
    override = ""
    if has_tower(state):
        cfg.model["backbone"]["weights"] = args.file
        override = f" and model.backbone.weights={args.file}"
        print(f"backbone: weights from {args.file}, whose image tower was trained or merged too")
    task = TASKS.build(cfg.model).eval()
    if (named := len(card["classes"])) != task.head.num_classes:
        raise InputError(f"val_dataloader has {named} classes, the head of the config {task.head.num_classes}")
    for line in fill(task, state):
        print(line)
    save_adapter(task.adapted, args.out, heads=task.heads, extra=task.card() | card)
    print(f"wrote {args.out}; predict takes it, and test with the config{override}")
    return 0


def data_card(cfg: Any) -> dict[str, Any]:
    """Classes, transforms and views of clips of the config's evaluation set, which need not be on this machine.

    Where neither config nor data set name the classes it is built for them. Where that fails they are numbers.
    """
    from ..datasets.clips import ClipDataset
    from ..hooks.files import OF_FILES, dataset_card, of_files
    from ..registry import DATASETS

    dataset = (cfg.get("val_dataloader") or {}).get("dataset") or {}
    if "type" not in dataset:
        raise InputError("the config has no val_dataloader; its data set says what the classes are and how to see them")
    kind = DATASETS.get(dataset["type"])
    classes = dataset.get("classes") or getattr(kind, "CLASSES", None)
    if classes is None:
        try:
            return dataset_card(DATASETS.build(dataset))
        except InputError as error:
            classes = numbers_for(cfg.model, str(error))
    if isinstance(kind, type) and issubclass(kind, ClipDataset):
        own = inspect.signature(ClipDataset).parameters.keys() - {"paths", "labels", "classes"}
        # of one clip, a file that is there: how clips are seen does not depend on them
        return dataset_card(ClipDataset([cfg.filename], [0], classes, **{k: dataset[k] for k in own & dataset.keys()}))
    told = of_files({key: dataset.get(key) for key in OF_FILES} | {"palette": getattr(kind, "PALETTE", None)})
    channels = dataset.get("channels") or len(told.get("bands") or told.get("file_bands") or "rgb")
    transforms = [dict(entry) for entry in dataset.get("transform") or ()]
    return {"classes": [*classes], "transforms": transforms, "channels": channels, **told}


def numbers_for(model: Any, reason: str) -> list[str]:
    """Numbers in place of the names of a model's classes, and a word about it."""
    count = (model.get("head") or {}).get("num_classes")
    if count is None:
        raise InputError(f"neither val_dataloader nor model.head say what classes there are ({reason})")
    said = f"classes are named 0 to {count - 1}, as the data set of val_dataloader cannot be read here: {reason}"
    print(f"visadapt: warning: {said}", file=sys.stderr)
    return [*map(str, range(count))]
