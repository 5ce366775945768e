"""Bottlenecks for space, low and high frequencies."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cases import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from parity.rein import Idle
from small import compiles, vit
from torch import nn

from visadapt.adapters.earth_adapter import EarthAdapter, FrequencyExperts, SpatialExpert, low_band
from visadapt.adapters.vpt import VPT
from visadapt.backbones.timm_vit import TimmViT
from visadapt.convert.earth_adapter import earth_adapter_keys
from visadapt.core.adapted import Adapted
from visadapt.errors import InputError
from visadapt.testing import assert_close, difference, noise, tiny_backbone

D, DEPTH, GRID = 12, 3, (4, 5)


def idle(adapter, dtype=torch.float64):
    """The adapter, away from its start, behind blocks that do nothing."""
    adapted = Adapted(Idle(DEPTH, D, 4).to(dtype))
    torch.manual_seed(0)
    noise(adapted.add("a", adapter).to(dtype), std=0.3)
    adapted.set_trainable("a")
    return adapted


def run(adapted, x, grid=GRID, prefix=1, prompts=0):
    adapted.ctx.begin(x, grid, prefix)
    adapted.ctx.prompts = {"p": prompts}
    return adapted.backbone.body(x)


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_fft(maps, cutoff):
    """Low frequencies of (..., h, w), cut out of the shifted spectrum of the whole."""
    h, w = maps.shape[-2:]
    axes, c = (-2, -1), int(min(h, w) * cutoff // 2)
    mask = torch.zeros(h, w, dtype=maps.dtype)
    mask[h // 2 - c : h // 2 + c, w // 2 - c : w // 2 + c] = 1
    spectrum = torch.fft.fftshift(torch.fft.fft2(maps, norm="ortho"), dim=axes)
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum * mask, dim=axes), norm="ortho").real


def by_rule(adapter, x, grid=GRID):
    """Patches (N, D) of one image behind all blocks: every expert on all channels, as the method is written."""

    def expert(module, seen):
        return F.linear(F.linear(seen, module.down.weight, module.down.bias).relu(), module.up.weight, module.up.bias)

    for piece in adapter.pieces.values():
        spatial = expert(piece.experts[0], x if piece.tokens is None else torch.cat([x, piece.tokens], 1))
        if len(piece.experts) > 1:
            low = by_fft(x.T.unflatten(1, grid), piece.cutoff).flatten(1).T
            parts = [spatial, expert(piece.experts[1], low), expert(piece.experts[2], x - low)]
            shares = piece.router(x).softmax(1)
            spatial = sum(share[:, None] * part for share, part in zip(shares.unbind(1), parts))
        x = x + piece.alpha * spatial
    return x


# ---- bands -----------------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(grid=st.tuples(st.integers(1, 9), st.integers(1, 9)), cutoff=st.floats(0.01, 1))
def test_low_band_is_that_of_the_shifted_spectrum(grid, cutoff):
    x = tokens(2, 3, *grid)
    found = low_band(x.flatten(2).mT, grid, cutoff)
    assert_close(found.mT.unflatten(2, grid), by_fft(x, cutoff))


def test_low_band_has_the_gradient_of_the_fft():
    x, cotangent = tokens(1, 2, 6, 7).requires_grad_(), tokens(1, 2, 6, 7, seed=2)
    low = low_band(x.flatten(2).mT, (6, 7), 0.7).mT.unflatten(2, (6, 7))
    found, wanted = (torch.autograd.grad((y * cotangent).sum(), x)[0] for y in (low, by_fft(x, 0.7)))
    assert_close(found, wanted)


@pytest.mark.parametrize(("frequency", "kept"), [(0, 1), (1, 1), (2, 0.5), (3, 0)])
def test_of_the_highest_frequency_one_half_is_low(frequency, kept):
    """c = 2 at 8 rows: -2 is in the kept square and 2 is not."""
    wave = torch.cos(2 * math.pi * frequency * torch.arange(8.0).double() / 8)[:, None].expand(8, 8)
    assert_close(low_band(wave.reshape(1, 64, 1), (8, 8), 0.5), kept * wave.reshape(1, 64, 1))


# ---- the adapter -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [{}, dict(fft_layers=(0, 1, 2)), dict(fft_layers=()), dict(token_width=2, token_grid=GRID), dict(cutoff=0.3)],
    ids=str,
)
@torch.no_grad()
def test_every_block_adds_its_experts_to_the_patches(options):
    """cutoff=0.3 is the case of a grid so small that nothing is low."""
    adapted = idle(EarthAdapter(**dict(width=3, fft_layers=(1,), cutoff=0.9) | options))
    x = tokens(2, 2 + 3 + 20, D)
    found = run(adapted, x, prefix=2, prompts=3)
    assert torch.equal(found[:, :5], x[:, :5])
    for image in range(2):
        assert_close(found[image, 5:], by_rule(adapted.adapters["a"], x[image, 5:]))


def test_gradients_are_those_of_the_method_as_it_is_written():
    adapted = idle(EarthAdapter(width=3, fft_layers=(1, 2), cutoff=0.9, token_width=2, token_grid=GRID))
    x, cotangent = tokens(1, 20, D).requires_grad_(), tokens(1, 20, D, seed=2)
    learning = [x, *adapted.adapters.parameters()]
    results = run(adapted, x, prefix=0), by_rule(adapted.adapters["a"], x[0])[None]
    found, wanted = (torch.autograd.grad((y * cotangent).sum(), learning) for y in results)
    for one, other in zip(found, wanted):
        assert_close(one, other, "gradient")


@pytest.mark.parametrize("names", ["pa", "ap"])
def test_prompts_beside_it_are_left_out(names):
    """In the network, where they are still there behind a block if they were added later."""
    adapted, seen = Adapted(tiny_backbone(TINY["vit"])).eval(), []
    made = {"p": VPT(count=3), "a": EarthAdapter(width=4, fft_layers=(0, 1))}
    for name in names:
        adapted.add(name, made[name])
    for piece in made["a"].pieces.values():
        piece.hidden = lambda y, lead, grid, inner=piece.hidden: seen.append((y.shape[1], lead)) or inner(y, lead, grid)
    adapted(torch.randn(1, 3, 28, 42))
    assert seen == 2 * [(7, 1) if names == "pa" else (10, 4)]


@torch.no_grad()
def test_half_precision_filters_in_single():
    """High frequencies of one are lost in bfloat16 where the mean of a channel is 300."""
    adapted = idle(EarthAdapter(width=3, fft_layers=(0, 1, 2), cutoff=0.9), torch.float32)
    for piece in adapted.adapters["a"].pieces.values():
        piece.experts[0].up.weight.zero_(), piece.experts[1].up.weight.zero_(), piece.router.weight.zero_()
    x = (300 + tokens(1, 21, D)).float()
    with torch.autocast("cpu", torch.bfloat16):
        rough = run(adapted, x)[0, 1:] - x[0, 1:]
    assert rough.dtype == torch.float32
    patches = x[0, 1:].double()
    exact = by_rule(adapted.adapters["a"].double(), patches) - patches
    assert (rough - exact).norm() < 0.01 * exact.norm()


@torch.no_grad()
def test_a_model_in_half_precision_stays_in_it():
    halved = Adapted(Idle(DEPTH, D, 4).bfloat16())
    halved.add("a", EarthAdapter(width=3, fft_layers=(1,), cutoff=0.9)).bfloat16()
    assert run(halved, tokens(1, 21, D).bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_learned_inputs_are_resampled_to_another_grid():
    adapted = idle(EarthAdapter(width=3, fft_layers=(1,), cutoff=0.9, token_width=2, token_grid=(3, 2)))
    pieces = adapted.adapters["a"].pieces.values()
    rough = [piece.tokens.clone() for piece in pieces]
    x = tokens(1, 21, D)
    found = run(adapted, x)
    for piece, values in zip(pieces, rough):
        fine = F.interpolate(values.T.reshape(1, 2, 3, 2), GRID, mode="bilinear", align_corners=False)
        piece.tokens = nn.Parameter(fine[0].flatten(1).T)
    assert_close(found[0, 1:], by_rule(adapted.adapters["a"], x[0, 1:]))


def test_nothing_is_left_out_of_the_graph_where_no_frequency_is_low():
    adapted = idle(EarthAdapter(width=3, fft_layers=(1,), cutoff=0.1))
    run(adapted, tokens(1, 21, D)).square().sum().backward()
    assert all(value.grad is not None for value in adapted.adapters.parameters())


@pytest.fixture(scope="module")
def vit_l():
    with torch.device("meta"):
        return TimmViT("vit_large_patch16_224")


@pytest.mark.parametrize(
    ("width", "layers", "total"),
    [
        (64, (0, 1, 2), 3_974_049),
        (16, (-1, -2, -3), 1_023_489),
        (32, range(18, 24), 2_415_786),
        (32, (21, 22, 23), 2_007_009),
        (24, range(18, 24), 1_825_674),
        (64, range(6), 4_776_234),
    ],
)
def test_parameters_in_a_vit_l_are_those_that_the_official_code_uses(vit_l, width, layers, total):
    with torch.device("meta"):
        adapter = EarthAdapter(width, layers)
        adapter.build(vit_l)
    assert sum(p.numel() for p in adapter.parameters()) == total
    found = {p.site.layer for p in adapter.pieces.values() if isinstance(p, FrequencyExperts)}
    assert found == {n % 24 for n in layers} and len(adapter.pieces) == 24


def test_starts_as_torch_and_the_options_say():
    adapter = EarthAdapter(width=64, fft_layers=(1,), scale=0.2, token_width=8, token_grid=(8, 8))
    adapter.build(Idle(2, 256, 4))
    for piece in adapter.pieces.values():
        assert piece.alpha.item() == pytest.approx(0.2)
        bounds = {piece.tokens: math.sqrt(6 / (3 * 4**2 + 256))}
        bounds |= {e.down.weight: (256 + (8 if n == 0 else 0)) ** -0.5 for n, e in enumerate(piece.experts)}
        bounds |= {e.up.weight: 64**-0.5 for e in piece.experts}
        for value, bound in bounds.items():
            assert 0.9 * bound < value.abs().max() <= bound


def test_blocks_can_be_chosen():
    adapter = EarthAdapter(width=3, fft_layers=(-1,), layers=(0, 2))
    adapter.build(Idle(3, D, 4))
    assert [type(p) for p in adapter.pieces.values()] == [SpatialExpert, FrequencyExperts]


@pytest.mark.compile
def test_compiles_and_exports():
    adapted = vit(EarthAdapter(width=3, fft_layers=(1,), cutoff=1.0, token_width=2, token_grid=(2, 2)))
    compiles(adapted)
    x = torch.randn(1, 3, 28, 42)
    program = torch.export.export(Patches(adapted), (x,))
    assert_close(program.module()(x).detach(), adapted(x).tokens.detach())


class Patches(nn.Module):
    """A tensor out: what exporters take."""

    def __init__(self, adapted):
        super().__init__()
        self.adapted = adapted

    def forward(self, x):
        return self.adapted(x).tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(width=0), "width must be a whole number of at least 1"),
        (dict(cutoff=0), "cutoff must be above 0 and at most 1, got 0"),
        (dict(cutoff=1.5), "cutoff must be above 0 and at most 1, got 1.5"),
        (dict(scale=0), "scale must be above 0"),
        (dict(token_width=-1), "token_width must be a whole number of at least 1"),
        (dict(token_grid=(32,)), r"token_grid is \[rows, columns\], got \[32\]"),
        (dict(token_grid=(0, 4)), r"token_grid\[0\] must be a whole number of at least 1"),
        (dict(fft_layers=(3,)), r"fft_layers \[3\] are not among the adapted blocks \[0, 1, 2\]"),
        (dict(fft_layers=(-4, 0)), r"fft_layers \[-4\] are not"),
        (dict(fft_layers=(0, -1), layers=(0, 1)), r"fft_layers \[-1\] are not among the adapted blocks \[0, 1\]"),
    ],
)
def test_what_makes_no_sense(options, message):
    with pytest.raises(InputError, match=message) as caught:
        EarthAdapter(**options).build(Idle(DEPTH, D, 4))
    assert "\n" not in str(caught.value)


# ---- published files -------------------------------------------------------------------------------------------------
def published(adapted, prefix="backbone.refine_feat."):
    """A state dict of the official code with the values of an adapter and, as there, much that is never used."""
    pieces = list(adapted.adapters["a"].pieces.values())
    state = {"scale": torch.stack([p.alpha for p in pieces])}
    if pieces[0].tokens is not None:
        state["refine_token"] = torch.stack([p.tokens for p in pieces])
    for layer, piece in enumerate(pieces):
        state |= {f"layer_norm.{layer}.{leaf}": torch.ones(D) for leaf in ("weight", "bias")}
        state |= {
            f"router.{layer}.{leaf}": torch.full((3, D)[: n + 1], 9.0) for n, leaf in enumerate(("bias", "weight"))
        }
        for n in range(3):
            expert = piece.experts[n] if n < len(piece.experts) else piece.experts[0]
            for number, part in ((0, expert.down), (2, expert.up)):
                state |= {f"mlp_list{n + 1}.{layer}.{number}.{k}": v for k, v in part.named_parameters()}
        if len(piece.experts) > 1:
            state |= {f"router.{layer}.{leaf}": value for leaf, value in piece.router.named_parameters()}
    whole = {f"{prefix}{k}": v.detach().clone() for k, v in state.items()}
    if prefix.startswith("backbone."):
        others = ("backbone.blocks.0.norm1.weight", "decode_head.conv.weight", "ema_model.backbone.refine_feat.scale")
        whole |= {name: torch.ones(1) for name in others}
    return whole


@pytest.mark.parametrize("prefix", ["backbone.refine_feat.", "refine_feat.", ""])
@pytest.mark.parametrize("options", [{}, dict(token_width=2, token_grid=GRID)], ids=str)
@torch.no_grad()
def test_published_file_gives_the_same_adapter(options, prefix):
    options = dict(width=3, fft_layers=(0, -1), cutoff=0.9) | options
    first, second = idle(EarthAdapter(**options)), idle(EarthAdapter(**options))
    noise(second.adapters)
    x, adapter = tokens(1, 21, D), second.adapters["a"]
    assert difference(run(first, x), run(second, x)) > 1e-2
    keys = earth_adapter_keys({"state_dict": published(first, prefix), "meta": {}}, (0, -1))
    assert set(keys) == set(adapter.pieces)
    for key, values in keys.items():
        adapter.pieces[key].load_state_dict(values)
    assert torch.equal(run(first, x), run(second, x))


def changed(**values):
    state = published(idle(EarthAdapter(width=3, fft_layers=(1,))), "")
    return {k: v for k, v in (state | values).items() if v is not None}


@pytest.mark.parametrize(
    ("state", "layers", "message"),
    [
        ({"decode_head.conv.weight": torch.zeros(1)}, (1,), "no Earth-Adapter .* among decode_head.conv.weight"),
        (changed(**{"mlp_list4.0.0.weight": torch.zeros(1)}), (1,), "has 'mlp_list4.0.0.weight'"),
        (changed(**{"mlp_list2.1.2.bias": None}), (1,), "lacks experts.1.up.bias of block 1"),
        (changed(**{"router.1.bias": None}), (1,), "lacks router.bias of block 1"),
        (changed(**{"mlp_list1.2.0.bias": None}), (1,), "lacks experts.0.down.bias of block 2"),
        (changed(), (3,), r"blocks 0 to 2, not \[3\]"),
    ],
)
def test_other_files_are_refused(state, layers, message):
    with pytest.raises(InputError, match=message):
        earth_adapter_keys(state, layers)


def test_only_adapted_blocks_are_taken_from_a_file():
    keys = earth_adapter_keys(changed(), (1,), layers=(1, -1))
    assert sorted(keys) == ["trunk_01_block", "trunk_02_block"]
    assert len(keys["trunk_01_block"]) == 1 + 3 * 4 + 2 and len(keys["trunk_02_block"]) == 1 + 4
