"""Adapters that are sums of Kronecker products: DiffuseKronA and SoKA."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visadapt.adapters.diffusekrona import DiffuseKronA, DiffuseKronASite
from visadapt.adapters.soka import Leading, SoKA, SoKASite, middle_divisor, rearranged
from visadapt.benchmark.flops import flops
from visadapt.core import decompose
from visadapt.core.adapted import Adapted
from visadapt.core.decompose import svd
from visadapt.core.sites import Site
from visadapt.errors import InputError
from visadapt.testing import assert_close, noise, tiny_backbone

D = 48
SIZES = st.tuples(*[st.integers(1, 6)] * 4)


def site(dim_in, dim_out):
    return Site("layer", "proj", 0, dim_in, dim_out)


def adapt(adapter, **arch):
    arch = dict(depth=1, embed_dim=D, num_heads=3, init_values=1.0) | arch
    adapted = Adapted(tiny_backbone(dict(type="TimmViT", name="vit_small_patch14_dinov2", arch=arch))).eval()
    adapted.add("a", adapter)
    adapted.set_trainable("a")
    return adapted


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- DiffuseKronA ----------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(sizes=SIZES)
def test_delta_is_the_kronecker_product_in_both_orders(sizes):
    a1, b1, a2, b2 = sizes
    official, kron = (DiffuseKronASite(site(a2 * b2, a1 * b1), a1, a2, order) for order in ("official", "kron"))
    assert not official.delta().any() and not kron.delta().any()
    noise(official)
    kron.load_state_dict(official.state_dict())
    product = np.kron(official.down.detach().numpy().T, official.up.detach().numpy())
    assert_close(kron.delta(), torch.from_numpy(product))
    delta = official.delta()
    for p in range(b1):
        for q in range(a1):
            row = official.down[:, q, None] * official.up[p]  # entry u, v is A[u, q] B[p, v]
            assert_close(delta[p * a1 + q], row.flatten())
            assert_close(kron.delta()[q * b1 + p], row.flatten())


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, order=st.sampled_from(["official", "kron"]))
def test_without_forming_delta_it_gives_the_same(sizes, order):
    a1, b1, a2, b2 = sizes
    piece = DiffuseKronASite(site(a2 * b2, a1 * b1), a1, a2, order).double()
    noise(piece)
    x = normal(2, 3, a2 * b2).double()
    for first in (True, False):  # whichever product is cheaper as the first one
        piece.right_first = first
        assert_close(piece(x), x @ piece.delta().T)


def test_the_cheaper_product_is_the_first():
    """7680 + 6144 multiplications for B first and 1280 + 12288 for A first at 64 outputs; and the other way round."""
    counts = []
    for a1, a2 in ((2, 16), (32, 8)):
        piece, x = DiffuseKronASite(site(128, 64), a1, a2, "official"), normal(5, 128)
        for first in (piece.right_first, not piece.right_first):
            piece.right_first = first
            counts.append(flops(partial(piece, x)))
    assert counts[0] < counts[1] and counts[2] < counts[3]


@pytest.mark.parametrize("targets", [("q", "v", "proj"), ("qkv", "fc1", "fc2")])
def test_training_without_forming_delta_gives_the_gradients_of_the_merged_weight(targets):
    adapted = adapt(DiffuseKronA(8, 8, targets=targets))
    noise(adapted.adapters["a"])
    images, found = normal(2, 3, 28, 28), []
    for thin in (True, False):
        for piece in adapted.pieces("a"):
            assert piece.thin  # at these sizes it is the cheaper way
            assert piece.by_forward() and not piece.random
        for piece in adapted.pieces("a"):
            piece.thin = thin
        adapted.zero_grad()
        cost = flops(lambda: (adapted(images).tokens * normal(1, 1, D)).sum().backward())
        found.append((cost, [p.grad for p in adapted.adapters["a"].parameters()]))
        for piece in adapted.pieces("a"):
            piece.thin = True
    (cheap, gradients), (dear, expected) = found
    assert cheap < dear
    for gradient, other in zip(gradients, expected):
        assert_close(gradient, other, tolerance=1e-4)


def test_delta_is_formed_where_that_is_cheaper_and_where_nothing_trains():
    assert not DiffuseKronASite(site(64, 64), 1, 1, "official").thin  # B alone is the whole weight
    piece = DiffuseKronASite(site(64, 64), 8, 8, "official")
    assert piece.by_forward()
    with torch.no_grad():
        assert not piece.by_forward()
    piece.requires_grad_(False)
    assert not piece.by_forward()


@pytest.mark.parametrize(
    ("shapes", "count"),
    [([(2304, 768)], 47_616), ([(2304, 768), (768, 768), (3072, 768), (768, 3072)], 190_464)],
)
def test_diffusekrona_counts_on_vit_b(shapes, count):
    adapter = DiffuseKronA()
    pieces = [adapter.make(site(i, o), None, None) for o, i in shapes for _ in range(12)]
    assert sum(p.numel() for piece in pieces for p in piece.parameters()) == count


def test_diffusekrona_starts_at_the_published_spread():
    piece = DiffuseKronA().make(site(768, 768), None, None)
    assert piece.down.shape == (8, 64) and piece.up.shape == (12, 96)
    assert not piece.up.any()
    assert abs(piece.down.std().item() * 64 - 1) < 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(a1=7), "a1 7 does not divide the 48 outputs of trunk_00_q; take one of 1, 2, 3, 4, 6, 8, 12, 16, 24, 48"),
        (dict(a1=4, a2=9), "a2 9 does not divide the 48 inputs of trunk_00_q; take one of 1, 2,"),
        (dict(a1=0), "a1 must be a whole number"),
        (dict(order="offical"), "unknown order 'offical'.*did you mean 'official'"),
    ],
)
def test_diffusekrona_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        adapt(DiffuseKronA(**arguments))


# ---- SoKA ------------------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_all_products_make_up_the_weight_and_the_update_is_relative_to_them(sizes, seed):
    m, p, n, q = sizes
    w = normal(m * p, n * q, seed=seed)
    factors = SoKA(rank=None, outer=(m, n)).decompose(w, None)
    assert_close(sum(torch.kron(u, v) for u, v in zip(*factors)), w)
    start = [factor[:2] for factor in factors]
    piece = SoKASite(site(n * q, m * p), *start)
    assert not piece.delta().any()
    noise(piece)
    expected = sum(torch.kron(u, v) for u, v in zip(piece.outer, piece.inner))
    residual = w - sum(torch.kron(u, v) for u, v in zip(*start))
    assert_close(w + piece.delta(), residual + expected)
    x = normal(2, 3, n * q, seed=1)
    assert_close(piece(x), x @ piece.delta().T)


def test_products_are_the_best_ones_and_share_the_singular_value():
    w = torch.kron(normal(4, 6), normal(3, 2, seed=1)) + 0.1 * torch.kron(normal(4, 6, seed=2), normal(3, 2, seed=3))
    outer, inner = SoKA(rank=None, outer=(4, 6)).decompose(w, 2)
    assert_close(sum(torch.kron(u, v) for u, v in zip(outer, inner)), w)
    assert_close(outer.flatten(1).norm(dim=1), inner.flatten(1).norm(dim=1))
    assert_close(outer.flatten(1).norm(dim=1).square(), torch.linalg.svdvals(rearranged(w, 4, 6))[:2])


def test_products_of_columns_and_rows_are_the_singular_value_decomposition():
    w = normal(12, 8)
    outer, inner = SoKA(outer=(12, 1)).decompose(w, 3)
    u, s, vt = svd(w, 3)
    assert_close((outer @ inner).sum(0), u * s @ vt)


def test_soka_that_is_pruned_to_nothing_leaves_the_residual():
    adapted = adapt(SoKA(rank=5, targets=["fc1"]))
    weight = adapted.backbone.body.blocks[0].mlp.fc1.weight
    (piece,) = adapted.pieces("a")
    values = torch.linalg.svdvals(rearranged(weight, 12, 8))
    assert piece.outer.shape == (5, 12, 8) and piece.inner.shape == (5, 16, 6)
    piece.outer.data.zero_()
    adapted.merge()
    assert_close(torch.linalg.svdvals(rearranged(weight, 12, 8))[: len(values) - 5], values[5:], tolerance=1e-4)


@pytest.mark.parametrize(
    ("energy", "limit", "count"),
    [(0.0, None, 1), (0.4, None, 1), (0.5, None, 2), (0.9, None, 3), (0.9, 2, 2), (0.999, None, 3)],
)
def test_rank_by_energy_elbow_and_limit(energy, limit, count):
    """Squares 100, 64, 36 and ones: shares 0.48, 0.79, 0.96; the chord is farthest above the first of the ones."""
    s = torch.tensor([10.0, 8.0, 6.0] + [1.0] * 8)
    assert Leading(energy, limit)(s) == count


def test_a_straight_curve_has_no_elbow():
    assert Leading(0.999, None)(torch.ones(10)) == 10
    assert Leading(0.999, None)(torch.linspace(10, 1, 10)) == 10
    assert Leading(0.5, None)(torch.zeros(10)) == 1


def test_leading_components_are_those_of_the_whole_decomposition_and_are_kept(tmp_path, monkeypatch):
    """Of a square matrix of rank 20, where the Gram matrix would not give the rest."""
    monkeypatch.setenv(decompose.CACHE, str(tmp_path))
    monkeypatch.setattr(decompose, "WORTH_KEEPING", 8)
    w = normal(40, 20) @ normal(20, 40, seed=1)
    expected = svd(w, keep=False)
    few = svd(w, Leading(0.9, 7))
    assert [len(f) for f in few] == [40, 7, 7]
    for found, whole in zip(few, (expected[0][:, :7], expected[1][:7], expected[2][:7])):
        assert_close(found, whole)
    u, _, vt = svd(w, lambda s: 30, keep=False)  # vectors of zeros too
    for one in (u.T @ u, vt @ vt.T):
        assert_close(one, torch.eye(30))
    monkeypatch.setattr(decompose, "_svd", None)
    assert all(torch.equal(a, b) for a, b in zip(few, svd(w, Leading(0.9, 7))))


@pytest.mark.parametrize(("size", "divisor"), [(384, 16), (768, 24), (1024, 32), (588, 21), (7, 1), (1, 1)])
def test_middle_divisor(size, divisor):
    assert middle_divisor(size) == divisor


@pytest.mark.parametrize(("shape", "count"), [((384, 384), 768), ((1536, 384), 1536), ((384, 1536), 1536)])
def test_soka_counts_per_product(shape, count):
    """m n + p q is no more than twice the root of the weight's size, the least possible, at the sizes of a ViT-S."""
    outer, inner = SoKA().decompose(normal(*shape), 3)
    assert outer.numel() + inner.numel() == 3 * count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(rank=49), "rank 49 exceeds the 48 products of trunk_00_q"),
        (dict(outer=(5, 4)), "m 5 does not divide the 48 outputs of trunk_00_q; take one of 1, 2, 3, 4, 6"),
        (dict(outer=(4, 5)), "n 5 does not divide the 48 weights per output of trunk_00_q; take one of"),
        (dict(outer=(4, 5, 6)), "outer is a pair"),
        (dict(outer=(4, 0)), "n must be a whole number"),
        (dict(energy=1.5), "energy must be in"),
    ],
)
def test_soka_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        adapt(SoKA(**arguments))
