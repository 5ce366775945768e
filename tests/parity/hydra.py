"""Hydra around one linear, and in a block of a vision transformer."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from timm.models.vision_transformer import Block
from torch import nn

from visadapt.adapters.hydra import Hydra
from visadapt.backbones.base import Backbone
from visadapt.core.adapted import Adapted
from visadapt.core.sites import Site


class Some(Backbone):
    """Any layers, with some of their linears as sites: path by role."""

    def __init__(self, body, paths):
        super().__init__()
        self.body, self.paths = body, paths

    def sites(self):
        linears = ((role, path, self.body.get_submodule(path)) for role, path in self.paths.items())
        return [Site(path, role, 0, m.in_features, m.out_features) for role, path, m in linears]

    def forward(self, x):
        return self.body(x)


def run(kit, body, rank, **places):
    """The adapted layers, their output and all gradients.

    Args:
        places: by role the path of the linear, and the official names of its branches.
    """
    backbone = Some(body, {role: path for role, (path, *_) in places.items()})
    adapted = Adapted(backbone)
    pieces = adapted.add("a", Hydra(rank, kit.args["scale"], kit.args["dropout"], targets=list(places))).pieces.values()
    official = dict(body.named_parameters())
    for piece in pieces:
        for branch, name in zip((piece.par, piece.seq), places[piece.site.role][1:]):
            official |= branch.named_parameters(prefix=name)
    given, fed = kit.parameters(), kit.group("in")
    assert set(official) == set(given)
    for name, value in official.items():
        value.data.copy_(given[name])
    adapted.train(kit.info["eval_or_train"] == "train").requires_grad_()
    y = backbone(fed["x"].requires_grad_())
    (y * fed["cot"]).sum().backward()
    gradients = {name: value.grad for name, value in official.items()} | {"in/x": fed["x"].grad}
    return adapted, {"y": y}, gradients


def hydra_layer(kit):
    layer = nn.Linear(kit.args["in_features"], kit.args["out_features"])
    body = nn.Sequential(OrderedDict(linear=layer))
    adapted, outputs, gradients = run(kit, body, kit.args["hidden_dim"], proj=("linear", "par", "seq"))
    adapted.merge()
    return outputs | {"merged_weight": layer.weight, "merged_bias": layer.bias}, gradients


def hydra_block(kit):
    args = kit.args
    norm = partial(nn.LayerNorm, eps=args["ln_eps"])
    block = Block(args["embed_dim"], args["heads"], qkv_bias=args["qkv_bias"], norm_layer=norm)
    proj = ("0.attn.proj", "0.attn.hydra_proj_par", "0.attn.hydra_proj_seq")
    fc2 = ("0.mlp.fc2", "0.mlp.hydra_mlp_par", "0.mlp.hydra_mlp_seq")
    _, outputs, gradients = run(kit, nn.Sequential(block), args["dim"], proj=proj, fc2=fc2)
    return outputs, gradients


BUILDERS = {"hydra_layer": hydra_layer, "hydra_block": hydra_block}
