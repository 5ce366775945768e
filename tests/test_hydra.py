"""Hydra: a branch on the input and one on the output of a linear."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from visadapt.adapters.hydra import Hydra, HydraSite
from visadapt.adapters.lora import LoRA
from visadapt.adapters.mapsam_dora import MapSAMDoRA
from visadapt.benchmark.flops import flops
from visadapt.core.adapted import Adapted
from visadapt.core.sites import Site
from visadapt.errors import InputError
from visadapt.testing import assert_close, noise, tiny_backbone

D = 48


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(dim_in, dim_out, bias=True):
    layer = nn.Linear(dim_in, dim_out, bias=bias).requires_grad_(False)
    noise(layer)
    return layer


def site(dim_in, dim_out):
    return Site("layer", "proj", 0, dim_in, dim_out)


def adapt(*adapters):
    arch = dict(depth=1, embed_dim=D, num_heads=3, init_values=1.0)
    adapted = Adapted(tiny_backbone(dict(type="TimmViT", name="vit_small_patch14_dinov2", arch=arch))).eval()
    names = [f"a{n}" for n, _ in enumerate(adapters)]
    for name, adapter in zip(names, adapters):
        noise(adapted.add(name, adapter))
    adapted.set_trainable(*names)
    return adapted


@settings(max_examples=40, deadline=None)
@given(
    dim_in=st.integers(1, 9),
    dim_out=st.integers(1, 9),
    rank=st.integers(1, 3),
    bias=st.booleans(),
    scaling=st.sampled_from([0.1, 1.0, 4.5]),
)
def test_it_is_its_equation_and_merges_exactly(dim_in, dim_out, rank, bias, scaling):
    layer = linear(dim_in, dim_out, bias).double()
    piece, x = HydraSite(site(dim_in, dim_out), rank, scaling, 0.0).double(), normal(2, 3, dim_in).double()
    assert torch.equal(piece(x, layer), layer(x))
    noise(piece, std=0.5)
    z = layer(x)
    (a, ab), (b, bb), (c, cb), (d, db) = (
        (part.weight, part.bias) for f in (piece.par, piece.seq) for part in (f.down_proj, f.up_proj)
    )
    expected = z + scaling * ((x @ a.T + ab) @ b.T + bb) + scaling * ((z @ c.T + cb) @ d.T + db)
    assert_close(piece(x, layer), expected)
    w, new_b = piece.map(layer.weight, layer.bias)
    assert_close(x @ w.T + new_b, expected)


def test_branches_count_on_vit_b():
    """19,976 in a block: 12,292 at fc2 and 7,684 at proj."""
    pieces = [Hydra().make(site(i, 768), None, None) for i in (3072, 768)]
    assert [sum(p.numel() for p in piece.parameters()) for piece in pieces] == [12_292, 7_684]
    assert Hydra().targets == ("proj", "fc2")


def test_the_start_is_xavier_below_and_zero_above():
    piece = HydraSite(site(300, 200), 2, 1.0, 0.0)
    for branch, dim_in in ((piece.par, 300), (piece.seq, 200)):
        bound = (6 / (dim_in + 2)) ** 0.5
        assert 0.9 * bound < branch.down_proj.weight.abs().max() <= bound
        assert not any(v.any() for v in (branch.down_proj.bias, branch.up_proj.weight, branch.up_proj.bias))


@pytest.mark.parametrize("targets", [["proj", "fc2"], ["q", "v"], ["qkv", "fc1"]])
def test_training_gives_the_gradients_of_the_merged_weight_for_less(targets, monkeypatch):
    adapted, images, found = adapt(Hydra(rank=2, scaling=0.5, targets=targets)), normal(2, 3, 28, 28), []
    for merged in (False, True):
        if merged:
            monkeypatch.setattr(HydraSite, "by_forward", lambda self: False)
        adapted.zero_grad()
        cost = flops(lambda: (adapted(images).tokens * normal(1, 1, D)).sum().backward())
        found.append((cost, [p.grad for p in adapted.adapters["a0"].parameters()]))
    (cheap, gradients), (dear, expected) = found
    assert cheap < dear
    for gradient, other in zip(gradients, expected):
        assert_close(gradient, other, tolerance=1e-4)


def test_slices_of_one_layer_share_its_product():
    """Every slice that computed the layer anew for what is before it would double the cost of all those before."""
    adapted, x = adapt(Hydra(targets=["q", "k", "v"])), normal(1, 50, D)
    layer = adapted.backbone.body.blocks[0].attn.qkv
    assert all(piece.by_forward() for piece in adapted.pieces("a0"))
    assert flops(partial(layer, x)) < 1.5 * 2 * x.numel() * 3 * D
    y = layer(x)
    with torch.no_grad():
        assert_close(y, layer(x))


def test_two_of_them_and_a_low_rank_update_add_up_in_order():
    """The second one sees the output of the first; the update is added behind both, at half its strength here."""
    adapted = adapt(Hydra(targets=["fc2"]), LoRA(rank=2, targets=["fc2"]), Hydra(rank=3, targets=["fc2"]))
    layer, x = adapted.backbone.body.blocks[0].mlp.fc2, normal(2, 5, 4 * D)
    first, update, second = adapted.pieces("a0", "a1", "a2")
    second.scale = 0.5
    z = first(x, lambda x: x @ layer.weight.T + layer.bias)
    expected = z + 0.5 * (second(x, lambda x: z) - z) + x @ update.delta().T
    assert_close(layer(x), expected)
    with torch.no_grad():
        assert_close(layer(x), expected)


def test_dropout_stands_between_the_two_linears_and_ends_with_training():
    layer, piece = linear(6, 4), HydraSite(site(6, 4), 1, 1.0, 0.5).train()
    noise(piece, std=0.5)
    assert piece.random and piece.by_forward()
    piece.seq.requires_grad_(False)
    for value in piece.seq.parameters():
        value.zero_()
    x = normal(200, 6)
    inner = piece.par.down_proj(x) @ piece.par.up_proj.weight.T  # with the bias inside; kept twofold or dropped
    kept = layer(x) + piece.par.up_proj.bias + 2 * inner
    dropped = layer(x) + piece.par.up_proj.bias
    y = piece(x, layer)
    is_kept, is_dropped = ((y - other).abs().amax(1) < 1e-5 for other in (kept, dropped))
    assert (is_kept ^ is_dropped).all() and 60 < is_kept.sum() < 140
    piece.eval()
    assert_close(piece(x, layer), dropped + inner)
    with torch.no_grad():
        assert not piece.by_forward()


def test_without_training_it_is_a_weight_and_without_dropout_a_weight_could_stand_for_it():
    piece = HydraSite(site(6, 4), 1, 1.0, 0.0).train()
    assert piece.by_forward() and not piece.random
    with torch.no_grad():
        assert not piece.by_forward()
    assert not piece.requires_grad_(False).by_forward()


def test_merging_gives_a_bias_to_a_layer_without_one():
    adapted = adapt(Hydra(targets=["proj"]))
    layer, x = adapted.backbone.body.blocks[0].attn.proj, normal(2, 5, D)
    layer.bias = None
    before = layer(x)
    adapted.merge()
    assert_close(layer(x), before)
    assert layer.bias.any()
    adapted.unmerge()
    assert layer.bias is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(rank=49), "rank 49 exceeds the site trunk_00_proj of 48 x 48"),
        (dict(rank=0), "rank must be a whole number"),
        (dict(dropout=1.0), "dropout must be in"),
        (dict(targets=["patch"]), "cannot sit at patch"),
    ],
)
def test_hydra_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        adapt(Hydra(**arguments))


def test_a_map_behind_it_works_on_its_weight_outside_training():
    """Its dropout is off then, though it runs by its branches where gradients are wanted."""
    adapted = adapt(Hydra(dropout=0.1, targets=["proj"]), MapSAMDoRA(targets=["proj"])).eval()
    adapted.set_trainable(*adapted.adapters)
    x = normal(2, 3, 28, 28)
    with torch.no_grad():
        plain = adapted(x).tokens
    assert_close(adapted(x).tokens.detach(), plain)
    with pytest.raises(InputError, match="is random in training"):
        adapted.train()(x)
