"""`visadapt merge adapter.safetensors --out merged.safetensors`: base weights with the adapters folded in."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="adapter file")
    parser.add_argument("--out", required=True, help="file for the merged backbone, in the base's own layout")
    parser.add_argument("--names", nargs="+", default=[], help="adapters to fold; all by default")
    rest = (
        "adapter file for what does not fold, such as shifts in time, with the heads; its base is the merged backbone"
    )
    parser.add_argument("--rest", help=rest)
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
    backbone = {"type": made_for["type"], **made_for["arguments"]}
    backbone |= {} if args.weights is None else {"weights": args.weights}
    check_out(args.out, args.adapter, backbone.get("weights"))
    if args.rest:
        check_out(args.rest, args.adapter, backbone.get("weights"))
    adapted = Adapted(BACKBONES.build(backbone)).eval()
    adapted.load(args.adapter)
    patch, frames = adapted.backbone.patch, adapted.ctx.num_frames
    changed = adapted.merge(*args.names, check=torch.randn(2 * frames, adapted.backbone.in_chans, 4 * patch, 3 * patch))
    left = sorted({f"{p.owner} ({p.kind})" for p in adapted.pieces() if p.on})
    rest = _rest(adapted)
    if args.rest and (not rest or None in rest.values()):
        names = ", ".join(name for name, adapter in rest.items() if adapter is None)
        why = f"what is left of {names} does not work on its own" if rest else "everything folds"
        raise InputError(f"--rest {args.rest}: {why}; leave it out")
    state = {k: v.contiguous().clone() for k, v in adapted.backbone.body.state_dict().items()}
    with atomic(args.out) as temporary:
        save_file(state, temporary)
    said = f"merged {changed} modules into {args.out}, outputs equal on a probe"
    if args.rest:
        _write_rest(args, adapted, rest, backbone)
        said += f"; {args.rest} holds what does not fold: {', '.join(left)}"
    elif left:
        keeps = "" if None in rest.values() else "; --rest FILE keeps it"
        said += f"; not foldable and left out: {', '.join(left)}{keeps}"
    print(said)
    return 0


def _rest(adapted: Any) -> dict[str, Any]:
    """By name an adapter, not built yet, for the pieces of each that are still at work; None where there is none."""
    from ..registry import ADAPTERS

    found = {}
    for name in dict.fromkeys(p.owner for p in adapted.pieces() if p.on):
        adapter = adapted.adapters[name]
        whole = all(p.on for p in adapted.pieces(name))
        found[name] = (
            ADAPTERS.build({"type": type(adapter).__name__, **adapter.arguments()}) if whole else adapter.rest()
        )
    return found


def _write_rest(args: argparse.Namespace, merged: Any, rest: dict[str, Any], backbone: dict[str, Any]) -> None:
    """Write an adapter file for the merged backbone, which is in a file of its own by now."""
    from ..core.adapted import Adapted
    from ..core.io import save_like
    from ..registry import BACKBONES

    adapted = Adapted(BACKBONES.build(backbone | {"weights": args.out})).eval()
    adapted.ctx.num_frames = merged.ctx.num_frames
    for name, adapter in rest.items():
        adapted.add(name, adapter)
        for key, piece in adapter.pieces.items():
            piece.restore(merged.adapters[name].pieces[key].stored())
        shared = merged.adapters[name].common.state_dict()
        adapter.common.load_state_dict({key: shared[key] for key in adapter.common.state_dict()})
    save_like(adapted, args.rest, args.adapter)
