"""QWHA."""

from __future__ import annotations

import torch
from torch import nn

from visadapt.adapters._common.hadamard import Hadamard
from visadapt.adapters.qwha import QWHASite, random_places
from visadapt.backbones.base import Backbone
from visadapt.core.adapted import Adapted
from visadapt.core.inject import attach
from visadapt.core.sites import Site


class OneLinear(Backbone):
    """A linear with these values."""

    def __init__(self, weight, bias):
        super().__init__()
        self.body = nn.ModuleDict({"fc": nn.Linear(weight.shape[1], weight.shape[0], bias is not None)})
        self.body.load_state_dict({"fc.weight": weight} | ({} if bias is None else {"fc.bias": bias}))

    def sites(self):
        fc = self.body["fc"]
        return [Site("fc", "fc1", 0, fc.in_features, fc.out_features)]


def official_transform(matrix):
    """Our transform with the block that the official one has."""
    order = len(matrix)
    for power in reversed(range(order.bit_length())):
        if order % (1 << power) == 0:
            made = Hadamard(matrix[:: 1 << power, :: 1 << power].clone(), order)
            if torch.equal(made(torch.eye(order)), matrix):
                return made
    raise AssertionError(f"the transform of order {order} is no block times a natural-order Sylvester matrix")


def qwha(kit):
    """The official output lacks the bias of the base. Its numbers of values need not be rank (i + o)."""
    args, given, ins = kit.args, kit.group("param"), kit.group("in")
    adapted = Adapted(OneLinear(given["base_layer.weight"], given.get("base_layer.bias")))
    fc, (site,) = adapted.backbone.body["fc"], adapted.backbone.sites()
    o, i = fc.weight.shape
    index = random_places(o, i, args["n_frequency"], args["random_loc_seed"])
    assert torch.equal(torch.stack([index // i, index % i]), given["qhft_indices_default"].long())
    transform = official_transform(kit.group("aux")["H_transform_of_identity"])
    piece = QWHASite(site, (o, i), index, transform, args["scaling"], None)
    assert piece.stored().keys() == {"values"}
    piece.load_state_dict({"values": given["qhft_spectrum.default"]})
    attach(piece, adapted.backbone, adapted.ctx)
    piece.on = True
    y = fc(ins["x"])
    (y * ins["cotangent"]).sum().backward()
    y = y if fc.bias is None else y - fc.bias
    return {"y": y, "deltaW": piece.delta()}, {"qhft_spectrum.default": piece.values.grad}


BUILDERS = {"qwha": qwha}
