"""TimmConv on the families of ResNets and ConvNeXts that timm has, against timm itself; adapters on convolutions."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import DropPath
from torch import nn

from visadapt.adapters.bitfit import BitFit
from visadapt.adapters.layernorm import LayerNormTuning
from visadapt.adapters.lora import LoRA
from visadapt.adapters.ssf import SSF, ScaleShift
from visadapt.backbones.timm_conv import TimmConv
from visadapt.core.adapted import Adapted
from visadapt.core.adapter import Adapter
from visadapt.core.context import Context
from visadapt.core.inject import WeightForward
from visadapt.core.kinds import Delta, Tokens
from visadapt.core.sites import CONVS, LINEARS, NORMS, WEIGHTS, Site
from visadapt.errors import InputError
from visadapt.testing import assert_close, difference, noise, tiny_backbone

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


class Own(Adapter):
    """Makes one piece per site with the given function."""

    def __init__(self, piece, targets, **options):
        super().__init__(targets, **options)
        self.piece = piece

    def make(self, site, backbone, shared):
        return self.piece(site, backbone.body.get_submodule(site.path))


class Dense(Delta):
    """A delta with the shape of the weight, whatever its groups."""

    def __init__(self, site, module):
        super().__init__(site)
        self.d = nn.Parameter(torch.randn_like(module.weight[slice(*(site.rows or (None,)))]) / 10)

    def delta(self):
        return self.d


class Gain(Tokens):
    """y' = gain * y per channel, on any layout."""

    def __init__(self, site, module):
        super().__init__(site)
        self.gain = nn.Parameter(torch.ones(site.dim_out))

    def forward(self, x, y, ctx):
        dims = (x.shape[self.site.channels], y.shape[self.site.channels])
        assert dims == (self.site.dim_in, self.site.dim_out), self.site.key
        return y * (self.gain.view(-1, 1, 1) if self.site.channels == 1 else self.gain)


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


# ---- weights of convolutions and norms -------------------------------------------------------------------------------
def changed_by_hand(adapted):
    """The bare network with the weights that the formulas of the adapters give."""
    twin = copy.deepcopy(adapted)
    for name in adapted.adapters:
        twin.remove(name)
    twin = twin.backbone
    for adapter in adapted.adapters.values():
        for piece in adapter.pieces.values():
            module, values = twin.body.get_submodule(piece.site.path), dict(piece.named_parameters())
            bias = module.weight.new_zeros(piece.site.dim_out) if module.bias is None else module.bias.data
            column = (-1, *[1] * (module.weight.ndim - 1))
            with torch.no_grad():
                if isinstance(piece, ScaleShift):
                    module.weight.mul_(values["gamma"].view(column))
                    bias = values["gamma"] * bias + values["beta"]
                elif "db" in values:
                    bias = bias + values["db"]
                    module.weight.add_(values.get("dw", torch.zeros(())))
                else:
                    module.weight.add_(values["d"])
                module.bias = nn.Parameter(bias)
    return twin


@every_family
@pytest.mark.parametrize("names", ["d", "s", "sd", "bd", "n"])
def test_adapted_weights_are_those_written_by_hand(family, names):
    """Every weight at once: strides, padding, groups, dilation, statistics and layouts are the module's own."""
    torch.manual_seed(0)
    makes = dict(d=lambda: Own(Dense, ["all-weights"]), s=SSF, b=BitFit, n=LayerNormTuning)
    adapted, x = Adapted(copy.deepcopy(pristine(family))).eval(), images(64, 70).double()
    if family == "rms" and "n" in names:
        return  # its norms are none that the core knows
    for seed, name in enumerate(names):
        noise(adapted.add(name, makes[name]()), std=0.05, seed=seed)
    expected = run(changed_by_hand(adapted.double()), x)
    with adapted.disabled():
        assert difference(expected, run(adapted, x)) > 1e-2
    with torch.enable_grad():  # where SSF runs behind the module
        assert_close(joined(adapted(x)).detach(), expected, "in training")
    assert_close(run(adapted, x), expected)
    adapted.merge(check=x)
    assert_close(run(adapted, x), expected, "merged")


pieces_of_a_convolution = st.lists(
    st.tuples(
        st.sampled_from([Dense, ScaleShift]),
        st.sampled_from([None, (0, 4), (2, 6)]),
        st.sampled_from([1.0, 0.4, -2.0]),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    owners=st.lists(pieces_of_a_convolution, min_size=1, max_size=2),
    groups=st.sampled_from([1, 2, 6]),
    bias=st.booleans(),
    routed=st.booleans(),
    shape=st.sampled_from([(3, 2, 1, 1), (2, 2, 0, 1), (3, 1, "same", 2)]),
)
def test_row_slices_of_any_convolution(owners, groups, bias, routed, shape):
    """Maps in order, then deltas, each on its channels; alone and with an adapter per image."""
    torch.manual_seed(0)
    kernel, stride, padding, dilation = shape
    conv = nn.Conv2d(6, 6, kernel, stride, padding, dilation, groups, bias).double().requires_grad_(False)
    forward, x = WeightForward(conv, Context()), torch.randn(3, 6, 9, 7, dtype=torch.float64)
    for n, chosen in enumerate(owners):
        for make, rows, scale in chosen:
            site = Site("x", "conv", 0, 6, 6 if rows is None else rows[1] - rows[0], rows=rows, layout="NCHW")
            piece = (make(site) if make is ScaleShift else make(site, conv)).double()
            noise(piece, std=0.3, seed=n)
            piece.owner, piece.scale, piece.on = f"a{n}", scale, not routed
            forward.pieces.append(piece)
    ids = ["a0", None, "a1"] if routed else [None] * 3
    forward.ctx.ids = ids if routed else None
    expected = torch.cat([by_rule(conv, x[i : i + 1], forward.pieces, ids[i], routed) for i in range(3)])
    assert_close(forward(x).detach(), expected, "with gradients")
    with torch.no_grad():
        assert_close(forward(x), expected, "without gradients")


@torch.no_grad()
def by_rule(conv, x, pieces, owner, routed):
    """One image through the weights that its pieces make."""
    twin = copy.deepcopy(conv)
    w, b = twin.weight.data, torch.zeros(6).double() if conv.bias is None else twin.bias.data
    mine = [p for p in pieces if not routed or p.owner == owner]
    for piece in sorted(mine, key=lambda p: isinstance(p, Delta)):
        rows, s = slice(*(piece.site.rows or (None,))), piece.scale
        if isinstance(piece, Delta):
            w[rows] += s * piece.d
        else:
            w[rows] += s * (piece.gamma.view(-1, 1, 1, 1) - 1) * w[rows]
            b[rows] += s * (piece.gamma * b[rows] + piece.beta - b[rows])
    return twin._conv_forward(x, w, b)


@pytest.mark.parametrize("family", ["deep stem", "groups", "convnext", "conv mlp"])
@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_images_of_one_batch_have_an_adapter_each(family, autocast):
    torch.manual_seed(0)
    adapted, x = Adapted(copy.deepcopy(pristine(family))).eval(), images(64, 70, batch=5)
    made = {"dense": Own(Dense, ["all-weights"]), "ssf": SSF(), "norms": LayerNormTuning()}
    if family == "convnext":
        made["lora"] = LoRA(rank=2, targets=["fc1", "fc2"])
    for seed, (name, adapter) in enumerate(made.items()):
        noise(adapted.add(name, adapter, enable=False), std=0.05, seed=seed)
    if not autocast:
        adapted.double()
    ids = ["ssf", None, "dense", [*made][-1], "norms"]
    x = x if autocast else x.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        single = {name: run_only(adapted, name, x) for name in {*ids}}
        adapted.route(ids)
        mixed = run(adapted, x)
    for i, name in enumerate(ids):
        assert_close(mixed[i], single[name][i], f"image {i} with {name}")


def run_only(adapted, name, x):
    with adapted.only(*([] if name is None else [name])):
        return run(adapted, x)


# ---- pieces at blocks, stages and the stem ---------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["bottleneck", "convnext", "conv mlp"])
def test_checkpointing_runs_what_sits_at_every_level(family):
    """timm calls the blocks of a ResNet past their stage when it saves memory."""
    adapted, x = Adapted(copy.deepcopy(pristine(family))), images(64, 70)
    offered = {s.role for s in adapted.backbone.sites()}
    targets = [r for r in ("stem", "stage", "block", "mlp", "conv", "norm1", "fc2") if r in offered]
    adapter = adapted.add("a", Own(Gain, targets))
    noise(adapter)
    adapted.set_trainable("a")
    runs, gradients = [], []
    last = [s.path for s in adapted.backbone.sites() if s.role == "block"][-1]
    adapted.backbone.body.get_submodule(last).register_forward_pre_hook(lambda *_: runs.append(1))
    for saving in (False, True):
        adapted.backbone.body.set_grad_checkpointing(saving)
        adapted.zero_grad()
        joined(adapted(x)).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in adapter.named_parameters()})
    assert len(runs) == 3  # once, and twice where activations are not kept
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 1e-6, name
        size = max(1.0, gradient.abs().max().item())
        assert_close(gradients[1][name] / size, gradient / size, name)


@pytest.mark.compile
@pytest.mark.parametrize("family", ["basic", "convnext"])
def test_compiles_and_exports(family):
    class Plain(nn.Module):
        def __init__(self, adapted):
            super().__init__()
            self.adapted = adapted

        def forward(self, x):
            return joined(self.adapted(x))

    adapted, x = Adapted(copy.deepcopy(pristine(family))).eval(), images(64, 64)
    noise(adapted.add("s", SSF()), std=0.05)
    noise(adapted.add("d", Own(Dense, ["all-weights"])), std=0.05)
    adapted.set_trainable("s", "d")
    torch.compiler.reset()
    compiled = torch.compile(Plain(adapted), backend="eager", fullgraph=True)
    trained = list(adapted.adapters.parameters())
    found = torch.autograd.grad(compiled(x).square().mean(), trained)
    for got, wanted in zip(found, torch.autograd.grad(joined(adapted(x)).square().mean(), trained)):
        assert_close(got, wanted, "gradient")
    with torch.no_grad():
        assert_close(compiled(x), run(adapted, x))
        assert_close(torch.export.export(Plain(adapted), (x,)).module()(x), run(adapted, x))
