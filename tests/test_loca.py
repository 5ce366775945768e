"""Updates in the domain of the cosine transform: LoCA."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import compiles, linear_site, on_vit_b, vit
from training import TARGETS, Run

from visadapt.adapters.loca import LoCA, LoCASite, dct, idct
from visadapt.benchmark.flops import flops
from visadapt.core.io import read_manifest
from visadapt.errors import InputError
from visadapt.testing import assert_close, noise

FUSED, ALL = ("qkv",), ("qkv", "proj", "fc1", "fc2")
SIDES = st.integers(2, 23)


# ---- LoCA: transform -------------------------------------------------------------------------------------------------
def cosines(n):
    """The orthonormal DCT-II matrix (n, n), entry by entry."""
    rows = [[math.cos(math.pi * p * (2 * q + 1) / (2 * n)) for q in range(n)] for p in range(n)]
    matrix = math.sqrt(2 / n) * torch.tensor(rows, dtype=torch.float64)
    matrix[0] /= math.sqrt(2)
    return matrix


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 13, 16, 24, 31])
def test_fast_transform_is_the_matrix(n):
    x, matrix = torch.randn(3, n, dtype=torch.float64), cosines(n)
    assert_close(dct(x), x @ matrix.T)
    assert_close(idct(x), x @ matrix)


def cosine_piece(o, i, count, alpha=0.7, seed=0):
    piece = LoCASite(linear_site(o, i), count, alpha, torch.Generator().manual_seed(seed)).double()
    noise([piece.values], 1.0, seed)
    return piece


def update(piece, places):
    """alpha C^T S D by the equation, for places (n, 2) that may coincide."""
    o, i = piece.site.dim_out, piece.site.dim_in
    s = torch.zeros(o, i, dtype=torch.float64)
    for value, (p, q) in zip(piece.values, places.tolist()):
        s[p, q] += value
    return piece.alpha * cosines(o).T @ s @ cosines(i)


@settings(max_examples=40, deadline=None)
@given(o=SIDES, i=SIDES, seed=st.integers(0, 99), moved=st.sampled_from([0.0, 1.0, 9.0]))
def test_update_is_its_equation_and_places_get_central_differences(o, i, seed, moved):
    """`moved` lets places coincide and lie beyond the border. The difference is that of the loss, for a linear one."""
    piece = cosine_piece(o, i, count=4, seed=seed)
    noise([piece.shift], moved, seed)
    last = torch.tensor([o - 1, i - 1])
    places = (piece.start + piece.shift.detach().round().long()).clamp(torch.zeros_like(last), last)
    assert torch.equal(piece.places(), places)
    assert_close(piece.delta(), update(piece, places))

    cotangent = torch.randn(o, i, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    to_values, to_shift = torch.autograd.grad((piece.delta() * cotangent).sum(), [piece.values, piece.shift])
    expected = torch.autograd.grad((update(piece, places) * cotangent).sum(), piece.values)[0]
    assert_close(to_values, expected, "gradient of the values")
    with torch.no_grad():
        for k in range(4):
            for axis in (0, 1):
                step = torch.zeros_like(places)
                step[k, axis] = 1
                ahead, behind = (places + step).clamp(max=last), (places - step).clamp(min=0)
                change = ((update(piece, ahead) - update(piece, behind)) * cotangent).sum() / 2
                assert to_shift[k, axis].item() == pytest.approx(change.item(), abs=1e-10)


def test_places_find_the_coefficient_beside_them():
    piece = cosine_piece(12, 9, count=1)
    piece.start.copy_(torch.tensor([[5, 4]]))
    piece.values.data.fill_(0.5)
    wanted = update(piece, torch.tensor([[6, 4]])).detach() / 0.5
    optimizer = torch.optim.SGD([{"params": [piece.values], "lr": 0.5}, {"params": [piece.shift], "lr": 5.0}])
    for _ in range(60):
        loss = (piece.delta() - wanted).square().sum() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert piece.places().tolist() == [[6, 4]] and loss < 1e-6


def test_no_dense_product_makes_the_update_or_its_gradient():
    piece = cosine_piece(48, 32, count=100)
    assert flops(lambda: piece.delta().sum().backward()) == 0


def test_half_precision_keeps_places_and_transforms_exact():
    half = cosine_piece(600, 500, count=30)
    noise([half.shift], 3.0)
    half.to(torch.bfloat16)
    double = copy.deepcopy(half).double()
    assert torch.equal(half.places(), double.places())
    found, expected = half.delta(), double.delta()
    assert found.dtype == torch.bfloat16
    size = expected.abs().max().item()
    assert_close(found.double() / size, expected / size, tolerance=1e-2)
    cotangent = torch.randn(600, 500).bfloat16()
    for result in (found, expected):
        result.backward(cotangent.to(result.dtype))
    for name in ("values", "shift"):
        gradient = getattr(double, name).grad
        error = (getattr(half, name).grad - gradient).abs().max()
        assert error <= 1e-2 * gradient.abs().max(), name


# ---- LoCA: places, counts --------------------------------------------------------------------------------------------
def test_first_places_are_distinct_spread_and_drawn_from_seed_and_site():
    first, again, other = (vit(LoCA(500, seed=s, targets=["q", "v"])).pieces("a") for s in (0, 0, 1))
    for piece in first:
        assert len({tuple(p) for p in piece.start.tolist()}) == 500
        assert piece.start.min() == 0 and (piece.start.amax(0) == 47).all()
        assert (piece.start.double().mean(0) - 23.5).abs().max() < 3
    assert all(torch.equal(a.start, b.start) for a, b in zip(first, again))
    drawn = [p.start for p in (*first, *other)]
    assert not any(torch.equal(a, b) for n, a in enumerate(drawn) for b in drawn[:n])


@pytest.mark.parametrize(("targets", "count"), [(FUSED, 36_000), (ALL, 144_000)])
def test_values_on_a_vit_b(targets, count):
    """The published count, that of the values; two coordinates of each are learned as well."""
    adapter = on_vit_b(LoCA(3000, targets=targets))
    assert sum(p.values.numel() for p in adapter.pieces.values()) == count
    assert sum(p.numel() for p in adapter.parameters()) == 3 * count


def test_a_file_holds_values_and_shifts(tmp_path):
    vit(LoCA(20)).save(tmp_path / "a.safetensors", "a")
    names = {k.rsplit("/", 1)[1] for k in read_manifest(tmp_path / "a.safetensors")["tensors"]} - {"output"}
    assert names == {"values", "shift"}


# ---- LoCA: schedule --------------------------------------------------------------------------------------------------
def make_loca():
    return LoCA(20, 1.0, search=0.6, coefficient_steps=2, location_steps=3, location_lr_mult=50.0, targets=TARGETS)


def learned_in_each_step(run, stop=None):
    """ "v" for steps that changed values, "p" for those that changed places, by their continuous coordinates."""
    names, seen = {"values": "v", "shift": "p"}, []
    before = {}

    def look(run):
        now = {n: p.detach().clone() for n, p in run.adapter.named_parameters()}
        seen.append("".join(sorted({names[n.rsplit(".")[-1]] for n in now if not torch.equal(now[n], before[n])})))
        before.update(now)

    before.update({n: p.detach().clone() for n, p in run.adapter.named_parameters()})
    run.go(stop, look)
    return seen


def test_values_and_places_take_turns_and_then_places_stay():
    """20 steps, of which 12 with a search; weight decay does not move what rests."""
    run = Run(make_loca(), total=20)
    assert "".join(learned_in_each_step(run)) == "vvpppvvpppvv" + 8 * "v"
    pieces = list(run.adapter.pieces.values())
    assert any(not torch.equal(p.places(), p.start) for p in pieces)


def test_without_a_search_places_stay():
    run = Run(LoCA(20, search=0, coefficient_steps=1, location_steps=1, targets=TARGETS), total=4)
    assert learned_in_each_step(run) == ["v"] * 4


def test_a_step_of_the_places_is_an_index_times_their_rate():
    run = Run(make_loca(), total=20, lr=1e-2, eps=1e-30).go(3)  # Adam's first step is the rate, whatever the gradient
    moved = torch.stack([p.shift for p in run.adapter.pieces.values()]).abs()
    assert (moved[moved > 0] - 0.5).abs().max() < 0.05 and (moved > 0).any()


def test_places_do_not_leave_the_matrix():
    adapter = LoCA(20, targets=["q"])
    piece = vit(adapter).pieces("a")[0]
    piece.shift.data[0] = torch.tensor([1e3, -1e3])
    assert piece.places()[0].tolist() == [47, 0]
    adapter.on_update(None)
    assert (piece.start[0] + piece.shift[0]).tolist() == [47, 0]


@pytest.mark.parametrize("stop", [1, 3, 9, 15])
def test_resume_is_exact(stop):
    """In the middle of both sorts of steps and behind the search."""
    whole = Run(make_loca(), total=18).go()
    parts = Run(make_loca(), total=18).go(stop).resumed(make_loca()).go()
    expected = whole.model.state_dict()
    assert not [k for k, v in parts.model.state_dict().items() if not torch.equal(v, expected[k])]


@pytest.mark.compile
def test_loca_compiles_as_one_graph():
    compiles(vit(LoCA(20)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoCA(0), "coefficients must be"),
        (lambda: LoCA(location_steps=0), "location_steps must be"),
        (lambda: LoCA(search=1.5), "search is a share of the run from 0 to 1, got 1.5"),
        (lambda: LoCA(location_lr_mult=0), "location_lr_mult must be above 0"),
        (lambda: vit(LoCA(3000)), "3000 coefficients exceed the 48 x 48 entries of trunk_00_q; lower them"),
        (lambda: vit(LoCA(20, targets=["patch"])), "cannot sit at patch"),
    ],
)
def test_wrong_loca_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
