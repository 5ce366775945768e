"""Adapters on convolutions and on the norms between them."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_timm_conv import every_family, images, joined, pristine, run
from torch import nn

from visadapt.adapters.bitfit import BitFit
from visadapt.adapters.layernorm import LayerNormTuning
from visadapt.adapters.lora import LoRA
from visadapt.adapters.ssf import SSF, ScaleShift
from visadapt.core.adapted import Adapted
from visadapt.core.adapter import Adapter
from visadapt.core.context import Context
from visadapt.core.inject import WeightForward
from visadapt.core.kinds import Delta, Tokens
from visadapt.core.sites import Site
from visadapt.testing import assert_close, difference, noise


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
