"""Spatial low-rank attention beside the attention."""

from __future__ import annotations

import cmath

import pytest
import torch
from cases import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from visadapt.adapters.slra import SLRA, SpatialLowRankAttention
from visadapt.adapters.vpt import VPT
from visadapt.core.adapted import Adapted
from visadapt.core.context import Context
from visadapt.core.sites import Site
from visadapt.errors import InputError
from visadapt.testing import assert_close, difference, noise, tiny_backbone

D = 16


def piece(rank=12, heads=2, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    made = SpatialLowRankAttention(Site("attn", "attn", 0, D, D), rank, heads).to(dtype)
    noise(made, std=0.5, seed=seed)
    return made


def context(grid, prefix=0, prompts=0, frames=1):
    ctx = Context()
    ctx.begin(torch.zeros(1), grid, prefix)
    ctx.prompts = {"p": prompts}
    ctx.num_frames = frames
    return ctx


def tokens(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_rule(made, x, grid):
    """The change of patches (h*w, D) of one image, one head and one pair of positions at a time, in complex numbers."""
    columns = grid[1]
    low = x @ made.down.weight.T
    q, k, v = (low @ f.weight.T + f.bias for f in (made.q, made.k, made.v))
    width = q.shape[1] // made.heads
    third = width // 6
    heads = []
    for n in range(made.heads):
        part = slice(n * width, (n + 1) * width)

        def turned(values, part=part):
            pairs = [[complex(a, b) for a, b in row.view(-1, 2).tolist()] for row in values[:, part]]
            for place, row in enumerate(pairs):
                for j in range(third):
                    speed = 10_000 ** (-2 * j / (2 * third))
                    row[third + j] *= cmath.exp(1j * (place // columns) * speed)
                    row[2 * third + j] *= cmath.exp(1j * (place % columns) * speed)
            return torch.tensor(pairs, dtype=torch.complex128)

        logits = (turned(q) @ turned(k).conj().T).real / width**0.5
        heads.append(logits.softmax(1) @ v[:, part])
    return (torch.cat(heads, 1) @ made.o.weight.T + made.o.bias) @ made.up.weight.T


@settings(max_examples=20, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    sixths=st.integers(1, 3),
    heads=st.integers(1, 3),
    frames=st.integers(1, 2),
)
@torch.no_grad()
def test_every_frame_is_attended_to_for_itself_with_rotary_positions(grid, sixths, heads, frames):
    made, count = piece(6 * sixths * heads, heads), grid[0] * grid[1]
    x, y = tokens(2, frames * count), tokens(2, frames * count, seed=2)
    found = made(x, y, context(grid, frames=frames))
    for clip in range(2):
        for frame in range(frames):
            part = slice(frame * count, (frame + 1) * count)
            assert_close(found[clip, part], y[clip, part] + by_rule(made, x[clip, part], grid))


@torch.no_grad()
def test_class_register_and_prompt_tokens_neither_give_nor_take():
    made, grid = piece(), (2, 3)
    x, y = tokens(2, 2 + 3 + 6), tokens(2, 2 + 3 + 6, seed=2)
    found = made(x, y, context(grid, prefix=2, prompts=3))
    assert torch.equal(found[:, :5], y[:, :5])
    assert_close(found[:, 5:], made(x[:, 5:], y[:, 5:], context(grid)))
    assert difference(found[:, 5:], y[:, 5:]) > 1e-2


def test_prompts_beside_it_are_left_out():
    """In the network: what stands between class token and patches is not taken for patches."""
    adapted = Adapted(tiny_backbone(TINY["vit"])).eval()
    adapted.add("p", VPT(count=3))
    noise(adapted.add("a", SLRA(rank=12, heads=2)))
    seen, block = [], adapted.adapters["a"].pieces["trunk_01_attn"]
    block.down.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    adapted(torch.randn(1, 3, 28, 42))
    assert seen == [6]


@pytest.mark.parametrize(("rank", "total"), [(24, 471_168), (72, 1_579_392)])
def test_parameters_in_every_block_of_a_vit_b(rank, total):
    with torch.device("meta"):
        made = SpatialLowRankAttention(Site("attn", "attn", 0, 768, 768), rank, 4)
    assert 12 * sum(p.numel() for p in made.parameters()) == total == 12 * (2 * 768 * rank + 4 * (rank**2 + rank))


def test_learns_from_a_start_that_changes_nothing():
    adapted, x = Adapted(tiny_backbone(TINY["vit"])).eval(), torch.randn(2, 3, 28, 42)
    adapter = adapted.add("a", SLRA(rank=24))
    adapted.set_trainable("a")
    with torch.no_grad(), adapted.disabled():
        target = torch.roll(adapted(x).tokens, 1, 1)
    optimizer, losses = torch.optim.Adam(adapter.parameters(), 1e-2), []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append((adapted(x).tokens - target).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


@torch.no_grad()
def test_half_precision_keeps_its_type_and_turns_in_single():
    """Row 300 is not a number of bfloat16: angles made in that type would be off by up to a radian."""
    made, grid = piece(dtype=torch.bfloat16), (302, 1)
    x, y = tokens(1, 302, dtype=torch.bfloat16), torch.zeros(1, 302, D, dtype=torch.bfloat16)
    found = made(x, y, context(grid))
    assert found.dtype == torch.bfloat16
    exact = made.double()(x.double(), y.double(), context(grid))
    assert (found.double() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=20), "SLRA: rank must be a multiple of 6 \\* heads = 24, got 20; give e.g. rank=24"),
        (dict(rank=12), "got 12; give e.g. rank=24"),
        (dict(rank=50, heads=2), "6 \\* heads = 12, got 50; give e.g. rank=48"),
        (dict(rank=0), "rank must be a whole number of at least 1"),
        (dict(heads=0), "heads must be a whole number of at least 1"),
    ],
)
def test_what_makes_no_sense(options, message):
    with pytest.raises(InputError, match=message) as caught:
        SLRA(**options)
    assert "\n" not in str(caught.value)
