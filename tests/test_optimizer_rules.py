"""The rules of single optimizers: LoRA-Pro, ALLoRA, GaLore, SST."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import solve_sylvester
from torch import nn

from visadapt.core.decompose import svd
from visadapt.optim import galore
from visadapt.optim.allora import ALLoRA, row_factors
from visadapt.optim.galore import PROJECTIONS, GaLore
from visadapt.optim.lora_pro import LoRAPro
from visadapt.optim.sst import SST
from visadapt.testing import assert_close


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- LoRA-Pro --------------------------------------------------------------------------------------------------------
def lora_pro_reference(a, b, s, grads, lr, decay, delta, beta1=0.9, beta2=0.999, eps=1e-8):
    """The equations with P, the (o, i) products and a general solver."""
    first = second = torch.zeros(b.shape[0], a.shape[1], dtype=a.dtype)
    eye = torch.eye(len(a), dtype=a.dtype)
    for step, grad in enumerate(grads, 1):
        inverse_b, inverse_a = torch.linalg.pinv(b.T @ b + delta * eye), torch.linalg.pinv(a @ a.T + delta * eye)
        outside = torch.eye(len(b), dtype=a.dtype) - b @ inverse_b @ b.T
        nearest = b @ (inverse_b @ b.T @ grad) + outside @ grad @ a.T @ inverse_a @ a
        first, second = beta1 * first + (1 - beta1) * nearest, beta2 * second + (1 - beta2) * nearest**2
        ratio = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + eps)
        move_a = inverse_b @ b.T @ ratio / s
        move_b = outside @ ratio @ a.T @ inverse_a / s
        x = torch.from_numpy(solve_sylvester((b.T @ b).numpy(), (a @ a.T).numpy(), (-move_a @ a.T).numpy()))
        a, b = (1 - lr * decay) * a - lr * (move_a + x @ a), (1 - lr * decay) * b - lr * (move_b - b @ x)
    return a, b


def pair(a, b, s, **optimizer):
    a, b = nn.Parameter(a.clone()), nn.Parameter(b.clone())
    return a, b, LoRAPro([{"params": [a, b], "pairs": [s]}], **optimizer)


def feed(a, b, s, grad):
    a.grad, b.grad = s * b.detach().T @ grad, s * grad @ a.detach().T


@settings(max_examples=25, deadline=None)
@given(
    *(st.integers(6, 9),) * 2, st.integers(1, 4), st.floats(0.25, 4), st.sampled_from([1e-8, 0.1]), st.integers(0, 99)
)
def test_lora_pro_is_its_equations(o, i, r, s, delta, seed):
    a, b = random(r, i, seed=seed, dtype=torch.float64), random(o, r, seed=seed + 1, dtype=torch.float64)
    grads = [random(o, i, seed=seed + 2 + n, dtype=torch.float64) for n in range(3)]
    wanted = lora_pro_reference(a, b, s, grads, lr=0.05, decay=0.1, delta=delta)
    first, second, optimizer = pair(a, b, s, lr=0.05, weight_decay=0.1, delta=delta)
    for grad in grads:
        feed(first, second, s, grad)
        optimizer.step()
    assert_close(first.detach(), wanted[0], "A", 1e-6)
    assert_close(second.detach(), wanted[1], "B", 1e-6)


def test_lora_pro_moves_the_weight_as_near_to_adams_direction_as_the_factors_can():
    """What is missing is out of reach of both factors; how large s is does not matter."""
    changes = []
    for s in (0.5, 1.0, 4.0):
        start = random(3, 9, dtype=torch.float64), random(7, 3, seed=1, dtype=torch.float64) / s
        a, b, optimizer = pair(*start, s, lr=1e-7, variant="paper")
        grad = random(7, 9, seed=2, dtype=torch.float64)
        feed(a, b, s, grad)
        optimizer.step()
        changes.append(s * (b @ a - start[1] @ start[0]).detach() / 1e-7)
    for change in changes[1:]:
        assert_close(change, changes[0], tolerance=1e-4)
    (a, b), state = start, optimizer.state[b]
    direction = state["exp_avg"] / 0.1 / ((state["exp_avg_sq"] / 1e-3).sqrt() + 1e-8)
    missing = direction + changes[-1]
    assert missing.norm() > 0.1
    assert_close(b.T @ missing, torch.zeros(3, 9, dtype=torch.float64), tolerance=1e-4)
    assert_close(missing @ a.T, torch.zeros(7, 3, dtype=torch.float64), tolerance=1e-4)


def test_lora_pro_from_a_zero_b_moves_b_alone_in_its_first_step():
    start, grad = random(3, 9), random(7, 9, seed=2)
    a, b, optimizer = pair(start, torch.zeros(7, 3), 2.0, lr=0.1)
    feed(a, b, 2.0, grad)
    optimizer.step()
    inside = torch.linalg.pinv(start) @ start
    assert torch.equal(a, start)
    assert_close(b.detach(), -0.1 / 2 * (grad @ inside).sign() @ torch.linalg.pinv(start), tolerance=1e-4)


def test_lora_pro_stays_finite_where_factors_lose_rank():
    a, b = random(4, 12), random(10, 4, seed=1)
    a[3], b[:, 2] = a[2], 0.0
    b[:, 3] = b[:, 1]
    first, second, optimizer = pair(a, b, 1.0, lr=1e-3)
    for n in range(20):
        feed(first, second, 1.0, random(10, 12, seed=n))
        optimizer.step()
    assert max((first - a).abs().max(), (second - b).abs().max()) < 1.0


def test_lora_pro_of_the_published_code_corrects_moments_as_one_step_later():
    ends = {}
    for variant in ("paper", "official"):
        a, b, optimizer = pair(random(3, 9), random(7, 3, seed=1), 1.0, lr=0.1, variant=variant)
        feed(a, b, 1.0, random(7, 9, seed=2))
        before = (b @ a).detach()
        optimizer.step()
        ends[variant] = (b @ a).detach() - before
    times = (0.1 / (1 - 0.9**2)) / (1e-3 / (1 - 0.999**2)) ** 0.5
    assert_close(ends["official"].norm() / ends["paper"].norm(), torch.tensor(times), tolerance=0.02)


# ---- ALLoRA ----------------------------------------------------------------------------------------------------------
def both(mode, eta=2.0, steps=1, grow=1.0):
    """A pair after some steps of ALLoRA and of AdamW from the same gradients, and its start."""
    start = random(2, 6), grow * random(5, 2, seed=1)
    start[1][0] = 0.0
    a, b = (nn.Parameter(p.clone()) for p in start)
    c, d = (nn.Parameter(p.clone()) for p in start)
    adaptive = ALLoRA([{"params": [a, b], "pairs": [1.0]}], lr=0.1, eta=eta, mode=mode, weight_decay=0.2)
    plain = torch.optim.AdamW([c, d], lr=0.1, weight_decay=0.2)
    for n in range(steps):
        for p, q in ((a, c), (b, d)):
            p.grad = random(*p.shape, seed=n + 5)
            q.grad = p.grad.clone()
        adaptive.step()
        plain.step()
    return start, (a, b), (c, d), adaptive


@pytest.mark.parametrize("eta", [0.5, 2.0, 8.0])
def test_allora_gives_every_row_of_b_a_rate_of_its_own(eta):
    start, (a, b), (c, d), _ = both("step", eta)
    assert torch.equal(a, c)
    for old, new, by_adamw in zip(start[1], b, d):
        factor = 1 / (old.norm() + 1 / eta**2) ** 0.5
        assert_close((new - old).detach(), (factor * (by_adamw - old)).detach(), tolerance=1e-6)
    assert (b[0] / d[0])[0].item() == pytest.approx(eta, rel=1e-5)


def test_allora_on_gradients_is_what_adam_sees():
    start, (a, b), (c, d), optimizer = both("grad")
    assert torch.equal(a, c)
    assert_close(optimizer.state[b]["exp_avg"], 0.1 * row_factors(start[1], 2.0) * random(5, 2, seed=5), tolerance=1e-6)
    assert_close(b.detach(), d.detach(), tolerance=1e-5)  # a first step of Adam sees no factor
    _, (_, b), (_, d), _ = both("grad", steps=4, grow=0.01)
    assert (b - d).abs().max() > 1e-3


# ---- GaLore ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
@pytest.mark.parametrize("proj_type", PROJECTIONS)
@pytest.mark.parametrize("rank", [2, 99])
def test_galore_steps_along_the_projected_gradient(proj_type, shape, rank):
    """The first step: moments are (1 - beta) R and (1 - beta2) R^2 of R = U' G or G V or U' G V."""
    weight, grad, eps = random(*shape), random(*shape, seed=1), 1e-3  # eps above what rounding leaves of zeros in R
    p = nn.Parameter(weight.clone())
    optimizer = GaLore(
        [{"params": [p], "matrices": True}],
        **dict(lr=0.1, rank=rank, scale=0.5, proj_type=proj_type, weight_decay=0.2, eps=eps),
    )
    p.grad = grad.clone()
    optimizer.step()
    u, _, vt = torch.linalg.svd(grad, full_matrices=False)
    smaller = "right" if shape[0] > shape[1] else "left"
    larger = "left" if smaller == "right" else "right"
    side = {"std": smaller, "reverse_std": larger}.get(proj_type, proj_type)
    left = torch.eye(shape[0]) if side == "right" else u[:, :rank]
    right = torch.eye(shape[1]) if side == "left" else vt[:rank].T
    low = left.T @ grad @ right
    step = left @ (0.1 * low / (1e-3**0.5 * low.abs() + eps)) @ right.T
    rate = 0.1 * (1 - 0.999) ** 0.5 / (1 - 0.9)
    assert_close(p.detach(), (weight - 0.5 * rate * step) * (1 - 0.1 * 0.2), tolerance=1e-5)


def test_galore_takes_a_new_subspace_after_its_gap_and_keeps_the_moments():
    p = nn.Parameter(random(7, 5))
    optimizer = GaLore([{"params": [p], "matrices": True}], lr=0.1, rank=2, update_proj_gap=3)
    subspaces, first = [], torch.zeros(7, 2)
    for n in range(7):
        p.grad = random(7, 5, seed=n)
        optimizer.step()
        subspaces.append(optimizer.state[p]["right"].clone())
        first = 0.9 * first + 0.1 * p.grad @ subspaces[-1].T
        assert_close(optimizer.state[p]["exp_avg"], first, tolerance=1e-5)
    assert [torch.equal(s, t) for s, t in pairwise(subspaces)] == [True, True, False, True, True, False]
    assert_close(subspaces[3], galore.singular_vectors(random(7, 5, seed=3), 2, "std")["right"])


@pytest.mark.parametrize("kind", [GaLore, SST])
def test_convolutions_are_worked_on_as_matrices(kind):
    """In any memory layout."""
    ends = []
    for shape, layout in (((8, 27), torch.contiguous_format), ((8, 3, 3, 3), torch.channels_last)):
        p = nn.Parameter(random(8, 27).view(shape).to(memory_format=layout))
        optimizer = kind([{"params": [p], "matrices": True}], lr=0.01, rank=3)
        for n in range(3):
            p.grad = random(8, 27, seed=n + 1).view(shape).to(memory_format=layout)
            optimizer.step()
        ends.append(p.detach().flatten(1))
    assert torch.equal(*ends)


def test_galore_keeps_less_than_adam():
    p = nn.Parameter(random(48, 192))
    optimizer = GaLore([{"params": [p], "matrices": True}], lr=0.1, rank=4)
    p.grad = random(48, 192, seed=1)
    optimizer.step()
    held = sum(v.numel() for v in optimizer.state[p].values() if isinstance(v, torch.Tensor))
    assert held == 2 * 4 * 192 + 48 * 4


# ---- SST -------------------------------------------------------------------------------------------------------------
def spectral(weight, **optimizer):
    p = nn.Parameter(weight.clone())
    return p, SST([{"params": [p], "matrices": True}], **optimizer)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_sst_descends_by_the_chain_rule(shape):
    """With a large eps Adam's step is lr / eps times the gradient; autograd tells that of U, sigma and V."""
    weight, target, rate = random(*shape), random(*shape, seed=1), 0.01
    p, optimizer = spectral(weight, lr=rate * 1e6, eps=1e6, rank=2, warmup=1, betas=(0.0, 0.0))
    (p - target).square().sum().backward()
    optimizer.step()
    state = optimizer.state[p]
    u, sigma, vt = (t.requires_grad_() for t in torch.linalg.svd(weight, full_matrices=False))
    (u * sigma @ vt - target).square().sum().backward()
    assert_close(state["sigma"], (sigma - rate * sigma.grad).detach(), "sigma", 1e-4)
    drawn = set(state["index"].tolist())
    assert len(drawn) == 2
    for n in range(6):
        for new, old, grad in ((state["u"][:, n], u[:, n], u.grad[:, n]), (state["vt"][n], vt[n], vt.grad[n])):
            if n in drawn:
                enhanced = grad / sigma[n]
                old = old - rate * (enhanced - old * (old @ enhanced))
            wanted = (old / old.norm()).detach()
            assert_close(new * (new @ wanted).sign(), wanted, f"vector {n}", 1e-4)
    assert_close(p.detach(), state["u"] * state["sigma"] @ state["vt"])


def test_sst_at_rate_zero_leaves_the_weight():
    p, optimizer = spectral(random(9, 6), lr=0.0, rank=3, update_gap=1)
    for n in range(5):
        p.grad = random(9, 6, seed=n)
        optimizer.step()
    assert_close(p.detach(), random(9, 6), tolerance=3e-6)


def test_sst_decays_the_weight():
    p, optimizer = spectral(random(9, 6), lr=0.1, weight_decay=0.5)
    p.grad = torch.zeros(9, 6)
    optimizer.step()
    assert_close(p.detach(), (1 - 0.1 * 0.5) * random(9, 6))


def test_sst_draws_holds_and_decomposes_anew():
    """Six components, four at a time: two draws of three steps, then a new decomposition."""
    p, optimizer = spectral(random(9, 6), lr=0.05, rank=4, update_gap=3, warmup=1, weight_decay=0.1)
    state, draws = None, []
    for n in range(8):
        before = None if state is None else {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
        p.grad = random(9, 6, seed=n)
        if n == 6:
            u, _, vt = svd(p)
        optimizer.step()
        state = optimizer.state[p]
        draws.append(state["index"].tolist())
        still = sorted(set(range(6)) - set(draws[-1]))
        assert len(set(draws[-1])) == 4 and state["u_exp_avg"].shape == (9, 4)
        if n % 6:
            assert torch.equal(state["u"][:, still], before["u"][:, still])
            assert not torch.equal(state["u"][:, draws[-1]], before["u"][:, draws[-1]])
            assert (state["sigma"] != before["sigma"]).all()
        if n == 3:
            first = 0.1 * (p.grad @ before["vt"].T)[:, draws[-1]]
            old = before["u"][:, draws[-1]]
            assert_close(state["u_exp_avg"], first - old * (old * first).sum(0), "fresh moments", 1e-5)
        assert_close(state["u"].norm(dim=0), torch.ones(6))
        if n == 6:  # what did not learn since the new decomposition is orthogonal
            assert_close(state["u"][:, still].T @ state["u"][:, still], torch.eye(2), tolerance=1e-5)
            slopes = (u * (p.grad @ vt.T)).sum(0)
            assert_close(state["sigma_exp_avg"], 0.1 * slopes, "fresh moments", 1e-5)
    assert draws[0] == draws[1] == draws[2] != draws[3] == draws[4] == draws[5] != draws[6]


def test_sst_draws_large_components_more_often_and_others_with_other_seeds():
    u, _, vt = torch.linalg.svd(random(9, 6), full_matrices=False)
    counts = torch.zeros(6)
    for seed in range(60):
        p, optimizer = spectral(u * torch.tensor([8.0, 4.0, 1e-9, 0.0, 0.0, 0.0]) @ vt, lr=0.0, rank=1, seed=seed)
        p.grad = random(9, 6)
        optimizer.step()
        counts[optimizer.state[p]["index"]] += 1
    assert counts[2:].sum() == 0 and 12 <= counts[1] <= 28


def test_sst_of_a_zero_weight_begins_to_learn():
    p, optimizer = spectral(torch.zeros(9, 6), lr=0.1, rank=6)
    p.grad = random(9, 6)
    optimizer.step()
    assert p.isfinite().all() and p.abs().max() > 0


def test_sst_warms_up_vectors_after_each_draw():
    far = {}
    for warmup in (1, 4):
        p, optimizer = spectral(random(9, 6), lr=1e-4, rank=2, warmup=warmup)
        p.grad = random(9, 6, seed=1)
        optimizer.step()
        u, _, _ = torch.linalg.svd(random(9, 6), full_matrices=False)
        state = optimizer.state[p]
        old = u * (u * state["u"]).sum(0).sign()
        far[warmup] = (state["u"] - old)[:, state["index"]].norm()
    assert_close(far[1] / far[4], torch.tensor(4.0), tolerance=0.05)
