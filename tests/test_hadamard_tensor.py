"""QWHA: sparse updates in the Walsh-Hadamard domain. TLoRA: tensor-ring transforms of the weight."""

from __future__ import annotations

import math

import pytest
import torch
from cases import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from visadapt.adapters import qwha, tlora
from visadapt.adapters._common.hadamard import Hadamard, hadamard_block, sylvester
from visadapt.adapters.qwha import BITS, QWHA, QWHASite, budgets, chosen, rounded
from visadapt.adapters.tlora import TLoRA, TLoRASite, factorise
from visadapt.benchmark.parameters import trainable
from visadapt.core.adapted import Adapted
from visadapt.core.io import read_manifest, read_tensors
from visadapt.core.sites import Site
from visadapt.errors import InputError
from visadapt.testing import assert_close, noise, tiny_backbone

many = settings(max_examples=40, deadline=None, derandomize=True)
X = torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(1))


def matrix(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def vit(adapter, name="vit"):
    """A tiny ViT with the adapter as "a"."""
    adapted = Adapted(tiny_backbone(TINY[name])).eval()
    adapted.add("a", adapter)
    return adapted


def losses(adapted, count=2):
    return [lambda n=n: adapted(X + n).tokens.square().mean() for n in range(count)]


def site(o, i):
    return Site("fc", "fc1", 0, i, o)


# ---- numbers of trained values ---------------------------------------------------------------------------------------
LINEARS = ["qkv", "proj", "fc1", "fc2"]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: QWHA(8, targets=["qkv"]), 294_912),
        (lambda: QWHA(8, targets=LINEARS), 1_179_648),
        (lambda: QWHA(8, base_bits=2, targets=LINEARS), 1_179_648),
        (lambda: TLoRA(4, targets=["proj"]), 12 * (1_088 + 4 * 2 * 768)),
        (lambda: TLoRA(2, ring=1, cores=2, targets=["fc2"]), 12 * (48**2 + 64**2 + 2 * 5 * 768)),
    ],
)
def test_values_on_a_vit_b(make, expected, vit_b_block):
    assert 12 * trainable(vit_b_block, make()) == expected


# ---- the Hadamard transform ------------------------------------------------------------------------------------------
WIDTHS = (1, 2, 4, 12, 16, 20, 24, 28, 36, 40, 48, 56, 64, 72, 80, 88, 104, 144, 192, 384, 416, 576, 588, 1280)


@pytest.mark.parametrize("order", WIDTHS)
def test_hadamard_matrix_is_one_and_the_fast_form_multiplies_by_it(order):
    block = hadamard_block(order)
    dense = torch.kron(block, sylvester(order // len(block)))
    assert torch.equal(dense.abs(), torch.ones(order, order))
    assert torch.equal(dense @ dense.T, order * torch.eye(order))
    x, fast = matrix(3, order).double(), Hadamard(block, order).double()
    assert_close(fast(x), x @ dense.double())
    assert_close(fast(x, transposed=True), x @ dense.double().T)


@pytest.mark.parametrize(("order", "block"), [(768, 12), (1024, 1), (1152, 36), (112, 28), (1280, 20), (1664, 104)])
def test_hadamard_block_is_the_smallest_that_is_known(order, block):
    assert len(hadamard_block(order)) == block


@pytest.mark.parametrize("order", [3, 6, 10, 27, 52, 2730])
def test_orders_without_a_matrix(order):
    assert hadamard_block(order) is None


@many
@given(
    shape=st.tuples(st.integers(1, 9), st.sampled_from([4, 8, 12, 24, 28])),
    share=st.floats(0.05, 1),
    seed=st.integers(0, 9),
)
def test_qwha_is_its_equation(shape, share, seed):
    o, i = shape
    block = hadamard_block(i)
    index = qwha.random_places(o, i, max(1, int(share * o * i)), seed)
    piece = QWHASite(site(o, i), shape, index, Hadamard(block, i), 30.0, None)
    assert not piece.delta().any()
    noise(piece, 1.0, seed)
    spectrum = torch.zeros(o, i)
    for place, value in zip(index.tolist(), piece.values.tolist()):
        spectrum[place // i, place % i] = value
    dense = torch.kron(block, sylvester(i // len(block)))
    assert_close(piece.delta(), 30 / math.sqrt(o) * spectrum @ dense / i)


def test_qwha_places_are_the_same_at_sites_of_one_shape_and_follow_the_seed():
    pieces = vit(QWHA(2, targets=["q", "k"])).pieces("a")
    assert len({tuple(p.index.tolist()) for p in pieces}) == 1
    assert all(p.stored().keys() == {"values"} for p in pieces)
    (other, *_) = vit(QWHA(2, seed=1, targets=["q"])).pieces("a")
    assert not torch.equal(other.index, pieces[0].index)
    assert len(set(other.index.tolist())) == 2 * (48 + 48)


@pytest.mark.parametrize("make", [lambda: QWHA(2, targets=["fc1"]), lambda: TLoRA(2, targets=["fc1"])])
def test_training_keeps_nothing_of_the_size_of_a_weight(make):
    adapted, kept = vit(make()), []
    adapted.set_trainable("a")
    weight = adapted.backbone.body.blocks[0].mlp.fc1.weight
    x = matrix(1, 2, 48).requires_grad_()
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapted.backbone.body.blocks[0].mlp.fc1(x).sum()
    own = [weight, *adapted.adapters["a"].parameters(), *adapted.adapters["a"].buffers()]
    pointers = {t.data_ptr() for t in own}
    assert all(t.numel() <= x.numel() for t in kept if t.data_ptr() not in pointers)


# ---- the rounded base ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", BITS)
def test_rounded_weight_has_few_values_per_row_none_further_away_than_half_a_step(bits):
    w = matrix(5, 600)
    w[1] = 0.3  # without a range there is one value
    q = rounded(w, bits)
    step = (w.amax(1) - w.amin(1)) / (2**bits - 1)
    assert max(len(row.unique()) for row in q) <= 2**bits
    assert ((w - q).abs().amax(1) <= 0.5 * step + 1e-6).all()
    assert torch.equal(q[1], w[1])
    assert_close(torch.stack([q.amin(1), q.amax(1)]), torch.stack([w.amin(1), w.amax(1)]))


@many
@given(
    norms=st.lists(st.floats(0, 100), min_size=1, max_size=12),
    cap=st.integers(1, 30),
    share=st.floats(0, 1),
)
def test_budgets_have_their_sum_and_follow_the_norms(norms, cap, share):
    norms, total = torch.tensor(norms), int(share * cap * len(norms))
    count = budgets(norms, total, cap)
    assert count.sum() == total and count.min() >= 0 and count.max() <= cap
    share = total * norms.double() / norms.double().sum().clamp(min=torch.finfo(torch.float64).tiny)
    assert (count >= (share - 1e-9).floor().clamp(max=cap)).all()


def test_what_is_left_of_the_budget_goes_to_the_smallest():
    assert budgets(torch.tensor([5.0, 1.0, 2.0]), 10, 12).tolist() == [6, 2, 2]  # 6.25, 1.25 and 2.5
    assert budgets(torch.tensor([5.0, 1.0, 2.0]), 10, 4).tolist() == [4, 3, 3]
    assert budgets(torch.zeros(3), 7, 4).tolist() == [3, 2, 2]


def start(o, i, total, seed=0):
    """A piece on a rounded random weight that has begun on random inputs (n, i), with these."""
    w, x = matrix(o, i, seed=seed), matrix(50, i, seed=seed + 1) @ matrix(i, i, seed=seed + 2)
    transform = Hadamard(hadamard_block(i), i)
    piece = QWHASite(site(o, i), (o, i), torch.zeros(total, dtype=torch.int64), transform, 20.0, w - rounded(w, 2))
    piece.begin(x.T @ x / len(x))
    return piece, w, x


@many
@given(
    shape=st.tuples(st.integers(1, 6), st.sampled_from([8, 12, 24])), share=st.floats(0.1, 1), seed=st.integers(0, 9)
)
def test_start_is_the_published_one_by_a_root_of_the_moments(shape, share, seed):
    """Basis N = R H.T / i with a root R of the moments, the largest |N_j| |c_j| of each row, least squares on them."""
    o, i = shape
    piece, _, x = start(o, i, max(1, int(share * o * i)), seed)
    moments = (x.T @ x / len(x)).double()
    moments.diagonal().add_(1e-4 * moments.diagonal().mean())
    values, vectors = torch.linalg.eigh(moments)
    root = values.sqrt()[:, None] * vectors.T
    dense = torch.kron(hadamard_block(i), sylvester(i // len(hadamard_block(i)))).double()
    basis, spectrum = root @ dense.T / i, torch.zeros(o, i, dtype=torch.float64)
    solved = torch.linalg.solve(basis, root @ piece.error.double().T)  # (i, o)
    count = budgets(solved.norm(dim=0), len(piece.index), i)
    for row in range(o):
        score = basis.norm(dim=0) * solved[:, row].abs()
        best = score.argsort(descending=True)[: count[row]]
        fitted = torch.linalg.lstsq(basis[:, best], root @ piece.error[row].double()[:, None]).solution
        spectrum[row, best] = fitted[:, 0] * math.sqrt(o) / 20
    found = torch.zeros(o * i).index_add(0, piece.index, piece.values.detach()).view(o, i)
    assert_close(found, spectrum.float(), tolerance=1e-3)
    assert (piece.index.diff() > 0).all()


def test_start_makes_up_for_the_rounding_and_for_all_of_it_with_all_values():
    piece, w, x = start(6, 24, 40)
    before, after = (x @ piece.error.T).norm(), (x @ piece.delta().T).norm()
    largest = chosen(piece.hadamard(piece.error, True), torch.eye(24), 40)  # without the inputs
    blind = torch.zeros(6 * 24).index_add(0, *largest).view(6, 24)
    assert after < 0.8 * before
    assert after < (x @ (piece.hadamard(blind) / 24 - piece.error).T).norm()
    piece, w, _ = start(6, 24, 6 * 24)
    assert_close(w + piece.delta(), w, tolerance=1e-4)


def test_start_on_inputs_that_are_always_zero_takes_the_largest_coefficients():
    piece, *_ = start(6, 12, 30)
    piece.begin(torch.zeros(12, 12))
    index, values = chosen(piece.hadamard(piece.error, True).double(), torch.eye(12).double(), 30)
    assert torch.equal(piece.index, index)
    assert_close(piece.values.detach(), (values / (12 * piece.scaling)).float())


@pytest.mark.parametrize("limit", [1, 2**23])
def test_rows_may_be_solved_in_any_number_at_once(limit, monkeypatch):
    monkeypatch.setattr(qwha, "CHUNK", limit)
    piece, *_ = start(6, 12, 30)
    monkeypatch.undo()
    other, *_ = start(6, 12, 30)
    assert torch.equal(piece.index, other.index)
    assert_close(piece.values.detach(), other.values.detach())


def test_without_values_the_base_is_the_rounded_one():
    adapted = vit(QWHA(2, base_bits=3, targets=["v"]))
    qkv = adapted.backbone.body.blocks[0].attn.qkv
    before = qkv.weight.clone()
    adapted.calibrate("a", losses(adapted))
    for piece in adapted.pieces():
        nn.init.zeros_(piece.values)
    adapted.merge()
    assert_close(qkv.weight[96:], rounded(before[96:], 3))
    assert torch.equal(qkv.weight[:96], before[:96])
    adapted.unmerge()
    assert torch.equal(qkv.weight, before)


def test_calibration_brings_the_outputs_near_those_of_the_float_base_and_is_stored(tmp_path):
    adapted = vit(QWHA(8, base_bits=2, targets=["all-linear"]))
    run = lambda: adapted(X).tokens.detach()  # noqa: E731
    with adapted.disabled():
        base = run()
    rough = run()
    with pytest.raises(InputError, match="takes its start from data and has none yet"):
        adapted.train()(X)
    adapted.eval().calibrate("a", losses(adapted))
    fitted = run()
    assert (fitted - base).norm() < 0.7 * (rough - base).norm()
    adapted.save(tmp_path / "a.safetensors", "a")
    stored = read_tensors(tmp_path / "a.safetensors", read_manifest(tmp_path / "a.safetensors"))
    kinds = {(k.rsplit("/", 1)[1].rsplit(".", 1)[-1], v.dtype) for k, v in stored.items() if k.startswith("adapters/")}
    assert kinds == {("index", torch.int32), ("values", torch.float32)}
    fresh = Adapted(tiny_backbone(TINY["vit"])).eval()
    fresh.load(tmp_path / "a.safetensors")
    assert torch.equal(fresh(X).tokens.detach(), fitted)


# ---- tensor rings ----------------------------------------------------------------------------------------------------
@many
@given(
    sizes=st.sampled_from([(2, 2), (3, 4), (4, 5), (2, 3, 2), (2, 2, 4), (3, 2, 3), (2, 2, 2, 2)]),
    ring=st.integers(1, 3),
    rows=st.integers(1, 5),
    slower=st.sampled_from([0, 10**9]),
    seed=st.integers(0, 9),
)
def test_tlora_is_its_equation(sizes, ring, rows, slower, seed):
    """Entry by entry, both where T is formed and where it is not."""
    i = math.prod(sizes)
    piece = TLoRASite(site(rows, i), (rows, i), sizes, ring, 1, 0.5).double()
    noise(piece, 0.3, seed)
    dense = torch.zeros(i, i, dtype=torch.float64)
    places = list(torch.cartesian_prod(*map(torch.arange, sizes)))
    for row, at in enumerate(places):
        for column, to in enumerate(places):
            slices = [core[:, m, n] for core, m, n in zip(piece.cores, at, to)]
            dense[row, column] = torch.linalg.multi_dot(slices).trace()
    w = matrix(rows, i, seed=seed).double()
    before, tlora.SLOWER = tlora.SLOWER, slower
    try:
        found, _ = piece.map(w, None)
    finally:
        tlora.SLOWER = before
    assert_close(found, w @ dense + 0.5 * piece.b @ piece.a)


@pytest.mark.parametrize("slower", [0, 10**9])
@pytest.mark.parametrize(("cores", "ring"), [(2, 1), (2, 3), (3, 2), (4, 2)])
def test_tlora_starts_at_the_identity_and_all_of_it_learns(cores, ring, slower, monkeypatch):
    monkeypatch.setattr(tlora, "SLOWER", slower)
    torch.manual_seed(0)
    w, piece = matrix(6, 48), TLoRASite(site(6, 48), (6, 48), factorise(48, cores), ring, 2, 1.0)
    assert torch.equal(piece.map(w, None)[0], w)
    start = [p.detach().clone() for p in piece.parameters()]
    optimizer, cotangent = torch.optim.Adam(piece.parameters(), lr=1e-2), matrix(6, 48, seed=1)
    for _ in range(4):
        optimizer.zero_grad()
        (piece.map(w, None)[0] * cotangent).sum().backward()
        optimizer.step()
    for before, now in zip(start, piece.parameters()):
        changed = (before != now).flatten(1, 2).any(1) if now.ndim == 4 else before != now
        assert changed.all(), tuple(now.shape)


@many
@given(width=st.integers(2, 300), count=st.integers(2, 4))
def test_factors_are_the_most_balanced(width, count):
    def products(width, count, low=2):
        if count == 1:
            return [(width,)] if width >= low else []
        return [
            (n, *rest) for n in range(low, width + 1) if width % n == 0 for rest in products(width // n, count - 1, n)
        ]

    expected = min(products(width, count), key=lambda n: (sum(n), n), default=None)
    assert factorise(width, count) == expected


@pytest.mark.parametrize(("width", "sizes"), [(768, (8, 8, 12)), (384, (6, 8, 8)), (3072, (12, 16, 16)), (97, None)])
def test_factors_of_usual_widths(width, sizes):
    assert factorise(width, 3) == sizes


@pytest.mark.parametrize("make", [lambda: QWHA(2, targets=["q"]), lambda: TLoRA(2, targets=["q"])])
def test_autocast_makes_the_weight_in_float32(make):
    (piece, *_) = vit(make()).pieces("a")
    noise(piece)
    w = matrix(48, 48)
    weight = lambda: piece.map(w, None)[0] if piece.kind == "weight" else piece.delta()  # noqa: E731
    plain = weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(weight(), plain)


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QWHA(base_bits=5), "base_bits is one of 2, 3, 4, 8, or None; got 5"),
        (lambda: QWHA(alpha=0), "alpha must be above 0"),
        (lambda: QWHA(rank=0), "rank must be"),
        (lambda: TLoRA(cores=1), "cores is 2, 3 or 4, got 1"),
        (lambda: TLoRA(ring=0), "ring must be"),
    ],
)
def test_arguments_that_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "backbone", "message"),
    [
        (lambda: QWHA(25, targets=["q"]), "vit", "asks for 2400 values of the site trunk_00_q.*may be at most 24"),
        (lambda: QWHA(2, targets=["patch"]), "resnet", "trunk_xx_patch has 27 weights per output.*Hadamard"),
        (lambda: TLoRA(49, targets=["q"]), "vit", "rank 49 exceeds the site trunk_00_q"),
        (lambda: TLoRA(2, targets=["conv"]), "resnet", "weights per output of .* are no product of 3 numbers"),
    ],
)
def test_sites_that_are_refused(make, backbone, message):
    adapted = Adapted(tiny_backbone(TINY[backbone]))
    with pytest.raises(InputError, match=message) as raised:
        adapted.add("a", make())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("make", [lambda: QWHA(2), lambda: QWHA(2, base_bits=4), lambda: TLoRA(2)])
def test_a_base_of_integers_is_refused(make):
    backbone = tiny_backbone(TINY["vit"])
    fc1 = backbone.body.blocks[1].mlp.fc1
    fc1.weight = nn.Parameter(fc1.weight.detach().mul(100).to(torch.int8), requires_grad=False)
    with pytest.raises(
        InputError, match=r"blocks.1.mlp.fc1 is stored as torch.int8; it needs floating-point"
    ) as raised:
        Adapted(backbone).add("a", make())
    assert "\n" not in str(raised.value)
