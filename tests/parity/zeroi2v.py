"""ZeroI2V in one block, with the official merge, and in a whole image tower; weights come through the converters."""

from __future__ import annotations

import torch

from visadapt.adapters.zeroi2v import ZeroI2V
from visadapt.backbones.timm_vit import TimmViT
from visadapt.convert import convert
from visadapt.convert.zeroi2v import LINEARS, PLACES, zeroi2v_keys
from visadapt.core.adapted import Adapted

BLOCK = "transformer.resblocks."
LEAVES = [(place, linear, leaf) for place in PLACES for linear in LINEARS for leaf in ("weight", "bias")]


def tower(state, **arch):
    """An image tower with the weights of an official state."""
    backbone = TimmViT("vit_base_patch16_clip_quickgelu_224", arch=arch)
    backbone.body.load_state_dict(convert(state, backbone.body).state)
    return backbone


def adapt(state, backbone, offsets, **arguments):
    """An adapter with the tensors of an official state, its dropout off as in evaluation."""
    adapted = Adapted(backbone).eval()
    pieces = zeroi2v_keys(state)
    stem = pieces["trunk_xx_stem"]
    adapted.ctx.num_frames = len(stem["embedding"])
    adapter = adapted.add("a", ZeroI2V(adapted.ctx.num_frames, offsets, **arguments))
    adapter.common.load_state_dict(pieces["shared"])
    adapter.pieces["trunk_xx_stem"].load_state_dict(stem)
    adapted.set_trainable("a")
    return adapted.eval()


def official_gradients(adapter, prefix):
    """Of the linear adapters, by official names; `prefix` is how those of block i begin."""
    own = dict(adapter.common.named_parameters())
    blocks = sorted({int(name[:2]) for name in own})
    return {
        f"{prefix(i)}{place}.{linear}.{leaf}": own[f"{i:02d}_{PLACES[place]}.{LINEARS[linear]}.{leaf}"].grad
        for i in blocks
        for place, linear, leaf in LEAVES
    }


def zeroi2v_block(kit):
    args, fed, d = kit.args, kit.group("in"), kit.args["d_model"]
    assert args["stdha_cfg"]["shift_div"] == args["n_head"]  # one head each way
    state = {f"{BLOCK}0.{k}": v for k, v in kit.parameters().items()}
    rest = {"class_embedding": (d,), "positional_embedding": (5, d), "conv1.weight": (d, 3, 8, 8)}
    rest |= {f"{norm}.{leaf}": (d,) for norm in ("ln_pre", "ln_post") for leaf in ("weight", "bias")}
    state |= {k: torch.zeros(shape) for k, shape in rest.items()}
    state["temporal_embedding"] = torch.zeros(1, args["num_frames"], d)
    backbone = tower(state, depth=1, embed_dim=d, num_heads=args["n_head"], img_size=16, patch_size=8)
    adapted = adapt(state, backbone, [[1, 1], [-1, 1]], ratio=args["mlp_ratio"], scaling=args["scale"])
    x = fed["x"].transpose(0, 1)
    adapted.ctx.begin(x, (2, 2), prefix=1)
    y = backbone.body.blocks[0](x).transpose(0, 1)
    (y * fed["cotangent"]).sum().backward()
    gradients = official_gradients(adapted.adapters["a"], lambda i: "")
    adapted.merge()
    block = backbone.body.blocks[0].state_dict()
    assert torch.allclose(backbone.body.blocks[0](x).transpose(0, 1), y, atol=1e-5)
    names = dict(attn_in="attn.qkv", attn_out="attn.proj", mlp_in="mlp.fc1", mlp_out="mlp.fc2")
    official = dict(attn_in="attn.in_proj_", attn_out="attn.out_proj.", mlp_in="mlp.c_fc.", mlp_out="mlp.c_proj.")
    merged = {f"merged.{official[n]}{leaf}": block[f"{names[n]}.{leaf}"] for n in names for leaf in ("weight", "bias")}
    merged |= {f"merged.ln_{n}.{leaf}": block[f"norm{n}.{leaf}"] for n in (1, 2) for leaf in ("weight", "bias")}
    return {"y": y, **merged}, gradients


def zeroi2v_vit(kit):
    args, fed, state = kit.args, kit.group("in"), kit.parameters()
    sizes = dict(embed_dim=args["width"], num_heads=args["heads"], img_size=args["input_resolution"])
    backbone = tower(state, depth=args["layers"], patch_size=args["patch_size"], **sizes)
    adapted = adapt(state, backbone, [[1, 1], [-1, 1], [2, 1]], scaling=args["adapter_scale"])
    for parameter in backbone.body.norm.parameters():
        parameter.requires_grad_()
    video = fed["video"]
    clips, frames = video.shape[0], video.shape[2]
    features = adapted(video.transpose(1, 2).flatten(0, 1)).cls
    y = features.view(clips, frames, -1).transpose(1, 2)[..., None, None]
    (y * fed["cotangent"]).sum().backward()
    gradients = official_gradients(adapted.adapters["a"], lambda i: f"{BLOCK}{i}.")
    gradients["temporal_embedding"] = adapted.adapters["a"].pieces["trunk_xx_stem"].embedding.grad[None]
    gradients |= {f"ln_post.{leaf}": getattr(backbone.body.norm, leaf).grad for leaf in ("weight", "bias")}
    return {"feat": y}, gradients


BUILDERS = {"zeroi2v_block": zeroi2v_block, "zeroi2v_vit": zeroi2v_vit}
