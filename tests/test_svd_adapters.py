"""Adapters between frozen factors of a weight or of its gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visadapt.adapters._common import decomposed
from visadapt.adapters.loldu import LoLDU, LoLDUSite, lower_diagonal_upper
from visadapt.adapters.lora_sb import LoRASB
from visadapt.adapters.lora_xs import LoRAXS
from visadapt.adapters.peft import PEFT
from visadapt.adapters.salt import SALT, SALTSite
from visadapt.adapters.ssam import SSAM, SSAMSite
from visadapt.adapters.svfit import SVFit
from visadapt.core.adapted import Adapted
from visadapt.core.decompose import svd
from visadapt.core.lowrank import worth_factoring
from visadapt.core.sites import Site
from visadapt.errors import InputError
from visadapt.testing import assert_close, noise, progress, tiny_backbone

D = 48
ROLES = ["q", "fc2", "patch"]
SHAPES = st.tuples(st.integers(2, 24), st.integers(2, 24))


def matrix(shape, rank=None, seed=0):
    """Normal random numbers, or a product of that rank."""
    generator = torch.Generator().manual_seed(seed)
    o, i = shape
    if rank is None:
        return torch.randn(o, i, generator=generator)
    return torch.randn(o, rank, generator=generator) @ torch.randn(rank, i, generator=generator)


def site(weight):
    return Site("layer", "proj", 0, weight.shape[1], weight.shape[0])


def tiny(**arch):
    arch = dict(depth=1, embed_dim=D, num_heads=3, init_values=1.0) | arch
    return tiny_backbone(dict(type="TimmViT", name="vit_small_patch14_dinov2", arch=arch))


def adapt(adapter, **arch):
    adapted = Adapted(tiny(**arch)).eval()
    adapted.add("a", adapter)
    adapted.set_trainable("a")
    return adapted


# ---- the mathematics -------------------------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, share=st.floats(0, 0.99), rank=st.integers(1, 3), relu=st.sampled_from(["all", "scaled"]))
def test_salt_is_its_equation(shape, share, rank, relu):
    w = matrix(shape)
    m = min(shape)
    k = max(1, int(m * share))
    piece = SALTSite(site(w), svd(w), k, rank, relu)
    assert not piece.delta().any()
    noise(piece, std=0.5)
    u, s, vt = svd(w)
    head, rest = (piece.gain * s[:k] + piece.shift).diag(), s[k:].diag() + piece.x @ piece.y
    middle = torch.block_diag(head, rest).relu() if relu == "all" else torch.block_diag(head.relu(), rest)
    assert_close(w + piece.delta(), u @ middle @ vt, tolerance=1e-4)
    x = matrix((3, shape[1]), seed=1)
    assert_close(piece(x), x @ piece.delta().T, tolerance=1e-4)


@pytest.mark.parametrize(("scaled", "count"), [(5, 5), (0.1, 4), (0.125, 6), (0.001, 1)])
def test_salt_scales_a_number_of_values_or_a_share_of_them(scaled, count):
    (piece,) = adapt(SALT(scaled=scaled, rank=2, targets=["fc1"])).pieces("a")
    assert piece.gain.shape == piece.shift.shape == (count,)
    assert piece.x.shape == (D - count, 2) and piece.y.shape == (2, D - count)


def test_salt_that_clips_the_scaled_values_only_has_low_rank_and_is_run_so():
    w = matrix((D, D))
    for relu, thin in (("all", False), ("scaled", True)):
        factors = SALTSite(site(w), svd(w), 4, 2, relu).factors()
        assert (factors[0].shape == (6, D)) == thin
        assert worth_factoring(w, [factors]) == thin


@pytest.mark.parametrize("shape", [(10, 6), (6, 10)])
def test_ssam_is_its_equation(shape):
    w = matrix(shape)
    u, s, vt = svd(w)
    piece = SSAMSite(site(w), svd(w, 4))
    assert not piece.delta().any()
    noise(piece, std=0.3)
    piece.gain.data[1] = -1  # the ReLU takes this one out
    new = torch.cat([(piece.gain * s[:4] + piece.shift).relu(), s[4:]])
    assert new[1] == 0
    assert_close(w + piece.delta(), u * new @ vt)


@pytest.mark.parametrize(("energy", "rank"), [(0.0, 1), (0.6, 1), (0.7, 2), (0.9, 2), (0.95, 3)])
def test_svfit_takes_the_fewest_values_that_hold_more_than_the_energy(energy, rank):
    """Their squares are 9, 4 and 1 of 14: shares of 0.64, 0.93 and 1."""
    adapted = Adapted(tiny())
    weight = adapted.backbone.body.blocks[0].attn.proj.weight
    q = torch.linalg.qr(matrix((D, 3))).Q
    weight.data.copy_(q * torch.tensor([3.0, 2.0, 1.0]) @ q.flip(1).T)
    (piece,) = adapted.add("a", SVFit(energy=energy, targets=["proj"])).pieces.values()
    assert_close(piece.sigma.detach(), torch.tensor([3.0, 2.0, 1.0])[:rank])


def test_svfit_without_its_values_leaves_the_residual():
    adapted = adapt(SVFit(rank=5, targets=["fc1"]))
    (piece,) = adapted.pieces("a")
    assert not piece.delta().any()
    piece.sigma.data.zero_()
    u, s, vt = svd(adapted.backbone.body.blocks[0].mlp.fc1.weight)
    adapted.merge()
    assert_close(adapted.backbone.body.blocks[0].mlp.fc1.weight, u[:, 5:] * s[5:] @ vt[5:])


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, rank=st.sampled_from([None, 0, 1, 2]))
def test_lower_diagonal_upper_makes_up_the_weight_and_stays_bounded(shape, rank):
    """Also where pivots vanish; a division by what is left of them would give entries beyond 1e6."""
    w = matrix(shape, rank)
    lower, d, upper = lower_diagonal_upper(w)
    assert_close(lower @ (d[:, None] * upper), w)
    assert lower.abs().max() <= 1 and upper.abs().max() < 1e6
    m = min(shape)
    order = torch.linalg.lu(w.double()).P.float()
    assert_close((order.T @ lower)[:m].triu(), torch.eye(m))
    assert_close(upper.tril(-1), torch.zeros(shape)[:m], tolerance=1e-5)


def test_loldu_moves_the_diagonal_from_the_base():
    w = matrix((9, 7))
    permutation, lower, upper = torch.linalg.lu(w)
    d = upper.diagonal()
    small, big = (LoLDUSite(site(w), lower_diagonal_upper(w), s) for s in (0.25, 1.0))
    assert not small.delta().any()
    for piece in (small, big):
        noise(piece, std=0.5)
    residual = w - 0.25 * permutation @ lower @ d.diag() @ (upper / d[:, None])
    expected = residual + 0.25 * permutation @ lower @ small.z.diag() @ (upper / d[:, None])
    assert_close(w + small.delta(), expected, tolerance=1e-4)
    assert_close(4 * small.delta(), big.delta(), tolerance=1e-4)


def test_loldu_takes_alpha_over_rank():
    adapted = adapt(LoLDU(rank=8, alpha=4, targets=["q"]))
    (piece,) = adapted.pieces("a")
    assert piece.scaling == 0.5 and len(piece.z) == 8


def test_lora_xs_projects_the_gradient_on_the_leading_vectors():
    adapted = adapt(LoRAXS(rank=4, alpha=8, targets=["fc2"]))
    (piece,) = adapted.pieces("a")
    u, s, vt = svd(adapted.backbone.body.blocks[0].mlp.fc2.weight)
    assert torch.equal(piece.b, u[:, :4])
    assert_close(piece.a, s[:4, None] * vt[:4])
    assert 0 < piece.r.abs().max() < 1e-4
    noise(piece)
    gradient = matrix((D, 4 * D))
    (piece.delta() * gradient).sum().backward()
    assert_close(piece.delta(), 2 * u[:, :4] @ piece.r @ (s[:4, None] * vt[:4]))
    assert_close(piece.r.grad, 2 * piece.b.T @ gradient @ piece.a.T, tolerance=1e-4)


# ---- a start from gradients ------------------------------------------------------------------------------------------
def images(seed):
    return torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(seed))


def loss_on(adapted, seed):
    return lambda: (adapted(images(seed)).tokens * (1 + matrix((6, D)))).square().sum()


def test_lora_sb_starts_at_the_best_approximation_of_the_first_step():
    adapted = adapt(LoRASB(rank=3, first_lr=0.01, calibration_batches=2, targets=ROLES))
    body, adapter = adapted.backbone.body, adapted.adapters["a"]
    weights = {p.site.key: body.get_submodule(p.site.path).weight.requires_grad_() for p in adapter.pieces.values()}
    with adapted.disabled():
        total = sum(loss_on(adapted, seed)() for seed in (0, 1))
        gradients = dict(zip(weights, torch.autograd.grad(total, list(weights.values()))))
    adapted.calibrate("a", [loss_on(adapted, seed) for seed in range(5)])
    for key, piece in adapter.pieces.items():
        g = gradients[key][slice(*(piece.site.rows or (None,)))].flatten(1)
        u, s, vt = torch.linalg.svd(-0.01 * g.sign(), full_matrices=False)
        assert_close(piece.delta(), u[:, :3] * s[:3] @ vt[:3])
        assert_close(piece.a @ piece.a.T, torch.eye(3))
        assert_close(piece.b.T @ piece.b, torch.eye(3))
        (piece.delta() * g).sum().backward()
        assert_close(piece.r.grad, piece.b.T @ g @ piece.a.T, tolerance=1e-4)
    adapter.on_step(progress(0))


def test_lora_sb_without_a_start_refuses_to_train_and_survives_a_zero_gradient():
    adapted = adapt(LoRASB(rank=3, targets=["q"]))
    adapter, (piece,) = adapted.adapters["a"], adapted.pieces("a")
    with pytest.raises(InputError, match="takes its start from data and has none yet"):
        adapted.train()(torch.randn(1, 3, 28, 28))
    adapter.calibrate({piece.site.key: torch.zeros(D, D)})
    assert not piece.delta().any()


# ---- counts, files, penalties ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("adapter", "fused", "all_linear"),
    [
        (lambda **k: SSAM(**k), 18_432, 73_728),
        (lambda **k: SALT(scaled=77, rank=4, **k), 68_184, 272_736),
        (lambda **k: SALT(scaled=77, rank=256, **k), 4_247_352, 16_989_408),
        (lambda **k: LoLDU(**k), 9_216, 36_864),
        (lambda **k: LoLDU(rank=256, **k), 3_072, 12_288),
        (lambda **k: SVFit(rank=768, **k), 9_216, 36_864),
        (lambda **k: LoRAXS(rank=32, **k), 12_288, 49_152),
        (lambda **k: LoRASB(rank=32, **k), 12_288, 49_152),
    ],
)
def test_trained_values_on_a_vit_b(adapter, fused, all_linear, monkeypatch):
    """Twelve times those of one block; the values of the factors do not matter here."""

    def empty(weight, rank=None):
        rank = rank or min(weight.shape)
        return torch.zeros(weight.shape[0], rank), torch.zeros(rank), torch.zeros(rank, weight.shape[1])

    monkeypatch.setattr(decomposed, "svd", empty)
    monkeypatch.setattr(
        "visadapt.adapters.loldu.lower_diagonal_upper", lambda w: (w, torch.ones(min(w.shape)), w[: min(w.shape)])
    )
    backbone = tiny(embed_dim=768, num_heads=12)
    for targets, expected in ((["qkv"], fused), (["qkv", "proj", "fc1", "fc2"], all_linear)):
        adapted = Adapted(backbone)
        made = adapted.add("a", adapter(targets=targets))
        assert 12 * sum(p.numel() for p in made.parameters()) == expected
        adapted.remove("a")


def test_every_piece_has_the_factors_of_its_own_weight():
    for adapter in (SSAM(), LoLDU()):
        adapted = adapt(adapter, depth=2)
        for piece in adapted.pieces("a"):
            w = adapted.backbone.body.get_submodule(piece.site.path).weight[slice(*(piece.site.rows or (None,)))]
            if isinstance(adapter, SSAM):
                assert_close(piece.u * piece.s @ piece.vt, w)
            else:
                assert_close(piece.lower * piece.d @ piece.upper, w)


@pytest.mark.parametrize(
    "adapter", [SALT(rank=2), SSAM(), SVFit(), LoLDU(), LoRAXS(rank=2)], ids=lambda a: type(a).__name__
)
def test_factors_are_not_held_twice(adapter):
    assert adapt(adapter).adapters["a"].factors == {}


@pytest.mark.parametrize(
    ("adapter", "names"),
    [
        (SALT(rank=2, targets=ROLES), {"gain", "shift", "x", "y"}),
        (SSAM(targets=ROLES), {"gain", "shift"}),
        (SVFit(targets=ROLES), {"sigma"}),
        (LoLDU(targets=ROLES), {"z"}),
        (LoRAXS(rank=4, targets=ROLES), {"r"}),
        (LoRASB(rank=4, targets=ROLES), {"r", "a", "b"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_files_hold_what_cannot_be_made_from_the_base(adapter, names):
    for piece in adapt(adapter).pieces("a"):
        assert set(piece.stored()) == names


def test_penalties_are_zero_at_the_start_and_grow_with_the_change():
    for adapter in (SALT(scaled=3, rank=2, penalty=0.5, targets=["q"]), SSAM(penalty=0.5, targets=["q"])):
        adapted = adapt(adapter)
        (piece,) = adapted.pieces("a")
        start = adapted.losses()["loss_a_penalty"]
        start.backward()
        assert start == 0 and all(p.grad.isfinite().all() for p in piece.parameters())
        piece.gain.data[0] = 3.0
        change = 2 * piece.s[0] if isinstance(adapter, SALT) else torch.tensor(2.0)
        assert_close(adapted.losses()["loss_a_penalty"].detach(), 0.5 * change)
    for adapter in (SALT(targets=["q"]), SSAM(targets=["q"])):
        assert adapt(adapter).losses() == {}


# ---- mistakes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SALT(rank=0), "rank must be a whole number"),
        (lambda: SALT(scaled=0), "scaled is a whole number of at least 1 or a share"),
        (lambda: SALT(scaled=1.5), "scaled is a whole number of at least 1 or a share"),
        (lambda: SALT(relu="scale"), "did you mean 'scaled'"),
        (lambda: SSAM(fraction=0.0), "fraction must be above 0"),
        (lambda: SSAM(fraction=1.1), "fraction must be above 0"),
        (lambda: SVFit(rank=0), "rank must be a whole number"),
        (lambda: SVFit(energy=1.0), "energy must be in"),
        (lambda: LoLDU(rank=-1), "rank must be a whole number"),
        (lambda: LoRAXS(rank=0), "rank must be a whole number"),
        (lambda: LoRASB(first_lr=0.0), "first_lr must be above 0"),
        (lambda: LoRASB(calibration_batches=0), "calibration_batches must be"),
        (lambda: adapt(SALT(scaled=D, targets=["q"])), "leaves none of the 48 singular values .* use SSAM"),
        (lambda: adapt(SALT(rank=D + 1, targets=["q"])), "rank 49 exceeds the site trunk_00_q of 48 x 48"),
        (lambda: adapt(SSAM(fraction=0.01, targets=["q"])), "is none of the 48 singular values"),
        (lambda: adapt(SVFit(rank=D + 1, targets=["fc2"])), "rank 49 exceeds the site trunk_00_fc2 of 48 x 192"),
        (lambda: adapt(LoLDU(rank=D + 1, targets=["fc1"])), "rank 49 exceeds the site trunk_00_fc1 of 192 x 48"),
        (lambda: adapt(LoRAXS(rank=D + 1, targets=["patch"])), "rank 49 exceeds the site trunk_xx_patch of 48 x 588"),
        (lambda: adapt(LoRASB(rank=D + 1, targets=["patch"])), "rank 49 exceeds the site trunk_xx_patch of 48 x 588"),
        (lambda: adapt(SALT(targets=["norm1"])), "cannot sit at norm1"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.peft
def test_the_decomposed_starts_of_peft_stand_for_a_part_of_the_base_too():
    pytest.importorskip("peft")
    adapted = adapt(PEFT("LoRA", dict(r=2, init_lora_weights="pissa"), targets=["q"]))
    with pytest.raises(InputError, match="both start from the base weight"):
        adapted.add("other", LoLDU(targets=["q"]))
    with pytest.raises(InputError, match="PEFT 'DoRA': rank 1000 exceeds the site trunk_00_q of"):
        adapt(PEFT("DoRA", dict(r=1000), targets=["q"]))
