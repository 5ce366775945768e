"""CLIP-LoRA's attention."""

from __future__ import annotations

import torch
from timm.layers import Attention

from visadapt.adapters.lora import LoRA
from visadapt.backbones.base import Backbone
from visadapt.convert.clip_lora import clip_lora_keys
from visadapt.core.adapted import Adapted
from visadapt.core.sites import Site


class OneAttention(Backbone):
    """A single attention of timm with the sites of a transformer's block."""

    def __init__(self, width, heads):
        super().__init__()
        self.body = Attention(width, heads, qkv_bias=True)
        self.width = width

    def sites(self):
        d = self.width
        slices = [Site("qkv", role, 0, d, d, rows=(n * d, (n + 1) * d)) for n, role in enumerate("qkv")]
        return [*slices, Site("proj", "proj", 0, d, d)]


def cliplora_mha(kit):
    """Attention with low-rank updates; the official module works sequence-first and is merged in eval mode."""
    args, given, x = kit.args, kit.group("param"), kit.group("in")["x"].requires_grad_()
    backbone = OneAttention(args["embed_dim"], args["num_heads"])
    names = {"in_proj_": "qkv.", "out_proj.": "proj."}
    backbone.body.load_state_dict({n + s: given[f"base.{o}{s}"] for o, n in names.items() for s in ("weight", "bias")})
    targets = ["proj" if role == "o" else role for role in args["enable_lora"]]
    # the recorded training pass has its dropout forced to 0
    adapted = Adapted(backbone)
    adapter = adapted.add("a", LoRA(args["r"], args["lora_alpha"], scaling="sqrt", targets=targets))
    pieces = clip_lora_keys(given)
    assert set(pieces) == set(adapter.pieces)
    for key, values in pieces.items():
        adapter.pieces[key].load_state_dict(values)

    mask = kit.group("in").get("mask01")
    mask = None if mask is None else torch.zeros_like(mask).masked_fill(mask.bool(), float("-inf"))

    def run():
        return backbone.body(x.transpose(0, 1), attn_mask=mask).transpose(0, 1)

    outputs = {"y": adapted.train() and run()}
    (outputs["y"] * kit.group("in")["cotangent"]).sum().backward()
    official = {"a": "w_lora_A", "b": "w_lora_B"}
    names = {p.site.key: p.site.role + "_proj" * (p.site.role != "proj") for p in adapter.pieces.values()}
    gradients = {"in/x": x.grad, "x": x.grad} | {
        f"{names[key]}.{official[f]}": getattr(piece, f).grad for key, piece in adapter.pieces.items() for f in official
    }
    adapted.eval().merge()
    outputs["y_merged"] = run()
    for role, weight in zip("qkv", backbone.body.qkv.weight.chunk(3)):
        outputs[f"merged.{role}_proj.weight"] = weight
    outputs["merged.proj.weight"] = backbone.body.proj.weight
    return outputs, gradients


BUILDERS = {"cliplora_mha": cliplora_mha}
