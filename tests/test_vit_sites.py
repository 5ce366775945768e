"""Where adapters go in the families of plain vision transformers: sites, and views of their attentions."""

from __future__ import annotations

import copy
import functools
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, SMALL, attentions, every_family, images, inputs_of, joined, own, pristine
from small import Ops
from torch import nn

from visadapt.adapters.lora import LoRA
from visadapt.core.adapted import Adapted
from visadapt.core.adapter import Adapter
from visadapt.core.kinds import AttnCore
from visadapt.core.products import ONEDNN
from visadapt.core.sites import CONVS, LINEARS, NORMS, ROLES
from visadapt.errors import InputError
from visadapt.testing import assert_close, noise, tiny_backbone


# ---- sites -----------------------------------------------------------------------------------------------------------
@every_family
def test_sites_say_what_is_there(family):
    backbone, facts = pristine(family), FAMILIES[family]
    sites, prompts = backbone.sites(), set() if facts.rope else {"prompts"}
    assert backbone.prefix == facts.prefix and backbone.capabilities == {"tokens", "maps", "attention"} | prompts
    keys = [site.key for site in sites]
    assert len(set(keys)) == len(keys) and not any("." in key for key in keys)
    inner = {"q", "k", "v", "proj", "fc1", "fc2", "attn", "mlp", "attn_res", "mlp_res", "block"}
    inner |= set() if facts.split else {"qkv"}
    inner |= {"gate"} if facts.gate else set()
    for i, block in enumerate(backbone.body.blocks):
        norms = {f"norm{n}" for n in (1, 2) if isinstance(getattr(block, f"norm{n}"), nn.LayerNorm)}
        assert {s.role for s in sites if s.layer == i} == inner | norms
        linears = {f"blocks.{i}.{name}" for name, m in block.named_modules() if isinstance(m, nn.Linear)}
        assert linears == {s.path for s in sites if s.layer == i and s.role in LINEARS}
    final = any(isinstance(m, nn.LayerNorm) for m in (backbone.body.norm, backbone.body.fc_norm))
    assert {s.role for s in sites if s.layer == -1} == {"patch", "stem"} | ({"norm"} if final else set())
    assert {s.role for s in sites} <= set(ROLES)


@every_family
def test_sites_have_the_shapes_of_their_modules(family):
    body = pristine(family).body
    for site in pristine(family).sites():
        module = body.get_submodule(site.path)
        if site.role in (*LINEARS, *CONVS):
            weight = module.weight[slice(*(site.rows or (None,)))]
            assert weight.shape[:2] == (site.dim_out, site.dim_in), site
            assert site.layout == ("NCHW" if site.role in CONVS else "NLC")
        elif site.role in NORMS:
            assert module.normalized_shape == (site.dim_in,) == (site.dim_out,), site
        else:
            assert site.dim_in == site.dim_out == 48


@every_family
@torch.no_grad()
def test_sublayer_sites_see_the_residual_stream(family):
    """x at attn_res and mlp_res is the stream, y the branch: stream + branch is what comes next."""
    backbone, caught = copy.deepcopy(pristine(family)), {}
    sites = {(s.layer, s.role): s for s in backbone.sites()}
    for key in [k for k in sites if k[1] in ("block", "attn", "mlp", "attn_res", "mlp_res")]:
        hook = functools.partial(lambda key, m, args, y: caught.update({key: (args[0], y)}), key)
        backbone.body.get_submodule(sites[key].path).register_forward_hook(hook)
        if sites[key].source:
            hook = functools.partial(lambda key, m, args: caught.update({(*key, "x"): args[0]}), key)
            backbone.body.get_submodule(sites[key].source).register_forward_pre_hook(hook)
    backbone(images(16, 24))
    for i in range(2):
        (x, y), middle = caught[i, "block"], caught[i, "mlp_res", "x"]
        assert torch.equal(caught[i, "attn_res", "x"], x)
        assert torch.equal(x + caught[i, "attn_res"][1], middle)
        assert torch.equal(middle + caught[i, "mlp_res"][1], y)
        for role in ("attn", "mlp"):
            assert caught[i, role][0].shape == caught[i, role][1].shape == x.shape


def silence(body, site):
    """Take the rows of a q, k or v site, and their bias wherever it is kept, to zero."""
    linear, rows = body.get_submodule(site.path), slice(*(site.rows or (None,)))
    attn = body.get_submodule(site.path.rpartition(".")[0])
    for value in (linear.weight, linear.bias):
        if value is not None:
            value[rows] = 0
    if getattr(attn, f"{site.role}_bias", None) is not None:
        getattr(attn, f"{site.role}_bias").zero_()


@every_family
@pytest.mark.parametrize("role", ["q", "k", "v"])
@torch.no_grad()
def test_rows_are_query_key_and_value(family, role):
    backbone = copy.deepcopy(pristine(family))
    for site in [s for s in backbone.sites() if s.role == role]:
        path = site.path.rpartition(".")[0]
        (x,), kwargs = inputs_of(backbone, path)
        attn, view = backbone.body.get_submodule(path), backbone.attention(path)
        before = view.project(x, **kwargs)
        silence(backbone.body, site)
        after = view.project(x, **kwargs)
        changed = [r for r, a, b in zip("qkv", before, after) if not torch.equal(a, b)]
        assert changed == [role] and not after["qkv".index(role)].any()
        if role == "v":  # nothing is left but the biases behind the core
            expected = attn.proj(attn.norm(torch.zeros(attn.proj.in_features)))
            assert_close(attn(x, **kwargs), expected.expand_as(x))


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].gate])
@torch.no_grad()
def test_gate_and_fc1_are_not_mixed_up(family):
    """act(gate) * fc1 doubles with fc1, and not with the gate."""
    for role in ("fc1", "gate"):
        body = copy.deepcopy(pristine(family)).body
        mlp, x, caught = body.blocks[1].mlp, torch.randn(2, 5, 48), []
        mlp.drop1.register_forward_hook(lambda m, args, y, caught=caught: caught.append(y))
        mlp(x)
        path = next(s.path for s in pristine(family).sites() if s.role == role and s.layer == 1)
        for value in body.get_submodule(path).parameters():
            value.mul_(2)
        mlp(x)
        assert torch.allclose(caught[1], 2 * caught[0], atol=1e-5) == (role == "fc1")


@every_family
def test_lora_gets_gradients_everywhere(family):
    backbone = copy.deepcopy(pristine(family))
    targets = ("q", "k", "v", "proj", "fc1", "fc2") + ("gate",) * FAMILIES[family].gate
    adapted = Adapted(backbone)
    adapter = adapted.add("a", LoRA(rank=2, targets=targets))
    noise(adapter)
    adapted.set_trainable("a")
    assert len(adapter.pieces) == 2 * len(targets)
    y = joined(adapted(images(16, 24)))
    (y * torch.randn(y.shape)).sum().backward()
    assert [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.norm() > 1e-6] == []
    assert all(p.grad is None for p in backbone.parameters())


@torch.no_grad()
@pytest.mark.parametrize("family", ["eva", "eva02", "eva02-postnorm", "dinov3-qkvb"])
@pytest.mark.parametrize("targets", [("qkv",), ("q", "v"), ("k",)])
def test_lora_on_a_linear_whose_bias_lies_outside(family, targets):
    """As timm's own model with the changed weight; timm itself reads weight and bias past the linear."""
    adapted, model = Adapted(copy.deepcopy(pristine(family))), own(family, dynamic_img_size=True)
    adapter, x = adapted.add("a", LoRA(rank=2, targets=targets)), images(16, 24)
    noise(adapter)
    for piece in adapter.pieces.values():
        attn = model.get_submodule(piece.site.path.rpartition(".")[0])
        assert attn.q_bias.any() and attn.v_bias.any() and not attn.qkv_bias_separate
        attn.qkv.weight[slice(*(piece.site.rows or (None,)))] += piece.delta()
    expected = model.forward_features(x)[:, adapted.backbone.prefix :]
    assert not torch.allclose(pristine(family)(x).tokens, expected, atol=1e-2)
    assert_close(adapted(x).tokens, expected, "attached")
    adapted.merge()
    assert_close(adapted(x).tokens, expected, "merged")


# ---- attention views -------------------------------------------------------------------------------------------------
def masks(n):
    keep = torch.rand(n, n) > 0.3
    keep.fill_diagonal_(True)
    return {
        "none": {},
        "additive": dict(attn_mask=torch.randn(n, n)),
        "boolean": dict(attn_mask=keep),
        "causal": dict(is_causal=True),
    }


@every_family
@pytest.mark.parametrize("mask", masks(1))
@torch.no_grad()
def test_view_of_an_attention(family, mask):
    """Project, softmax attention written out, output: as the module itself."""
    backbone = pristine(family)
    for site in attentions(backbone):
        (x,), kwargs = inputs_of(backbone, site.path)
        assert (kwargs.get("rope") is not None) == FAMILIES[family].rope
        kwargs = {**kwargs, **masks(x.shape[1])[mask]}
        view = backbone.attention(site.path)
        q, k, v, bias = view.project(x, **kwargs)
        assert q.shape == k.shape == v.shape == (2, 3, x.shape[1], 16)
        scores = q @ k.mT / math.sqrt(16) + (0 if bias is None else bias)
        assert_close(view.output(scores.softmax(-1) @ v, x), view.module(x, **kwargs))


class SoftmaxCore(AttnCore):
    def attend(self, q, k, v, bias, ctx):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class SameAttention(Adapter):
    kinds = ("attention",)
    targets = ("attn",)

    def make(self, site, backbone, shared):
        return SoftmaxCore(site)


@every_family
@torch.no_grad()
def test_softmax_as_attention_core_changes_nothing(family):
    adapted, x = Adapted(copy.deepcopy(pristine(family))), images(16, 24)
    adapted.add("a", SameAttention())
    assert_close(joined(adapted(x)), joined(pristine(family)(x)))


@every_family
def test_projections_around_a_core_are_adapters_products_and_still_layers(family):
    """By oneDNN on CPUs with the gradients of the bare network, which is torch's; hooks on them run."""
    adapted, x = Adapted(copy.deepcopy(pristine(family))), images(16, 24).requires_grad_()
    adapted.add("a", SameAttention())
    paths = {s.path for s in adapted.backbone.sites() if s.role in ("qkv", "q", "k", "v", "proj")}
    found, seen = [], set()
    for ours, context in ((True, nullcontext()), (False, adapted.disabled())):
        with context, Ops() as ops:
            (gradient,) = torch.autograd.grad(joined(adapted(x)).square().mean(), x)
        assert len(ops.onednn) == 2 * len(paths) * (ours and ONEDNN is not None)  # forward and backward
        found.append(gradient)
    assert_close(*found)
    for path in paths:
        adapted.backbone.body.get_submodule(path).register_forward_hook(lambda *_, path=path: seen.add(path))
    adapted(x)
    assert seen == paths


@torch.no_grad()
def test_differential_attention_has_no_view():
    backbone, x = tiny_backbone(dict(type="TimmViT", name="vit_dwee_patch16_reg1_gap_256", arch=SMALL)), images(24, 24)
    assert_close(backbone(x).tokens, backbone.body.forward_features(x)[:, 1:], tolerance=0)
    assert backbone.capabilities == {"tokens", "maps", "prompts"}
    with pytest.raises(InputError, match=r"blocks.0.attn: no attention view for .*DiffAttention"):
        backbone.attention("blocks.0.attn")
