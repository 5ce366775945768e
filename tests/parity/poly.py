"""Skills that tasks share, as PEFT and mttl compute them."""

from __future__ import annotations

import torch
from torch import nn

from visadapt.adapters.poly import Poly
from visadapt.backbones.base import Backbone
from visadapt.core.adapted import Adapted
from visadapt.core.sites import Site


class OneLinear(Backbone):
    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.body = nn.Linear(dim_in, dim_out)

    def sites(self):
        return [Site("", "proj", 0, self.body.in_features, self.body.out_features)]


def attach(kit, adapter, weight, bias):
    """The kit's linear with the adapter, in eval mode; the tasks of its images are set."""
    adapted = Adapted(OneLinear(kit.args["in_features"], kit.args["out_features"])).eval()
    adapted.backbone.body.load_state_dict({"weight": weight, "bias": bias})
    adapted.add("a", adapter)
    adapted.set_trainable("a")
    adapted.ctx.tasks = kit.group("in")["task_ids"].long()
    return adapted, adapter.pieces["trunk_00_proj"]


def run(kit, adapted, piece, names):
    """Outputs under tasks, weights of the skills, and gradients by the official names of a, b and logits."""
    given, fed = kit.group("param"), kit.group("in")
    values = {n: given[o].mT if n != "logits" else given[o].view_as(piece.logits) for n, o in names.items()}
    piece.load_state_dict(values, strict=False)
    y = adapted.backbone.body(fed["x"])
    (y * fed["cot_y"]).sum().backward()
    grads = {o: getattr(piece, n).grad for n, o in names.items()}
    gradients = {o: g.mT if g.ndim == 4 else g.flatten(1) for o, g in grads.items()}
    return {"y": y, "mixing_weights": piece.weights(adapted.ctx.tasks)}, gradients


def sizes(args):
    return {n: args[n] for n in ("n_tasks", "n_skills", "n_splits")}


def poly(kit):
    adapter = Poly(**sizes(kit.args), rank=kit.args["r"], targets=["proj"])
    adapted, piece = attach(kit, adapter, *(kit.group("param")[f"base_layer.{n}"] for n in ("weight", "bias")))
    ending = ".default"
    names = {"a": f"poly_lora_A{ending}", "b": f"poly_lora_B{ending}", "logits": f"poly_router{ending}.module_logits"}
    return run(kit, adapted, piece, names)


def mhr_poly(kit):
    """The selector's options stand in the kit's arguments under mttl's names; all are off where it names none."""
    on = [name for name, value in kit.args.items() if value is True]
    special = {"l2_norm": "l2", "straight_through": "rounded"}
    routing = next((r for o, r in special.items() if any(o in name for name in on)), "sigmoid")
    options = {o: any(o in name for name in on) for o in ("average_correction", "shared_skill")}
    args = kit.args
    assert args["scaling"] == args["alpha"] / args["rank"]
    adapter = Poly(**sizes(args), rank=args["rank"], alpha=args["alpha"], routing=routing, **options, targets=["proj"])
    adapted, piece = attach(kit, adapter, *(kit.group("param")[n] for n in ("weight", "bias")))
    names = {"a": "lora_a", "b": "lora_b", "logits": "selector.module_logits"}
    outputs, gradients = run(kit, adapted, piece, names)
    adapter.to_lora(adapted, "mean", None)
    with adapted.only("mean"), torch.no_grad():
        outputs["y_average_selector"] = adapted.backbone.body(kit.group("in")["x"])
    return outputs, gradients


BUILDERS = {"poly": poly, "mhr_poly": mhr_poly}
