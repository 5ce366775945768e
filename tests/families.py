"""The families of plain vision transformers that timm has, small."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import timm
import torch

from visadapt.testing import tiny_backbone

PATCH = 8
SMALL = dict(depth=2, embed_dim=48, num_heads=3, patch_size=PATCH, img_size=3 * PATCH)


@dataclass(frozen=True)
class Family:
    """A model of timm and what a reader of its paper would say about it."""

    name: str
    prefix: int = 1
    cls: bool = True
    split: bool = False  # q, k and v are three linears
    gate: bool = False  # the MLP has a gate of its own
    rope: bool = False
    arch: tuple[tuple[str, int], ...] = ()


FAMILIES = {
    "vit": Family("vit_small_patch16_224"),
    "vit-gap": Family("vit_medium_patch16_gap_240", prefix=0, cls=False),
    "vit-reg-gap": Family("vit_little_patch16_reg4_gap_256", prefix=4, cls=False),
    "vit-postnorm": Family("vit_base_patch16_rpn_224", prefix=0, cls=False),
    "deit": Family("deit_tiny_patch16_224"),
    "deit-distilled": Family("deit_tiny_distilled_patch16_224", prefix=2),
    "deit3": Family("deit3_small_patch16_224"),
    "dinov2": Family("vit_small_patch14_dinov2"),
    "dinov2-reg": Family("vit_small_patch14_reg4_dinov2", prefix=5),
    "dinov2-giant": Family("vit_giant_patch14_reg4_dinov2", prefix=5),
    "clip": Family("vit_base_patch16_clip_224"),
    "clip-quickgelu": Family("vit_base_patch16_clip_quickgelu_224"),
    "siglip": Family("vit_base_patch16_siglip_224", prefix=0, cls=False),
    "beit3": Family("beit3_base_patch16_224"),
    "aimv2": Family("aimv2_large_patch14_224", prefix=0, cls=False, gate=True),
    "eva": Family("eva_giant_patch14_224"),
    "eva02": Family("eva02_tiny_patch14_224", rope=True),
    "eva02-split": Family("eva02_base_patch14_224", split=True, gate=True, rope=True),
    "eva02-clip": Family("eva02_base_patch16_clip_224", split=True, gate=True, rope=True),
    "eva02-postnorm": Family("eva02_enormous_patch14_clip_224"),
    "dinov3": Family("vit_small_patch16_dinov3", prefix=5, rope=True),
    "dinov3-qkvb": Family("vit_small_plus_patch16_dinov3_qkvb", prefix=5, gate=True, rope=True),
    "rope-mixed": Family("vit_small_patch16_rope_mixed_224", rope=True),
    "pe-core": Family("vit_pe_core_tiny_patch16_384", rope=True),
    "sapiens2": Family("vit_base_patch16_sapiens2", prefix=9, split=True, rope=True, arch=(("num_kv_heads", 1),)),
}
every_family = pytest.mark.parametrize(
    "family",
    [
        pytest.param(key, marks=pytest.mark.skipif(not timm.is_model(family.name), reason="needs a newer timm"))
        for key, family in FAMILIES.items()
    ],
)


def config(family, **options):
    return dict(type="TimmViT", name=FAMILIES[family].name, arch=SMALL | dict(FAMILIES[family].arch), **options)


@functools.cache
def pristine(family):
    """A backbone that no test changes."""
    return tiny_backbone(config(family))


def own(family, **options):
    """timm's own model with the weights of `pristine`."""
    name, arch = FAMILIES[family].name, SMALL | dict(FAMILIES[family].arch)
    model = timm.create_model(name, num_classes=0, **arch, **options).eval()
    model.load_state_dict(pristine(family).body.state_dict())
    return model


def images(*size, batch=2, bands=3, seed=0):
    return torch.randn(batch, bands, *size, generator=torch.Generator().manual_seed(seed))


def attentions(backbone):
    return [site for site in backbone.sites() if site.role == "attn"]


@torch.no_grad()
def inputs_of(backbone, path):
    """Positional and keyword arguments that a module gets for an image."""
    caught = []
    module = backbone.body.get_submodule(path)
    handle = module.register_forward_pre_hook(lambda m, args, kwargs: caught.append((args, kwargs)), with_kwargs=True)
    backbone(images(2 * PATCH, 3 * PATCH))
    handle.remove()
    return caught[0]


def joined(features):
    return torch.cat([features.native[:, None], features.tokens], 1)
