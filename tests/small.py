"""Small models and checks that the tests of several methods share."""

from __future__ import annotations

import torch
from cases import TINY

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
