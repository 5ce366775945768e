"""`visadapt convert file --model NAME --out file`: published backbone weights in timm's layout."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", help="checkpoint: official or Hugging Face DINOv2, CLIP, ConvNeXt, torchvision's ResNets, timm"
    )
    parser.add_argument("--model", required=True, help="timm model that the weights are for")
    parser.add_argument("--out", required=True, help="safetensors file to write")


def run(args: argparse.Namespace) -> int:
    from safetensors.torch import save_file

    from ..backbones.timm_model import family_of
    from ..files import atomic
    from ..registry import BACKBONES
    from ._output import check_out

    check_out(args.out, args.file)
    backbone = BACKBONES.build({"type": family_of(args.model), "name": args.model, "weights": args.file})
    state = {k: v.contiguous().clone() for k, v in backbone.body.state_dict().items()}
    with atomic(args.out) as temporary:
        save_file(state, temporary)
    print(backbone.weight_report)
    print(f"wrote {args.out}; use it as weights='{args.out}'")
    return 0
