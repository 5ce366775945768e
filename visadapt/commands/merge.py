"""`visadapt merge adapter.safetensors --out merged.safetensors`: base weights with the adapters folded in."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="adapter file")
    parser.add_argument("--out", required=True, help="file for the merged backbone, in the base's own layout")
    parser.add_argument("--names", nargs="+", default=[], help="adapters to fold; all by default")
    parser.add_argument("--weights", help="base weights in place of those that the adapter file names")


def run(args: argparse.Namespace) -> int:
    import torch
    from safetensors.torch import save_file

    from ..core.adapted import Adapted
    from ..core.io import read_manifest
    from ..files import atomic
    from ..registry import BACKBONES
    from ._output import check_out

    made_for = read_manifest(args.adapter)["backbone"]
    arguments = made_for["arguments"] | ({} if args.weights is None else {"weights": args.weights})
    check_out(args.out, args.adapter, arguments.get("weights"))
    adapted = Adapted(BACKBONES.build({"type": made_for["type"], **arguments})).eval()
    adapted.load(args.adapter)
    probe = torch.randn(2, adapted.backbone.in_chans, 4 * adapted.backbone.patch, 3 * adapted.backbone.patch)
    changed = adapted.merge(*args.names, check=probe)
    left = sorted({f"{p.owner} ({p.kind})" for p in adapted.pieces() if p.on})
    state = {k: v.contiguous().clone() for k, v in adapted.backbone.body.state_dict().items()}
    with atomic(args.out) as temporary:
        save_file(state, temporary)
    stays = f"; not foldable and left out: {', '.join(left)}" if left else ""
    print(f"merged {changed} modules into {args.out}, outputs equal on a probe{stays}")
    return 0
