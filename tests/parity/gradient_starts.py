"""LoRA-GA, which starts from a gradient, and the DoRA of MapSAM, which starts from the norms of the weight."""

from __future__ import annotations

import torch
from torch import nn
from torch.testing import assert_close

from visadapt.adapters.lora_ga import LoRAGA
from visadapt.adapters.mapsam_dora import MapSAMDoRA
from visadapt.backbones.base import Backbone
from visadapt.core.adapted import Adapted
from visadapt.core.sites import Site


class OneLinear(Backbone):
    """A linear as "proj", and its three slices of rows as "q", "k" and "v"."""

    def __init__(self, weight, bias):
        super().__init__()
        o, i = weight.shape
        self.body = nn.ModuleDict({"fc": nn.Linear(i, o, bias is not None)})
        self.body.fc.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))

    def sites(self):
        o, i = self.body.fc.weight.shape
        slices = [Site("fc", role, 0, i, o // 3, rows=(n * o // 3, (n + 1) * o // 3)) for n, role in enumerate("qkv")]
        return [Site("fc", "proj", 0, i, o), *slices]


def loraga(kit):
    args, ins, theirs = kit.args, kit.group("in"), kit.group("out")
    adapted = Adapted(OneLinear(ins["W0"], ins.get("bias")))
    scaling = "sqrt" if args["use_rslora"] else "rank"
    options = dict(direction=args["direction"], start=args["scale"], gamma=args["stable_gamma"])
    made = LoRAGA(args["r"], args["lora_alpha"], scaling, **options, targets=["proj"])
    adapter = adapted.add("a", made)
    (piece,) = adapter.pieces.values()
    assert piece.scaling == args["scaling"]
    adapter.calibrate({piece.site.key: ins["grad"]})
    with torch.no_grad():  # singular vectors have no sign; A and B take different ones
        a = piece.a * (piece.a * theirs["lora_A"]).sum(1, keepdim=True).sign()
        b = piece.b * (piece.b * theirs["lora_B"]).sum(0).sign()
        piece.begin(a, b)
        assert not piece.delta().any()
        piece.b.zero_()  # what is left is what the official code makes of the base
        adapted.merge()
    return {"lora_A": a, "lora_B": b, "BA": b @ a, "W_new": adapted.backbone.body.fc.weight}, {}


def mapsam_dora(kit):
    args, given, ins = kit.args, kit.group("param"), kit.group("in")
    backbone = OneLinear(given["weight"], given.get("bias"))
    adapted = Adapted(backbone)
    pieces = adapted.add("a", MapSAMDoRA(args["r"])).pieces.values()
    official = {"a": "lora_A", "b": "lora_B", "m": "m"}
    for piece in pieces:
        for ours, theirs in official.items():
            value = getattr(piece, ours).data
            value.copy_(given[f"{theirs}_{piece.site.role}"].view_as(value))
    x = ins["x"].requires_grad_()
    y = backbone.body.fc(x)
    (y * ins["cot"]).sum().backward()
    gradients = {f"{theirs}_{p.site.role}": getattr(p, ours).grad for p in pieces for ours, theirs in official.items()}
    gradients = {k: g[None] if k.startswith("m_") else g for k, g in gradients.items()}
    adapted.merge()
    assert_close(backbone.body.fc(x), y)
    return {"y": y, "gx": x.grad}, gradients | {"in/x": x.grad}


BUILDERS = {"loraga": loraga, "mapsam_dora": mapsam_dora}
"""Our building blocks against recorded runs of the official implementations."""
