"""TimmViT on the families of plain vision transformers that timm has, against timm itself."""

from __future__ import annotations

import copy
import functools
import math
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from small import OneDNN
from torch import nn

from visadapt.adapters.lora import LoRA
from visadapt.backbones.base import POOLS
from visadapt.backbones.patch_embed import BAND_MODES
from visadapt.backbones.timm_vit import TimmViT
from visadapt.core.adapted import Adapted
from visadapt.core.adapter import Adapter
from visadapt.core.kinds import AttnCore
from visadapt.core.products import ONEDNN
from visadapt.core.sites import CONVS, LINEARS, NORMS, ROLES
from visadapt.errors import InputError
from visadapt.registry import BACKBONES
from visadapt.testing import assert_close, noise, tiny_backbone

PATCH = 8
SMALL = dict(depth=2, embed_dim=48, num_heads=3, patch_size=PATCH, img_size=3 * PATCH)
EXACT = 1e-6  # against timm on the same weights


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


# ---- what the tests share --------------------------------------------------------------------------------------------
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


def error_of(*args, **kwargs):
    """The one line that the user gets."""
    with pytest.raises(InputError) as caught:
        TimmViT(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


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


# ---- equal to timm ---------------------------------------------------------------------------------------------------
def check_against(model, family, x, grid):
    """Compare everything but maps with timm's forward_features and forward_head."""
    features, prefix = pristine(family)(x), FAMILIES[family].prefix
    stream = model.forward_features(x)
    assert features.grid == grid and stream.shape == (len(x), prefix + grid[0] * grid[1], 48)
    assert_close(features.tokens, stream[:, prefix:], "tokens", EXACT)
    assert_close(features.native, model.forward_head(stream, pre_logits=True), "native", EXACT)
    assert features.native.shape == (len(x), 48) and features.maps == []
    if FAMILIES[family].cls:
        assert_close(features.cls, stream[:, 0], "cls", EXACT)
    else:
        assert features.cls is None


@every_family
@torch.no_grad()
def test_native_size(family):
    check_against(own(family), family, images(24, 24), (3, 3))


@every_family
@pytest.mark.parametrize(
    ("size", "grid"), [((16, 40), (2, 5)), ((24, 17), (3, 3)), ((30, 9), (4, 2)), ((5, 3), (1, 1)), ((1, 1), (1, 1))]
)
@torch.no_grad()
def test_any_size(family, size, grid):
    """Not square, no multiple of the patch, below one patch; one image."""
    check_against(own(family, dynamic_img_size=True, dynamic_img_pad=True), family, images(*size, batch=1), grid)


@every_family
@torch.no_grad()
def test_images_of_a_batch_do_not_meet(family):
    backbone, x = pristine(family), images(16, 24, batch=3)
    together = joined(backbone(x))
    for i in range(3):
        assert_close(joined(backbone(x[i : i + 1])), together[i : i + 1])


# ---- features --------------------------------------------------------------------------------------------------------
@every_family
@torch.no_grad()
def test_pooled_vectors(family):
    backbone = pristine(family)
    features = backbone(images(16, 24))
    expected = {"native": features.native, "avg": features.tokens.mean(1)}
    if FAMILIES[family].cls:
        expected |= {"cls": features.cls, "cls_avg": torch.cat([features.cls, features.tokens.mean(1)], 1)}
    for pool in POOLS:
        if pool in expected:
            assert torch.equal(features.pooled(pool), expected[pool])
            assert backbone.pooled_dim(pool) == expected[pool].shape[1]
        else:
            with pytest.raises(InputError, match=f"'{pool}' needs a class token.*use pool='avg' or 'native'"):
                features.pooled(pool)
    with pytest.raises(InputError, match=r"unknown pool 'averag' \(did you mean 'avg'\?\)"):
        features.pooled("averag")


@every_family
@torch.no_grad()
def test_maps(family):
    backbone = tiny_backbone(config(family, out_indices=(0, -1)))
    x = images(16, 37)
    features, model = backbone(x), own(family, dynamic_img_size=True, dynamic_img_pad=True)
    expected = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert [m.shape for m in features.maps] == [(2, 48, 2, 5)] * 2 and backbone.embed_dims == [48, 48]
    for level, found, wanted in zip(backbone.out_indices, features.maps, expected):
        assert_close(found, wanted, f"map of block {level}", EXACT)
    assert_close(joined(features), joined(pristine(family)(x)), tolerance=0)


@torch.no_grad()
def test_levels_are_counted_from_both_ends():
    arch, x = SMALL | dict(depth=4), images(16, 24)
    backbone = TimmViT("test_vit", arch=arch, out_indices=(-3, 2)).eval()
    assert backbone.out_indices == (1, 2)
    expected = backbone.body.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
    assert all(map(torch.equal, backbone(x).maps, expected)) and not torch.equal(*expected)


# ---- bands -----------------------------------------------------------------------------------------------------------
def from_file(family, tmp_path, monkeypatch, **options):
    path = tmp_path / "rgb.safetensors"
    save_file({k: v.contiguous() for k, v in pristine(family).body.state_dict().items()}, path)
    return BACKBONES.build(config(family, weights=str(path), **options)).eval()


def from_hub(family, tmp_path, monkeypatch, **options):
    create, weights = timm.create_model, pristine(family).body.state_dict()

    def fetch(name, pretrained, **kwargs):
        assert pretrained and kwargs["in_chans"] == 3, "the hub has RGB weights"
        model = create(name, pretrained=False, **kwargs)
        model.load_state_dict(weights)
        return model

    monkeypatch.setattr(timm, "create_model", fetch)
    return BACKBONES.build(config(family, weights="timm", **options)).eval()


@pytest.mark.parametrize("mode", BAND_MODES)
@pytest.mark.parametrize("bands", [1, 4, 13])
@pytest.mark.parametrize("source", [from_file, from_hub])
@pytest.mark.parametrize("family", ["vit", "clip"])  # a patch convolution with and without bias
@torch.no_grad()
def test_bands(family, source, bands, mode, tmp_path, monkeypatch):
    build = functools.partial(source, family, tmp_path, monkeypatch, in_chans=bands, bands=mode)
    if mode == "zero" and bands < 3:
        with pytest.raises(InputError, match="mode 'zero' keeps red, green and blue"):
            build()
        return
    backbone, rgb = build(), pristine(family)
    x = images(16, 20, bands=bands)
    assert backbone.in_chans == bands and len(backbone.mean) == len(backbone.std) == bands
    assert backbone.sites()[0].dim_in == bands
    if mode == "zero":
        assert_close(joined(backbone(x)), joined(rgb(x[:, :3])))
        return
    grey = x[:, :1]
    assert_close(joined(backbone(grey.expand(-1, bands, -1, -1))), joined(rgb(grey.expand(-1, 3, -1, -1))))
    if bands > 3:  # in "repeat" band 3 is red again; in "mean" all bands are alike
        order = torch.arange(bands)
        red, green = (order.clone().index_copy_(0, torch.tensor([i, 3]), torch.tensor([3, i])) for i in (0, 1))
        assert_close(joined(backbone(x[:, red])), joined(backbone(x)))
        assert torch.allclose(joined(backbone(x[:, green])), joined(backbone(x)), atol=1e-4) == (mode == "mean")


@pytest.mark.parametrize("bands", [1, 13])
def test_random_weights_for_any_bands(bands):
    backbone = tiny_backbone(config("eva02", in_chans=bands))
    assert backbone(images(16, 16, bands=bands)).tokens.shape == (2, 4, 48)


@pytest.mark.parametrize("shape", [(2, 4, 16, 16), (2, 1, 16, 16), (3, 16, 16), (2, 3, 16)])
def test_other_bands_than_built_for(shape):
    with pytest.raises(InputError, match=r"takes \(B, 3, H, W\) images, got .*; see in_chans"):
        pristine("vit")(torch.zeros(shape))


def test_statistics():
    clip, four = pristine("clip"), tiny_backbone(config("clip", in_chans=4))
    assert clip.mean == pytest.approx([255 * v for v in timm.data.OPENAI_CLIP_MEAN])
    assert clip.std == pytest.approx([255 * v for v in timm.data.OPENAI_CLIP_STD])
    assert four.mean == (*clip.mean, clip.mean[0]) and four.std == (*clip.std, clip.std[0])
    given = TimmViT("test_vit", arch=SMALL, in_chans=2, mean=[1, 2], std=[3, 4])
    assert (given.mean, given.std) == ((1, 2), (3, 4))
    tagged = TimmViT("vit_small_patch16_224.dino", arch=SMALL)  # the tag was trained with other ones than the default
    assert tagged.mean == pytest.approx([255 * v for v in timm.data.IMAGENET_DEFAULT_MEAN])
    assert pristine("vit").mean == (127.5,) * 3


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
        with context, OneDNN() as onednn:
            (gradient,) = torch.autograd.grad(joined(adapted(x)).square().mean(), x)
        assert len(onednn.given) == 2 * len(paths) * (ours and ONEDNN is not None)  # forward and backward
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


# ---- the rest --------------------------------------------------------------------------------------------------------
@every_family
def test_depth_of_parameters(family):
    """0 for what block 0 gets its input from, i + 1 in block i, then what is behind the blocks."""
    backbone = copy.deepcopy(pristine(family)).requires_grad_(True)
    caught = []
    backbone.body.blocks[0].register_forward_pre_hook(lambda m, args: caught.append(args[0]))
    backbone(images(16, 24))
    names, values = zip(*backbone.body.named_parameters())
    reached = torch.autograd.grad(caught[0].square().sum(), values, allow_unused=True)
    for name, grad in zip(names, reached):
        if name.startswith("blocks."):
            assert backbone.layer_id(name) == int(name.split(".")[1]) + 1
        else:
            assert backbone.layer_id(name) == (0 if grad is not None or name.startswith("rope.") else 3), name


def test_arguments_rebuild_it():
    options = dict(in_chans=4, bands="mean", out_indices=(0, -1), mean=[1.0] * 4)
    backbone = BACKBONES.build(config("dinov2", **options))
    again = BACKBONES.build({"type": "TimmViT", **backbone.arguments()})
    assert again.arguments() == backbone.arguments() and again.sites() == backbone.sites()
    assert again.out_indices == (0, 1) and again.mean == (1.0,) * 4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_base_patch16_xp_224", {}, "has ParallelScalingBlocks; TimmViT knows blocks of attention and MLP in turn"),
        ("vit_small_patch16_18x2_224", {}, "has ParallelThingsBlocks"),
        ("vit_dpwee_patch16_reg1_gap_256", {}, "has DiffParallelScalingBlocks"),
        ("beit_base_patch16_224", {}, "'beit_base_patch16_224' is none of the plain vision transformers"),
        ("resnet18", {}, "'resnet18' is none of the plain vision transformers"),
        ("vit_tiny_r_s16_p8_224", dict(patch_size=1, img_size=32), "has a HybridEmbed before its blocks"),
        ("eva02_tinny_patch14_224", {}, "timm has no model 'eva02_tinny_patch14_224' (did you mean"),
        ("deit_tinny_patch16_224", {}, "(did you mean 'deit_tiny_patch16_224'"),
        ("test_vit.nosuchtag", {}, "Invalid pretrained tag (nosuchtag)"),
        ("test_vit", dict(num_heads=5), "cannot be built: dim should be divisible by num_heads; see also arch"),
        ("test_vit", dict(num_heads=0), "cannot be built: integer"),
        ("test_vit", dict(embed_dims=48), "unexpected keyword argument 'embed_dims'"),
        ("test_vit", dict(patch_size=(8, 16)), "has patches of 8x16 in images of 24x24; TimmViT takes square patches"),
        ("test_vit", dict(img_size=4), "has patches of 8x8 in images of 4x4"),
        ("test_vit", dict(global_pool=""), "has no pooling and so no vector per image; set global_pool in arch"),
    ],
)
def test_networks_that_are_refused(name, options, message):
    assert message in error_of(name, arch=SMALL | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(bands="repaet"), "TimmViT: unknown bands 'repaet' (did you mean 'repeat'?)"),
        (dict(in_chans=0), "in_chans must be a whole number of at least 1, got 0"),
        (dict(weights="imagenet"), "TimmViT weights 'imagenet': no such file, nor 'timm'"),
        (dict(mean=[1.0]), "mean has 1 values for 3 bands"),
        (dict(std=[1.0] * 3, in_chans=4), "std has 3 values for 4 bands"),
        (dict(std=[1, 0, 1]), "std must be finite and above 0, got [1, 0, 1]"),
        (dict(std=[1, 1, -1]), "std must be finite and above 0"),
        (dict(mean=[0, math.nan, 0]), "mean must be finite, got"),
        (dict(out_indices=(0, 2)), "out_indices has 2; 'test_vit' has the blocks 0 to 1"),
        (dict(out_indices=(-3,)), "out_indices has -3"),
        (dict(out_indices=(0, -2)), "once, shallow to deep, got [0, -2]"),
        (dict(out_indices=(1, 0)), "once, shallow to deep, got [1, 0]"),
    ],
)
def test_arguments_that_make_no_sense(options, message):
    assert message in error_of("test_vit", arch=SMALL, **options)


@pytest.mark.parametrize(
    ("weights", "asked"), [("timm", "vit_small_patch16_224"), ("timm:dino", "vit_small_patch16_224.dino")]
)
def test_no_network(weights, asked, monkeypatch):
    calls = []

    def fail(name, pretrained, **kwargs):
        calls.append((name, pretrained))
        raise OSError("we cannot connect\nto the hub." + " again" * 100)

    monkeypatch.setattr(timm, "create_model", fail)
    message = error_of("vit_small_patch16_224", weights=weights, arch=SMALL)
    assert message.startswith("weights of 'vit_small_patch16_224' could not be fetched by timm (we cannot connect to")
    assert message.endswith("give a file") and len(message) < 400 and calls == [(asked, True)]


def test_weights_of_timm_for_another_architecture(monkeypatch):
    def fail(name, **kwargs):
        nn.Linear(2, 3).load_state_dict(nn.Linear(3, 3).state_dict())

    monkeypatch.setattr(timm, "create_model", fail)
    message = error_of("test_vit", weights="timm", arch=SMALL)
    assert "weights='timm') cannot be built: Error(s) in loading state_dict" in message and "size mismatch" in message
