"""Small models and checks that the tests of several methods share."""

from __future__ import annotations

import torch
from cases import TINY
from torch.utils._python_dispatch import TorchDispatchMode

from visadapt.backbones.timm_vit import TimmViT
from visadapt.core.adapted import Adapted
from visadapt.core.sites import Site
from visadapt.testing import assert_close, noise, tiny_backbone


def vit(adapter):
    """A tiny ViT with an adapter away from its start."""
    adapted = Adapted(tiny_backbone(TINY["vit"])).eval()
    noise(adapted.add("a", adapter))
    adapted.set_trainable("a")
    return adapted


def on_vit_b(adapter):
    """The adapter, built for a ViT-B without values."""
    with torch.device("meta"):
        backbone = TimmViT("vit_base_patch16_224")
    adapter.build(backbone)
    return adapter


PLACES = {"attn_in": "T_Adapter_in", "attn_out": "S_Adapter", "mlp_in": "MLP_Adapter", "mlp_out": "MLP_Adapter_out"}
LINEARS = {"down": "D_fc1", "up": "D_fc2"}
TOWER = {
    **{"cls_token": "class_embedding", "pos_embed": "positional_embedding", "patch_embed.proj": "conv1"},
    **{"norm_pre": "ln_pre", "blocks": "transformer.resblocks", "norm1": "ln_1", "norm2": "ln_2"},
    **{"attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"},
}
"""Our names and those in published files of ZeroI2V, written out: the converter's tables would test themselves."""


def tower_name(key):
    for ours, theirs in TOWER.items():
        key = key.replace(ours, theirs)
    return key.replace("norm.", "ln_post.", 1) if key.startswith("norm.") else key


def zeroi2v_state(adapter, body, merged):
    """A ZeroI2V and its tower as the official code stores them, the linear adapters left out once they are merged."""
    state = {"temporal_embedding": adapter.pieces["trunk_xx_stem"].embedding[None]}
    for key, value in {} if merged else adapter.common.state_dict().items():
        (place, linear, leaf), block = key[3:].split("."), int(key[:2])
        state[f"transformer.resblocks.{block}.{PLACES[place]}.{LINEARS[linear]}.{leaf}"] = value
    for key, value in body.state_dict().items():
        state[tower_name(key)] = value.flatten() if key == "cls_token" else value.squeeze(0)
    return {f"backbone.{k}": v.detach().clone() for k, v in state.items()}


def linear_site(o, i):
    return Site("layer", "proj", 0, i, o)


def compiles(adapted):
    """Compiled as one graph, it has the gradients that it has without."""
    x = torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(1))
    torch.compiler.reset()
    runs = torch.compile(lambda x: adapted(x).tokens, backend="eager", fullgraph=True), lambda x: adapted(x).tokens
    parameters, cotangent = [*adapted.adapters.parameters()], torch.randn(adapted(x).tokens.shape)
    found, wanted = (torch.autograd.grad((f(x) * cotangent).sum(), parameters) for f in runs)
    for one, other in zip(found, wanted):
        assert_close(one, other, "gradient", 1e-4)


class Ops(TorchDispatchMode):
    """Operations as torch runs them, (name, tensors that they are given), and the tensors of those by oneDNN."""

    def __init__(self):
        super().__init__()
        self.all = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.all.append((op.name(), [x for x in args if isinstance(x, torch.Tensor)]))
        return op(*args, **kwargs or {})

    @property
    def onednn(self):
        return [tensors for name, tensors in self.all if name.startswith("mkldnn::")]
