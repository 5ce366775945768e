"""LoRA-GA, which starts from a gradient, and MapSAM's DoRA, which starts from the norms of the weight."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import BACKBONE, D, Run

from visadapt.adapters.lora_ga import LoRAGA, LoRAGASite
from visadapt.adapters.mapsam_dora import MapSAMDoRA, MapSAMDoRASite
from visadapt.backbones.timm_vit import TimmViT
from visadapt.core.adapted import Adapted
from visadapt.core.sites import Site
from visadapt.errors import InputError
from visadapt.testing import assert_close, noise

SHAPES = st.tuples(st.integers(4, 16), st.integers(4, 16))


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def site(weight):
    return Site("layer", "proj", 0, weight.shape[1], weight.shape[0])


def adapt(adapter):
    adapted = Adapted(copy.deepcopy(BACKBONE)).eval()
    adapted.add("a", adapter)
    adapted.set_trainable("a")
    return adapted


def loss_of(adapted):
    return lambda: adapted(normal(2, 3, 28, 28)).native.square().sum()


# ---- LoRA-GA ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "rows", "columns", "size"),
    [
        ({}, [0, 1, 2], [3, 4, 5], 144**0.25 / 4),
        (dict(gamma=64.0), [0, 1, 2], [3, 4, 5], 144**0.25 / 8),
        (dict(direction="A2rBr", start="unit"), [3, 4, 5], [0, 1, 2], 1),
        (dict(direction="ArBr", start="gd", alpha=6.0, scaling="rank"), [1, 3, 5], [0, 2, 4], 0.5),
        (dict(start="gd", alpha=6.0), [0, 1, 2], [3, 4, 5], math.sqrt(3) / 6),
    ],
)
def test_start_is_made_of_singular_vectors_of_the_gradient(options, rows, columns, size):
    adapter = LoRAGA(3, **options, targets=["fc1"], layers=[0])
    adapted = adapt(adapter)
    gradient = normal(144, D)
    adapter.calibrate({"trunk_00_fc1": gradient})
    (piece,) = adapted.pieces("a")
    u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
    for found, expected in ((piece.a, vt[rows]), (piece.b.T, u.T[columns])):
        sign = (found * expected).sum(1, keepdim=True).sign()
        assert_close((found * sign).detach(), size * expected)
    assert not piece.delta().any()


def test_first_step_follows_the_best_approximation_of_rank_2r():
    """B dA + dB A is the leading 2 r components of the gradient, up to a factor."""
    adapter = LoRAGA(2, alpha=3.0, targets=["proj"], layers=[1])
    adapted = adapt(adapter)
    adapted.calibrate("a", [loss_of(adapted)])
    (piece,) = adapted.pieces("a")
    weight = adapted.backbone.body.blocks[1].attn.proj.weight.requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(adapted)(), [weight])
    adapted.set_trainable("a")
    loss_of(adapted)().backward()
    s = 3 / math.sqrt(2)
    assert_close(piece.a.grad, s * piece.b.detach().T @ gradient, tolerance=1e-4)
    assert_close(piece.b.grad, s * gradient @ piece.a.detach().T, tolerance=1e-4)
    step = (piece.b @ piece.a.grad + piece.b.grad @ piece.a).detach()
    u, values, vt = torch.linalg.svd(gradient)
    factor = (s * math.sqrt(D)) / 16
    assert_close(step, factor * (u[:, :4] * values[:4] @ vt[:4]), tolerance=1e-4)


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, rank=st.integers(1, 2), scaling=st.sampled_from([0.5, 4.0]))
def test_change_is_counted_from_the_start(shape, rank, scaling):
    w = normal(*shape)
    piece = LoRAGASite(site(w), shape, rank, scaling)
    a, b = normal(rank, shape[1], seed=1), normal(shape[0], rank, seed=2)
    piece.begin(a, b)
    assert not piece.delta().any()
    noise(piece, std=0.5)
    assert_close(piece.delta(), scaling * (piece.b @ piece.a - b @ a))
    x = normal(3, shape[1], seed=3)
    assert_close(piece(x), x @ piece.delta().T, tolerance=1e-4)
    cotangent = normal(*shape, seed=4)
    (piece.delta() * cotangent).sum().backward()
    assert_close(piece.a.grad, (scaling * piece.b.T @ cotangent).detach(), tolerance=1e-4)
    assert_close(piece.b.grad, (scaling * cotangent @ piece.a.T).detach(), tolerance=1e-4)


def test_resume_and_files_know_the_start(tmp_path):
    def begin():
        run = Run(LoRAGA(2, targets=["q", "fc2"]), total=8)
        run.model.adapted.calibrate("a", [lambda: run.model.loss(0)])
        return run

    expected = begin().go().model
    parts = begin().go(3).resumed(LoRAGA(2, targets=["q", "fc2"])).go().model  # in new objects without a start
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in parts.state_dict().items())
    (piece, *_) = expected.adapted.pieces("a")
    assert set(piece.stored()) == {"a", "b", "a0", "b0"} and piece.a0.any() and not torch.equal(piece.a, piece.a0)


def test_training_without_a_start_is_refused():
    adapted = adapt(LoRAGA(2, targets=["q"])).train()
    with pytest.raises(InputError, match="takes its start from data and has none yet"):
        adapted(torch.randn(1, 3, 28, 28))


# ---- MapSAM's DoRA ---------------------------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, rank=st.integers(1, 3))
def test_dora_has_a_magnitude_per_input_and_gradients_through_the_norm(shape, rank):
    w = normal(*shape, dtype=torch.float64)
    piece = MapSAMDoRASite(site(w), w, rank).double()
    noise(piece, std=0.5)
    cotangent = normal(*shape, seed=1, dtype=torch.float64)

    def by_hand(a, b, m):
        v = w + a @ b
        return torch.stack([m[j] * v[:, j] / v[:, j].square().sum().sqrt() for j in range(shape[1])], 1)

    parameters = [piece.a, piece.b, piece.m]
    expected, (found, bias) = by_hand(*parameters), piece.map(w, None)
    assert bias is None
    assert_close(found.detach(), expected.detach())
    theirs = torch.autograd.grad((expected * cotangent).sum(), parameters)
    ours = torch.autograd.grad((found * cotangent).sum(), parameters)
    for mine, their in zip(ours, theirs):
        assert_close(mine, their, tolerance=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fresh_dora_is_the_identity_to_the_last_bit_on_any_weight(dtype):
    piece = MapSAMDoRASite(site(normal(8, 6)), normal(8, 6), 2).to(dtype)
    for weight in (normal(8, 6, dtype=dtype), normal(8, 6, seed=1, dtype=dtype)):
        assert torch.equal(piece.map(weight, None)[0], weight)


def test_dora_keeps_a_column_of_zeros_and_has_finite_gradients():
    w = normal(8, 6)
    w[:, 2] = 0
    piece = MapSAMDoRASite(site(w), w, 2)
    new, _ = piece.map(w, None)
    new.square().sum().backward()
    assert torch.equal(new, w)
    assert all(p.grad.isfinite().all() for p in piece.parameters())


def test_sizes_on_a_vit_b():
    with torch.device("meta"):
        backbone = TimmViT("vit_base_patch16_224")
    widths = 12 * (4 * 768 * 2 + 2 * 5 * 768)
    for adapter, count in ((MapSAMDoRA(4), 165_888), (LoRAGA(8), 8 * widths)):
        adapter.build(backbone)
        assert sum(p.numel() for p in adapter.parameters()) == count


# ---- mistakes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRAGA(0), "rank must be a whole number"),
        (lambda: LoRAGA(calibration_batches=0), "calibration_batches must be a whole number"),
        (lambda: LoRAGA(scaling="root"), "scaling is 'rank' or 'sqrt'"),
        (lambda: LoRAGA(direction="ArB2"), "LoRAGA: unknown direction 'ArB2' .did you mean 'ArB2r'"),
        (lambda: LoRAGA(start="stabel"), "LoRAGA: unknown start 'stabel' .did you mean 'stable'"),
        (lambda: LoRAGA(alpha=0.0), "alpha must be above 0"),
        (lambda: LoRAGA(gamma=-1.0), "gamma must be above 0"),
        (lambda: adapt(LoRAGA(25, targets=["fc1"])), "rank 25 needs 50 .* trunk_00_fc1 of 144 x 48 .* at most 24"),
        (lambda: adapt(LoRAGA(targets=["norm1"])), "cannot sit at norm1"),
        (lambda: MapSAMDoRA(0), "rank must be a whole number"),
        (lambda: adapt(MapSAMDoRA(49)), "MapSAMDoRA: rank 49 exceeds the site trunk_00_q of 48 x 48"),
        (lambda: adapt(MapSAMDoRA(targets=["patch"])), "cannot sit at patch"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
