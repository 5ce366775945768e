"""The convolution, the block and the network of DSCF-SR."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from visadapt.adapters.conv_lora import ConvLoRA
from visadapt.backbones.base import Backbone
from visadapt.backbones.dscf import DSCF, SConvLB
from visadapt.convert.dscf import WRAPPED
from visadapt.core.adapted import Adapted
from visadapt.core.sites import Site

PUBLISHED = "team23_DSCF.pth"


class Convolutions(Backbone):
    """A network whose sites are its convolutions."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def sites(self):
        convs = [(path, m) for path, m in self.body.named_modules() if isinstance(m, nn.Conv2d)]
        sizes = [(path, "conv", n, m.in_channels, m.out_channels) for n, (path, m) in enumerate(convs)]
        return [Site(*size, layout="NCHW") for size in sizes]


def adapt(body, official, kit):
    """The body with ConvLoRA and the kit's values, its pieces, and what trains by official names.

    `official` begins the names of a convolution's values in the kit, by its path in the body.
    """
    given = kit.group("param")
    state = {f"{path}.{k}": given.get(f"{prefix}{k}") for path, prefix in official.items() for k in ("weight", "bias")}
    body.load_state_dict({k: v for k, v in state.items() if v is not None})
    adapted = Adapted(Convolutions(body))
    adapter = adapted.add("a", ConvLoRA(kit.args["r"], kit.args["lora_alpha"]))
    adapted.set_trainable("a")
    pieces, trained = list(adapter.pieces.values()), {}
    for piece in pieces:
        prefix = official[piece.site.path]
        piece.load_state_dict({"a": given[f"{prefix}lora_A"], "b": given[f"{prefix}lora_B"]})
        trained |= {f"{prefix}lora_A": piece.a, f"{prefix}lora_B": piece.b}
    return adapted.train(), pieces, trained


def gradients(x, trained):
    return {name: value.grad for name, value in trained.items()} | {"in/x": x.grad, "x": x.grad}


def dscf_conv(kit):
    args, x = kit.args, kit.group("in")["x"].requires_grad_()
    sizes = (args["in_channels"], args["out_channels"], args["kernel_size"], args.get("stride", 1), args["padding"])
    body = nn.Sequential(nn.Conv2d(*sizes, bias=args["bias"]))
    adapted, (piece,), trained = adapt(body, {"0": ""}, kit)
    outputs = {"y": body(x), "deltaW": piece.delta().view_as(body[0].weight)}
    (outputs["y"] * kit.group("in")["cotangent"]).sum().backward()
    adapted.eval().merge()
    return outputs | {"y_eval_merged": body(x), "weight_merged": body[0].weight}, gradients(x, trained)


def dscf_sconvlb(kit):
    x = kit.group("in")["x"].requires_grad_()
    block = SConvLB(kit.args["channels"])
    _, _, trained = adapt(block, {path: f"{path}.{WRAPPED}" for path, _ in block.named_children()}, kit)
    outputs = dict(zip(("out", "out1", "out2", "out3"), block.stages(x)))
    (outputs["out"] * kit.group("in")["cotangent"]).sum().backward()
    return outputs, gradients(x, trained)


@torch.no_grad()
def dscf_net(kit):
    """The kit holds no weights; it runs where the published file lies beside it."""
    weights = kit.path.with_name(PUBLISHED)
    if not weights.is_file():
        pytest.skip(f"needs the published {PUBLISHED} beside the kit")
    network = DSCF(str(weights)).eval()
    x = 255 * kit.group("in")["x"] - torch.tensor(network.mean).view(-1, 1, 1)
    return {"y": network.image(network(x))}, {}


BUILDERS = {"dscf_conv": dscf_conv, "dscf_sconvlb": dscf_sconvlb, "dscf_net": dscf_net}
