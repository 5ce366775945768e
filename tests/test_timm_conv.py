"""TimmConv on the families of ResNets and ConvNeXts that timm has, against timm itself."""

from __future__ import annotations

import copy
import functools
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import DropPath
from torch import nn

from visadapt.adapters.ssf import SSF
from visadapt.backbones.patch_embed import BAND_MODES
from visadapt.backbones.timm_conv import TimmConv
from visadapt.core.adapted import Adapted
from visadapt.core.sites import CONVS, LINEARS, NORMS, WEIGHTS
from visadapt.errors import InputError
from visadapt.registry import BACKBONES
from visadapt.testing import assert_close, difference, tiny_backbone

CHANNELS = dict(channels=(8, 12, 8, 16), layers=(1, 2, 1, 1))
DIMS = dict(dims=(8, 12, 8, 16), depths=(1, 2, 1, 1), ls_init_value=1.0)
FAMILIES = {
    "basic": ("resnet18", CHANNELS),
    "bottleneck": ("resnet50", CHANNELS),
    "dilated": ("resnet50", CHANNELS | dict(output_stride=8)),
    "groups": ("resnext50_32x4d", CHANNELS | dict(cardinality=4, base_width=32)),
    "deep stem": ("resnet50d", CHANNELS | dict(stem_width=8)),
    "squeeze": ("seresnet18", CHANNELS),
    "blur": ("resnetblur18", CHANNELS),
    "strided stem": ("resnetrs50", CHANNELS | dict(stem_width=8)),
    "group norm": ("resnet50_gn", dict(channels=(32, 32, 32, 32), layers=(1, 2, 1, 1))),
    "convnext": ("convnext_tiny", DIMS),
    "conv mlp": ("convnext_tiny_hnf", DIMS),
    "v2": ("convnextv2_tiny", DIMS | dict(ls_init_value=None)),
    "overlap": ("convnext_atto_ols", DIMS),
    "rms": ("convnext_atto_rms", DIMS),
    "large mlp": ("convnext_large_mlp", DIMS | dict(head_hidden_size=24)),
    "dilated convnext": ("convnext_tiny", DIMS | dict(output_stride=16)),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
EXACT = 1e-6  # against timm on the same weights


# ---- what the tests share --------------------------------------------------------------------------------------------
def config(family, **options):
    name, arch = FAMILIES[family]
    return dict(type="TimmConv", name=name, arch=arch, **options)


@functools.cache
def pristine(family):
    """A backbone that no test changes."""
    return tiny_backbone(config(family))


def images(*size, batch=2, bands=3, seed=0):
    return torch.randn(batch, bands, *size, generator=torch.Generator().manual_seed(seed))


def joined(features):
    return torch.cat([features.native, features.tokens.flatten(1)], 1)


@torch.no_grad()
def run(backbone, x):
    return joined(backbone(x))


# ---- equal to timm ---------------------------------------------------------------------------------------------------
@every_family
@pytest.mark.parametrize("size", [(64, 96), (33, 70), (5, 3)])
@torch.no_grad()
def test_features_are_those_of_timm(family, size):
    """On images that are padded at the right and bottom to whole cells of the last map."""
    backbone, x = pristine(family), images(*size)
    features, p = backbone(x), backbone.patch
    rows, cols = -(-size[0] // p), -(-size[1] // p)
    stream = backbone.body.forward_features(F.pad(x, (0, cols * p - size[1], 0, rows * p - size[0])))
    native = backbone.body.forward_head(stream, pre_logits=True)
    norm = getattr(getattr(backbone.body, "head", None), "norm", nn.Identity())
    assert features.grid == backbone.grid(x) == (rows, cols) == tuple(stream.shape[-2:]) and features.cls is None
    assert_close(features.tokens, norm(stream).flatten(2).mT, "tokens", EXACT)
    assert_close(features.native, native, "native", EXACT)
    assert features.pooled("native").shape[1] == backbone.pooled_dim("native")
    assert torch.equal(features.pooled("avg"), features.tokens.mean(1))
    assert features.pooled("avg").shape[1] == backbone.pooled_dim("avg")
    with pytest.raises(InputError, match="'cls' needs a class token"):
        features.pooled("cls")


@every_family
@torch.no_grad()
def test_maps_and_strides(family):
    backbone, x = tiny_backbone(config(family, out_indices=(0, -2, -1))), images(37, 64)
    features, padded = backbone(x), backbone.pad(x)
    stem = "act1" in {info["module"] for info in backbone.body.feature_info}  # timm counts it as a level
    indices = [i + stem for i in (0, 2, 3)]
    expected = backbone.body.forward_intermediates(padded, indices=indices, intermediates_only=True)
    assert backbone.out_indices == (0, 2, 3) and len(features.maps) == 3
    for found, wanted, width, stride in zip(features.maps, expected, backbone.embed_dims, backbone.strides):
        assert_close(found, wanted, "map", EXACT)
        assert found.shape == (2, width, padded.shape[2] // stride, padded.shape[3] // stride)
    assert backbone.patch == backbone.strides[-1] and backbone.strides[0] == 4
    assert_close(joined(features), joined(pristine(family)(x)), tolerance=0)


def test_levels_that_do_not_exist():
    with pytest.raises(InputError, match=r"out_indices has 4; 'resnet18' has the stages 0 to 3"):
        TimmConv("resnet18", arch=CHANNELS, out_indices=(4,))
    with pytest.raises(InputError, match=r"each of the stages once, shallow to deep, got \[1, 0\]"):
        TimmConv("resnet18", arch=CHANNELS, out_indices=(1, 0))


# ---- sites -----------------------------------------------------------------------------------------------------------
@every_family
def test_sites_say_what_is_there(family):
    backbone = pristine(family)
    sites, body = backbone.sites(), backbone.body
    keys = [site.key for site in sites]
    assert len(set(keys)) == len(keys) and not any("." in key for key in keys)
    for site in sites:
        module = body.get_submodule(site.path)
        if site.role in CONVS:
            assert (module.out_channels, module.in_channels) == (site.dim_out, site.dim_in), site
        elif site.role in LINEARS:
            assert module.weight.shape == (site.dim_out, site.dim_in), site
        elif site.role in NORMS:
            assert module.weight.shape == (site.dim_in,) == (site.dim_out,), site
    weights = [s.path for s in sites if s.role in WEIGHTS]
    known = (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.BatchNorm2d, nn.GroupNorm)
    there = [n for n, m in body.named_modules() if isinstance(m, known) and not n.startswith("head.pre_logits")]
    assert sorted(weights) == sorted(there)
    assert [s.path for s in sites if s.role == "patch"] == ["stem.0" if hasattr(body, "stem") else weights[0]]
    blocks = [s for s in sites if s.role == "block"]
    assert [s.layer for s in blocks] == list(range(5)) == list(range(backbone.depth))
    assert [s.layer for s in sites if s.role == "stage"] == [0, 2, 3, 4]
    linears = {"fc1", "fc2", "mlp"} if family in ("convnext", "v2", "large mlp", "dilated convnext") else set()
    assert {s.role for s in sites} & {*LINEARS, "mlp"} == linears


@every_family
@torch.no_grad()
def test_sites_name_layouts_and_widths_and_stand_in_the_order_of_the_network(family):
    """Every module runs once or more, with channels where its site says; the order of keys is that of the weights."""
    backbone, ran = copy.deepcopy(pristine(family)), []

    def look(module, args, y, site):
        assert args[0].shape[site.channels] == site.dim_in and y.shape[site.channels] == site.dim_out, site
        assert y.ndim == 4
        ran.append(site)

    for site in backbone.sites():
        module = backbone.body.get_submodule(site.path)
        module.register_forward_hook(functools.partial(look, site=site))
    backbone(images(64, 96))  # sides and widths that differ
    assert {s.key for s in ran} == {s.key for s in backbone.sites()}
    layers = [s.layer for s in ran if s.layer >= 0]
    assert layers == sorted(layers)
    ids = [backbone.layer_id(s.path) for s in ran]
    assert ids == sorted(ids)


@every_family
def test_depth_of_parameters(family):
    """0 in the stem, i + 1 in block i with the downsampling before it, then what is behind the blocks."""
    backbone = pristine(family)
    blocks = [s.path for s in backbone.sites() if s.role == "block"]
    for name, _ in backbone.body.named_parameters():
        inside = [i for i, block in enumerate(blocks) if name.startswith(f"{block}.")]
        if inside:
            assert backbone.layer_id(name) == inside[0] + 1
        elif ".downsample." in name:
            assert backbone.layer_id(name) == blocks.index(f"{name.split('.downsample')[0]}.blocks.0") + 1
        else:
            assert backbone.layer_id(name) == (6 if name.startswith(("head.", "norm_pre.")) else 0), name


# ---- batch norms -----------------------------------------------------------------------------------------------------
def test_batch_norms_keep_their_statistics_when_the_base_trains():
    """Stochastic depth works then, as the recipe asks for."""
    arch = CHANNELS | dict(drop_path_rate=0.5)
    adapted = Adapted(tiny_backbone(config("basic") | dict(arch=arch)), base_mode="train")
    adapted.add("a", SSF())
    before = {k: v.clone() for k, v in adapted.backbone.body.state_dict().items()}
    adapted.train()
    kinds = {m.training for m in adapted.backbone.modules() if isinstance(m, nn.BatchNorm2d)}
    assert kinds == {False} and all(m.training for m in adapted.backbone.modules() if isinstance(m, DropPath))
    first, second = run(adapted, images(32, 32)), run(adapted, images(32, 32))
    assert difference(first, second) > 1e-3
    assert all(torch.equal(v, before[k]) for k, v in adapted.backbone.body.state_dict().items())


# ---- weights ---------------------------------------------------------------------------------------------------------
def saved(state, path):
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save(state, path)
    return str(path)


def from_file(family, tmp_path, monkeypatch, **options):
    path = saved(pristine(family).body.state_dict(), tmp_path / "rgb.safetensors")
    return BACKBONES.build(config(family, weights=path, **options)).eval()


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
@pytest.mark.parametrize("bands", [1, 5])
@pytest.mark.parametrize("source", [from_file, from_hub])
@pytest.mark.parametrize("family", ["basic", "deep stem", "convnext", "overlap"])
@torch.no_grad()
def test_bands(family, source, bands, mode, tmp_path, monkeypatch):
    build = functools.partial(source, family, tmp_path, monkeypatch, in_chans=bands, bands=mode)
    if mode == "zero" and bands < 3:
        with pytest.raises(InputError, match="mode 'zero' keeps red, green and blue"):
            build()
        return
    backbone, rgb, x = build(), pristine(family), images(40, 33, bands=bands)
    assert backbone.in_chans == backbone.sites()[0].dim_in == len(backbone.mean) == len(backbone.std) == bands
    if mode == "zero":
        assert_close(run(backbone, x), run(rgb, x[:, :3]))
    else:
        grey = x[:, :1]
        assert_close(run(backbone, grey.expand(-1, bands, -1, -1)), run(rgb, grey.expand(-1, 3, -1, -1)))
    with pytest.raises(InputError, match=rf"TimmConv takes \(B, {bands}, H, W\) images, got"):
        backbone(x[:, :0])


def torchvision(state):
    """As torchvision's first ResNets were stored: a classifier, and no counters in the batch norms."""
    state = {k: v for k, v in state.items() if "num_batches_tracked" not in k}
    return {"state_dict": {f"module.{k}": v for k, v in state.items()} | {"module.fc.weight": torch.zeros(7, 16)}}


def official(state):
    """As Meta stores its ConvNeXts; what V2 calls grn is four-dimensional there."""
    found = {}
    for key, value in state.items():
        key = key.replace("stem.", "downsample_layers.0.").replace("head.norm.", "norm.")
        key = re.sub(r"stages\.(\d)\.downsample", r"downsample_layers.\1", key).replace(".blocks", "")
        key = key.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        key = key.replace("mlp.grn.weight", "grn.gamma").replace("mlp.grn.bias", "grn.beta")
        value = value.flatten(1) if "pwconv" in key and value.ndim == 4 else value
        found[key] = value.view(1, 1, 1, -1) if "grn" in key else value
    return {"model": found | {"head.weight": torch.zeros(7, 16), "head.bias": torch.zeros(7)}}


def open_clip(state):
    found = {f"visual.trunk.{k}": v for k, v in state.items()} | {"visual.head.proj.weight": torch.zeros(4, 16)}
    return found | {"text.token_embedding.weight": torch.zeros(3, 2)}


LAYOUTS = [
    ("basic", dict, "timm", set()),
    ("bottleneck", torchvision, "timm", {"fc.weight"}),
    ("deep stem", torchvision, "timm", {"fc.weight"}),
    ("convnext", dict, "timm", set()),
    ("convnext", official, "convnext", {"head.fc.weight", "head.fc.bias"}),
    ("conv mlp", official, "convnext", {"head.fc.weight", "head.fc.bias"}),
    ("v2", official, "convnext", {"head.fc.weight", "head.fc.bias"}),
    ("convnext", open_clip, "convnext", {"head.fc.weight", "head.fc.bias", "text.token_embedding.weight"}),
]


@pytest.mark.parametrize(("family", "form", "layout", "dropped"), LAYOUTS)
@torch.no_grad()
def test_published_layouts(family, form, layout, dropped, tmp_path):
    if family == "conv mlp" and form is official:  # Meta's networks have the norm behind the pooling
        source = tiny_backbone(config("convnext") | dict(arch=DIMS | dict(conv_mlp=True)))
    else:
        source = pristine(family)
    path = saved(form(source.body.state_dict()), tmp_path / "weights.pth")
    target = BACKBONES.build(dict(type="TimmConv", name=source.name, arch=source.arch, weights=path)).eval()
    assert_close(run(target, images(32, 64)), run(source, images(32, 64)), tolerance=0)
    assert target.weight_report.layout == layout and set(target.weight_report.dropped) == dropped
    assert target.weight_report.missing == ()


def test_a_pretrained_network_without_the_last_norm_says_so(tmp_path):
    state = {k: v for k, v in pristine("v2").body.state_dict().items() if not k.startswith("head.")}
    report = BACKBONES.build(config("v2", weights=saved(state, tmp_path / "fcmae.pth"))).weight_report
    assert set(report.missing) == {"head.norm.weight", "head.norm.bias"} and "not in the file head.norm" in str(report)


@pytest.mark.parametrize(
    ("family", "form", "name", "message"),
    [
        ("basic", dict, "basic", "it lacks layer2.1.conv1.weight"),
        ("convnext", official, "convnext", "it lacks stages.1.blocks.1"),
        ("convnext", dict, "basic", "it has also stem.0.weight"),
        ("basic", dict, "convnext", "it has also conv1.weight"),
        ("convnext", official, "basic", "it lacks conv1.weight"),
    ],
)
def test_weights_of_another_architecture_are_refused(family, form, name, message, tmp_path):
    lacking = {k: v for k, v in pristine(family).body.state_dict().items() if not re.match(r".*[2s]\.1\.", k)}
    state = lacking if family == name else pristine(family).body.state_dict()
    path = saved(form(state), tmp_path / "weights.pth")
    with pytest.raises(InputError, match=re.escape(message) + "|made for another architecture") as caught:
        BACKBONES.build(config(name, weights=path))
    assert "made for another architecture" in str(caught.value) and "\n" not in str(caught.value)


# ---- the rest --------------------------------------------------------------------------------------------------------
def test_statistics_and_arguments_rebuild_it():
    options = dict(in_chans=4, bands="mean", out_indices=(0, -1), std=[1.0] * 4)
    backbone = BACKBONES.build(config("convnext", **options))
    assert backbone.mean[:3] == pytest.approx([255 * v for v in timm.data.IMAGENET_DEFAULT_MEAN])
    again = BACKBONES.build({"type": "TimmConv", **backbone.arguments()})
    assert again.arguments() == backbone.arguments() and again.sites() == backbone.sites()
    assert again.out_indices == (0, 3) and again.std == (1.0,) * 4 and again.mean == backbone.mean


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tiny_patch16_224", {}, "'vit_tiny_patch16_224' is a VisionTransformer; TimmConv takes ResNets and"),
        ("efficientnet_b0", {}, "is a EfficientNet; TimmConv takes ResNets and ConvNeXts"),
        ("resnet81", {}, "timm has no model 'resnet81' (did you mean 'resnet18'"),
        ("convnext_tny", {}, "(did you mean 'convnext_tiny'"),
        ("resnet18", dict(arch=dict(global_pool="")), "has no pooling and so no vector per image; set global_pool"),
        ("convnext_atto", dict(arch=dict(global_pool="")), "has no pooling and so no vector per image"),
        ("resnet18", dict(arch=dict(output_stride=4)), "TimmConv('resnet18', weights=None) cannot be built: Assertion"),
        ("resnet18", dict(arch=dict(channel=8)), "unexpected keyword argument 'channel'"),
        ("resnet18", dict(in_chans=0), "TimmConv: in_chans must be a whole number of at least 1, got 0"),
        ("resnet18", dict(bands="maen"), "TimmConv: unknown bands 'maen' (did you mean 'mean'?)"),
        ("resnet18", dict(weights="imagenet"), "TimmConv weights 'imagenet': no such file, nor 'timm', 'timm:<tag>'"),
        ("resnet18", dict(mean=[1.0]), "TimmConv: mean has 1 values for 3 bands"),
        ("resnet18", dict(std=[1.0, 0.0, 1.0]), "TimmConv: std must be finite and above 0"),
    ],
)
def test_what_makes_no_sense(name, options, message):
    with pytest.raises(InputError) as caught:
        TimmConv(name, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_no_network(monkeypatch):
    def fail(name, **kwargs):
        raise OSError("we cannot connect\nto the hub")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(InputError, match=r"weights of 'resnet18' could not be fetched by timm .*; give a file"):
        TimmConv("resnet18", weights="timm")
