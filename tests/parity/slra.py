"""Low-rank spatial attention of a video transformer, on the tokens of a clip in one sequence."""

from __future__ import annotations

from torch import nn

from visadapt.adapters.slra import SLRA
from visadapt.backbones.base import Backbone
from visadapt.core.adapted import Adapted
from visadapt.core.sites import Site

OFFICIAL = {n: f"spatial_{n}_proj" for n in ("down", "up")} | {n: f"spatial_attn.{n}" for n in "qkvo"}


class Silent(Backbone):
    """A sub-layer that gives zeros, so that what comes out is the branch beside it."""

    capabilities = frozenset({"tokens"})

    def __init__(self, width):
        super().__init__()
        self.body, self.width = nn.Sequential(nn.Linear(width, width)), width
        for value in self.body.parameters():
            nn.init.zeros_(value)

    def sites(self):
        return [Site("0", "attn", 0, self.width, self.width)]


def slra(kit):
    args, given, x = kit.args, kit.group("param"), kit.group("in")["x"].requires_grad_()
    adapted = Adapted(Silent(args["dim"]))
    adapter = adapted.add("a", SLRA(args["rank"], args["num_heads"]))
    adapted.set_trainable("a")
    (piece,) = adapter.pieces.values()
    parts = (name.split(".") for name, _ in piece.named_parameters())
    names = {f"{part}.{value}": f"{OFFICIAL[part]}.{value}" for part, value in parts}
    piece.load_state_dict({ours: given[theirs] for ours, theirs in names.items()})
    adapted.ctx.num_frames = args["t"]
    adapted.ctx.begin(x, (args["h"], args["w"]), prefix=0)
    outputs = {"y": adapted.backbone.body(x)}
    (outputs["y"] * kit.group("in")["cot_y"]).sum().backward()
    return outputs, {theirs: piece.get_parameter(ours).grad for ours, theirs in names.items()} | {"in/x": x.grad}


BUILDERS = {"slra": slra}
