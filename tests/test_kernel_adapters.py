"""Updates that are sparse kernel matrices, and the allotment of their entries."""

from __future__ import annotations

import math

import pytest
import torch
from cases import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from training import TARGETS, Run

from visadapt.adapters._common.kernel import smallest
from visadapt.adapters.snell import SNELL
from visadapt.adapters.snella import SNELLA, share_out
from visadapt.core.adapted import Adapted
from visadapt.core.io import read_manifest
from visadapt.core.progress import Progress
from visadapt.testing import assert_close, difference, noise, tiny_backbone


def vit(**adapters):
    """A tiny ViT with one adapter away from its start, or none."""
    adapted = Adapted(tiny_backbone(TINY["vit"])).eval()
    for name, adapter in adapters.items():
        noise(adapted.add(name, adapter))
    return adapted


def run(adapted):
    with torch.no_grad():
        return adapted(torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(1))).tokens


# ---- SNELL -----------------------------------------------------------------------------------------------------------
def kernel(piece):
    """By the formula: (dim_out, dim_in)."""
    difference = piece.outputs[:, :, None] - piece.inputs[:, None]
    plus, minus = difference.square().sum(-1).sqrt()
    return 0.1 * plus - 0.1 * minus


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_sparse_kernel_is_the_formula(variant, sparsity):
    adapted = vit(a=SNELL(4, sparsity, variant, targets=["fc1"]))
    piece = adapted.pieces("a")[0]
    d = kernel(piece)
    size, n = d.detach().abs(), d.numel()
    if variant == "official":
        factor = torch.where(size > size.quantile(sparsity), size, 0) if sparsity else torch.ones_like(size)
    else:
        ordered, place = size.flatten().sort().values, math.ceil(sparsity * n)
        factor = (size - (ordered[place - 1] if place else 0)).clamp(min=0)
    wanted, found = d * factor, piece.delta()
    assert_close(found, wanted)
    zeros = (found == 0).float().mean().item()
    assert zeros == pytest.approx(sparsity, abs=2 / n)
    cotangent = torch.randn_like(d)
    for one, other in zip(
        *(torch.autograd.grad((m * cotangent).sum(), [*piece.parameters()]) for m in (found, wanted))
    ):
        assert_close(one, other, "gradient", 1e-4)


def test_rank_of_a_kernel_is_not_limited_by_that_of_its_vectors():
    delta = vit(a=SNELL(2, 0.0, "official", targets=["q"])).pieces("a")[0].delta()
    assert torch.linalg.matrix_rank(delta) > 20


def test_thresholds_of_more_values_than_quantiles_in_float32_can_tell_apart():
    values = torch.randperm(2**24 + 9, dtype=torch.int32)
    assert [smallest(values, place).item() for place in (7, 2**24 + 2, 2**24 + 9)] == [6, 2**24 + 1, 2**24 + 8]


@pytest.mark.parametrize(
    "values", [torch.randn(60_000), torch.randint(0, 5, (50_000,)).float(), torch.arange(40_000.0)]
)
def test_thresholds_are_exact_where_only_a_part_is_put_in_order(values):
    for place in (1, 2, len(values) // 3, len(values) - 1, len(values)):
        assert smallest(values, place) == values.sort().values[place - 1]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("make", [SNELL, SNELLA])
def test_no_matrix_of_the_size_of_a_weight_is_kept(make, dropout):
    """All but the frozen weight itself is computed again in the backward pass."""
    adapted = vit(a=make(4, dropout=dropout, targets=["fc1"], layers=[1])).train()
    fc = adapted.backbone.body.blocks[1].mlp.fc1
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = fc(torch.randn(7, 48, requires_grad=True))
    large = [t for t in kept if t.numel() == fc.weight.numel() and t.data_ptr() != fc.weight.data_ptr()]
    assert not large
    y.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapted.adapters.parameters() if p.numel() > 1)


def test_drop_path_leaves_the_update_out_for_whole_images_and_dropout_not_at_proj():
    adapted = vit(a=SNELL(4, 0.0, "official", dropout=0.5, drop_path=0.5, targets=["proj", "fc1"]))
    body, x = adapted.backbone.body, torch.randn(64, 5, 48)
    with torch.no_grad():
        for module in (body.blocks[0].attn.proj, body.blocks[0].mlp.fc1):
            with adapted.disabled():
                base = module(x)
            whole = adapted.eval() and module(x) - base
            changes = adapted.train() and module(x) - base
            without = changes.abs().amax((1, 2)) == 0
            assert 16 < without.sum() < 48
            error = difference(changes[~without], 2 * whole[~without])
            assert error < 1e-4 if module is body.blocks[0].attn.proj else error > 1e-2


# ---- SNELLA ----------------------------------------------------------------------------------------------------------
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(0, 400),
    st.lists(st.tuples(st.integers(1, 90), st.one_of(st.just(0.0), st.floats(1e-9, 1e3))), min_size=1, max_size=6),
)
def test_entries_are_shared_out_by_score_and_fill_sites(budget, sites):
    sizes, scores = zip(*sites)
    given_out = share_out(budget, sizes, scores)
    assert all(0 <= g <= s for g, s in zip(given_out, sizes))
    left = min(budget, sum(sizes)) - sum(given_out)
    assert left >= 0
    if all(scores):
        unfilled = [n for n, g in enumerate(given_out) if g < sizes[n]]
        assert not unfilled or left < len(sizes)  # only what rounding leaves
    if not any(scores):
        assert left < len(sizes)


def step(epoch, epochs=6):
    return Progress(epoch, epochs, epoch, epochs, torch.Generator())


def observe(adapter, seed):
    for piece in adapter.pieces.values():
        for parameter in piece.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    adapter.on_update(step(0))


def test_allotment_goes_from_start_to_target_with_warm_ups_and_interval():
    adapter = SNELLA(2, 0.8, start=0.1, init_warmup=1, final_warmup=3, interval=2, targets=["q", "fc1"])
    vit(a=adapter)
    pieces = list(adapter.pieces.values())
    n = sum(p.size for p in pieces)
    observe(adapter, 0)
    seen = []
    for epoch in range(6):
        adapter.on_step(step(epoch))
        seen.append(sum((1 - p.sparsity) * p.size for p in pieces))
    cubic = 0.2 * n + 0.7 * n * (1 - (2 - 1) / (6 - 1 - 3)) ** 3
    for found, wanted in zip(seen, [0.9 * n, 0.9 * n, cubic, cubic, 0.2 * n, 0.2 * n]):
        assert found == pytest.approx(wanted, abs=len(pieces) + 1)
    survivors = [int((p.delta() != 0).sum()) for p in pieces]
    assert survivors == [round((1 - p.sparsity) * p.size) for p in pieces] and len(set(survivors)) > 1


def test_an_epoch_is_allotted_once_also_after_a_resume():
    adapter = SNELLA(2, 0.8, targets=["q", "fc1"])
    adapted = vit(a=adapter)
    observe(adapter, 0)
    adapter.on_step(step(2))
    chosen = [p.sparsity for p in adapter.pieces.values()]
    observe(adapter, 1)
    fresh = SNELLA(2, 0.8, targets=["q", "fc1"])
    other = vit(a=fresh)
    fresh.load_state_dict(adapter.state_dict())
    assert torch.equal(run(other), run(adapted))
    fresh.on_step(step(2))
    assert [p.sparsity for p in fresh.pieces.values()] == chosen
    for one in (adapter, fresh):
        one.on_step(step(3))
    assert [p.sparsity for p in fresh.pieces.values()] == [p.sparsity for p in adapter.pieces.values()] != chosen


def test_a_resumed_training_ends_with_the_same_bits():
    """Three batches an epoch; the break is in the third one, between two allotments."""

    def begin(resumed_from=None):
        adapter = SNELLA(2, 0.7, targets=TARGETS)
        training = resumed_from.resumed(adapter) if resumed_from else Run(adapter, total=12)
        training.max_epochs = 4
        return training

    def look(training):
        seen.append([p.sparsity for p in training.adapter.pieces.values()])
        training.epoch = (training.iter + 1) // 3

    seen = []
    whole = begin().go(look=look)
    assert seen[0] == seen[2] == [0.01] * 4 and all(seen[n] != seen[n - 1] for n in (3, 6, 9))
    assert all(seen[n] == seen[n - 1] for n in (1, 2, 4, 5, 7, 8, 10, 11))
    first = begin().go(8, look)
    second = begin(first)
    second.epoch = first.epoch
    second.go(look=look)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_a_file_holds_the_allotment_and_not_the_averages(tmp_path):
    adapter = SNELLA(2, 0.8, targets=["q", "fc1"])
    adapted = vit(a=adapter)
    observe(adapter, 0)
    adapter.on_step(step(3))
    path = tmp_path / "a.safetensors"
    adapted.save(path, "a")
    names = {k.rsplit("/", 1)[1] for k in read_manifest(path)["tensors"]} - {"output"}
    assert names == {"inputs", "outputs", "alpha", "gamma", "beta", "allotted"}
    fresh = vit()
    fresh.load(path)
    assert torch.equal(run(fresh), run(adapted))


def test_dense_form_has_no_schedule():
    adapter = SNELLA(2, None, targets=["q"])
    vit(a=adapter)
    piece = adapter.pieces["trunk_00_q"]
    d = kernel(piece)
    wanted = d + piece.alpha * torch.softmax(d / piece.gamma, 0) + piece.beta
    assert_close(piece.delta(), wanted)
    observe(adapter, 0)
    adapter.on_step(step(3))
    assert set(piece.state_dict()) == {"inputs", "outputs", "alpha", "gamma", "beta"}
