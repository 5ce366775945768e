"""Kronecker products as updates: DiffuseKronA."""

from __future__ import annotations

from torch import nn

from visadapt.adapters.diffusekrona import DiffuseKronA
from visadapt.backbones.base import Backbone
from visadapt.core.adapted import Adapted
from visadapt.core.sites import Site


class OneLinear(Backbone):
    """A linear of zeros, so that its output is that of the update."""

    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(dim_in, dim_out, bias=False))
        nn.init.zeros_(self.body[0].weight)

    def sites(self):
        return [Site("0", "proj", 0, self.body[0].in_features, self.body[0].out_features)]

    def forward(self, x):
        return self.body(x)


def diffusekrona(kit):
    args, fed = kit.args, kit.group("in")
    adapted = Adapted(OneLinear(args["in_features"], args["out_features"]))
    (piece,) = adapted.add("a", DiffuseKronA(*args["rank"], targets=["proj"])).pieces.values()
    adapted.set_trainable("a")
    piece.load_state_dict({k.removesuffix(".weight"): v for k, v in kit.group("param").items()})
    outputs = {"y": adapted.backbone(fed["x"].requires_grad_()), "deltaW": piece.delta()}
    (outputs["y"] * fed["cotangent"]).sum().backward()
    return outputs, {f"{name}.weight": value.grad for name, value in piece.named_parameters()} | {"x": fed["x"].grad}


BUILDERS = {"diffusekrona": diffusekrona}
