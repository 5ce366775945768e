"""The quantised matrices of Bi-LoRA and Bi-AdaptFormer, alone and on a block."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn

from visadapt.adapters._common.quantised import Quantised
from visadapt.adapters.bi_adaptformer import BiAdaptFormer
from visadapt.adapters.bi_lora import BiLoRA
from visadapt.adapters.lora import LoRA
from visadapt.backbones.base import Backbone
from visadapt.core.adapted import Adapted
from visadapt.core.sites import Site

PLAIN = 32
"""Bits of an official layer that is not quantised at all."""


def petl_qlinear(kit):
    given, ins, outputs, gradients = kit.group("param"), kit.group("in"), {}, {}
    for name, (_, _, bits) in kit.args.items():
        latent, x = given[f"{name}.weight"], ins[f"{name}.x"].requires_grad_()
        quantised = Quantised(latent.clone(), bits)
        y = F.linear(x, quantised())
        (y * ins[f"{name}.cot"]).sum().backward()
        gradients |= {f"{name}.weight": quantised.weight.grad, f"{name}.x": x.grad, f"in/{name}.x": x.grad}
        stored, fresh = quantised.stored(), Quantised(torch.randn_like(latent), bits)
        fresh.restore(**stored)
        assert torch.equal(fresh(), quantised())
        mean, std = stored["scale"]
        found = {"y": y, "code": quantised.levels, "bytes": stored["codes"], "mean": mean, "std": std}
        outputs |= {f"{name}.{k}": v for k, v in (found | {"loaded_weight": fresh()}).items()}
    return outputs, gradients


class OneBlock(Backbone):
    """A block of timm with the sites that the two adapters take."""

    def __init__(self, block, width):
        super().__init__()
        self.body, self.width = block, width

    def sites(self):
        d = self.width
        slices = [Site("attn.qkv", role, 0, d, d, rows=(n * d, (n + 1) * d)) for n, role in enumerate("qkv")]
        return [*slices, Site("drop_path2", "mlp_res", 0, d, d, source="norm2")]


def on_a_block(kit, adapter, prefix):
    """Output and gradients of the official names `prefix` gives for a piece and "down" or "up"."""
    args, given, ins = kit.args, kit.parameters(), kit.group("in")
    norm = partial(nn.LayerNorm, eps=args["ln_eps"])
    block = Block(args["embed_dim"], args["heads"], qkv_bias=args["qkv_bias"], norm_layer=norm)
    base = {k.removeprefix("0."): v for k, v in given.items() if "adapter" not in k}
    block.load_state_dict(base)
    adapted = Adapted(OneBlock(block, args["embed_dim"])).eval()
    pieces = adapted.add("a", adapter).pieces.values()
    latents = {}
    for piece in pieces:
        for ours, part in {"a": "down", "b": "up"}.items():
            value = getattr(piece, ours) if hasattr(piece, ours) else getattr(piece, part).weight
            latents[prefix(piece, part)] = value
            value.data.copy_(given[prefix(piece, part)])
    adapted.set_trainable("a")
    y = block(ins["x"])
    (y * ins["cot"]).sum().backward()
    return {"y": y}, {name: value.grad for name, value in latents.items()}


def petl_adaptformer(kit):
    args = kit.args
    adapter = BiAdaptFormer(args["dim"], args["bit"], args["s"])
    return on_a_block(kit, adapter, lambda piece, part: f"0.adapter_mlp.adapter_{part}.weight")


def petl_lora(kit):
    args = kit.args
    if args["bit"] == PLAIN:
        adapter = LoRA(args["dim"], args["s"] * args["dim"], targets=["q", "v"])
    else:
        adapter = BiLoRA(args["dim"], args["bit"], args["s"])
    return on_a_block(kit, adapter, lambda piece, part: f"0.attn.lora_{piece.site.role}.adapter_{part}.weight")


BUILDERS = {"petl_qlinear": petl_qlinear, "petl_adaptformer": petl_adaptformer, "petl_lora": petl_lora}
"""Our building blocks against recorded runs of the official implementations."""
