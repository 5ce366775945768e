"""Rein behind blocks that do nothing, and its queries."""

from __future__ import annotations

import torch
from torch import nn

from visadapt.adapters.rein import Rein
from visadapt.backbones.base import Backbone
from visadapt.convert.rein import rein_keys
from visadapt.core.adapted import Adapted
from visadapt.core.sites import Site


class Idle(Backbone):
    """Blocks that give what they get."""

    capabilities = frozenset({"tokens"})
    in_chans, prefix = 3, 1

    def __init__(self, depth, width, patch):
        super().__init__()
        self.body = nn.Sequential(*(nn.Identity() for _ in range(depth)))
        self.depth, self.width, self.patch = depth, width, patch
        self.scale = nn.Parameter(torch.ones(()))  # any parameter tells the device

    def sites(self):
        return [Site(str(n), "block", n, self.width, self.width) for n in range(self.depth)]


def official_gradients(adapter, given):
    """Gradients by official names; those of tokens stand in one tensor for all blocks."""
    pieces, common = adapter.pieces.values(), dict(adapter.common.named_parameters())
    found = {"learnable_tokens_a" if "learnable_tokens_a" in given else "learnable_tokens": [p.a for p in pieces]}
    if "learnable_tokens_b" in given:
        found["learnable_tokens_b"] = [p.b for p in pieces]
    gradients = {name: torch.stack([value.grad for value in values]) for name, values in found.items()}
    ours = {"scale": "refiner.strength"}
    for theirs, part in dict(mlp_token2feat="refiner.value", mlp_delta_f="refiner.out").items():
        ours |= {f"{theirs}.{leaf}": f"{part}.{leaf}" for leaf in ("weight", "bias")}
    for theirs, part in dict(transform="link.project", merge="link.merge").items():
        ours |= {f"{theirs}.{leaf}": f"{part}.{leaf}" for leaf in ("weight", "bias")}
    return gradients | {theirs: common[name].grad for theirs, name in ours.items()}


def rein(kit):
    args, fed = kit.args, kit.group("in")
    adapted = Adapted(Idle(args["num_layers"], args["embed_dims"], args["patch_size"]))
    adapter = adapted.add("a", Rein(args["token_length"], args.get("lora_dim"), args["query_dims"]))
    keys = rein_keys(kit.parameters())
    adapter.common.load_state_dict(keys.pop("shared"))
    assert set(keys) == set(adapter.pieces)
    for key, values in keys.items():
        adapter.pieces[key].load_state_dict(values)
    adapted.set_trainable("a")
    x = fed["tokens"].requires_grad_()
    adapted.ctx.begin(x, (1, x.shape[1] - 1), prefix=1)
    outputs, stream = {}, x
    for n, block in enumerate(adapted.backbone.body):
        stream = outputs[f"tokens_after_{n}"] = block(stream)
    outputs["queries"] = adapted.queries()
    ((stream * fed["cot"]).sum() + (outputs["queries"] * fed["cot_queries"]).sum()).backward()
    return outputs, official_gradients(adapter, kit.parameters()) | {"in/tokens": x.grad}


BUILDERS = {"rein": rein, "rein_full": rein}
