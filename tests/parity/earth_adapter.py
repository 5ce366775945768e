"""Earth-Adapter behind blocks that do nothing, and its two bands."""

from __future__ import annotations

import torch
from parity.rein import Idle

from visadapt.adapters.earth_adapter import EarthAdapter, low_band
from visadapt.convert.earth_adapter import earth_adapter_keys
from visadapt.core.adapted import Adapted


def built(kit, depth, channels, grid, layers):
    """The adapter with the kit's values, on blocks that do nothing."""
    args, given = kit.args, kit.parameters()
    adapted = Adapted(Idle(depth, channels, patch=16))
    width = given["refine_token"].shape[2] if args["with_token"] else 0
    mixed = [n for n in args["fft_layer"] if n in layers]
    options = dict(token_width=width, token_grid=grid, layers=layers)
    made = EarthAdapter(args["dim"], mixed, args["cutoff_ratio"], args["scale"], **options)
    adapter = adapted.add("a", made)
    keys = earth_adapter_keys(given, mixed, layers)
    assert set(keys) == set(adapter.pieces)
    for key, values in keys.items():
        adapter.pieces[key].load_state_dict(values)
    adapted.set_trainable("a")
    adapted.ctx.begin(torch.zeros(1), tuple(grid), prefix=1)
    return adapted, adapter


def official_gradients(adapter, depth):
    """Gradients by official names; blocks without a piece, and pieces that were not run, have zeros."""
    found, parts = {}, {"down": 0, "up": 2}
    pieces = {piece.site.layer: piece for piece in adapter.pieces.values()}
    for layer, piece in pieces.items():
        for n, expert in enumerate(piece.experts, 1):
            for part, number in parts.items():
                for leaf, value in getattr(expert, part).named_parameters():
                    found[f"mlp_list{n}.{layer}.{number}.{leaf}"] = value.grad
        if len(piece.experts) > 1:
            found |= {f"router.{layer}.{leaf}": value.grad for leaf, value in piece.router.named_parameters()}
    zero, grads = torch.zeros(()), {n: p.alpha.grad for n, p in pieces.items() if p.alpha.grad is not None}
    found["scale"] = torch.stack([grads.get(n, zero) for n in range(depth)])
    if next(iter(pieces.values())).tokens is not None:
        empty = torch.zeros_like(next(iter(pieces.values())).tokens)
        found["refine_token"] = torch.stack([pieces[n].tokens.grad if n in pieces else empty for n in range(depth)])
    return found


def bands(patches, grid, ratio):
    low = low_band(patches, grid, ratio)
    return low, patches - low


def earth_adapter_small(kit):
    args, fed = kit.args, kit.group("in")
    depth, grid = args["num_layers"], tuple(args["grid"])
    adapted, adapter = built(kit, depth, args["embed_dims"], grid, args["adapter_layer"])
    x = fed["tokens"].requires_grad_()
    both = bands(x[:, 1:], grid, args["cutoff_ratio"])
    outputs, stream = dict(zip(("low", "high"), (b.mT.unflatten(2, grid) for b in both))), x
    for n, block in enumerate(adapted.backbone.body):
        stream = outputs[f"tokens_after_{n}"] = block(stream)
    (stream * fed["cot"]).sum().backward()
    return outputs, official_gradients(adapter, depth) | {"in/tokens": x.grad}


def earth_adapter(kit):
    args, fed = kit.args, kit.group("in")
    layers, rows = [args["plain_layer"], args["layer"]], fed["rows"].long()
    adapted, adapter = built(kit, 24, 1024, (32, 32), layers)
    x = (fed["u"] @ fed["v"])[None]
    blocks = adapted.backbone.body
    tokens = blocks[args["layer"]](x)
    (tokens[0] * (fed["cu"] @ fed["cv"])).sum().backward()
    low, high = (band[0, rows[1:5] - 1] for band in bands(x[:, 1:], (32, 32), args["cutoff_ratio"]))
    with torch.no_grad():
        plain = blocks[args["plain_layer"]](x)
    outputs = {"tokens_rows": tokens[0, rows], "plain_rows": plain[0, rows], "low_rows": low, "high_rows": high}
    return outputs, official_gradients(adapter, 24)


BUILDERS = {"earth_adapter": earth_adapter, "earth_adapter_small": earth_adapter_small}
