"""Bi-LoRA and Bi-AdaptFormer: the quantiser, its packed form, and files that give the same output."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from training import BACKBONE, TARGETS, Run, first

from visadapt.adapters._common.quantised import EPS, Quantised, code_book, pack, unpack
from visadapt.adapters.bi_adaptformer import BiAdaptFormer
from visadapt.adapters.bi_lora import BiLoRA
from visadapt.backbones.timm_vit import TimmViT
from visadapt.core.adapted import Adapted
from visadapt.core.io import adapter_tensors
from visadapt.errors import InputError
from visadapt.testing import assert_close, noise

BITS = st.sampled_from([1, 2, 4, 8])
METHODS = {
    "bi_lora": lambda: BiLoRA(4, bits=2, targets=TARGETS),
    "bi_adaptformer": lambda: BiAdaptFormer(4, bits=1),
}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapt(adapter):
    adapted = Adapted(copy.deepcopy(BACKBONE)).eval()
    torch.manual_seed(0)
    adapted.add("a", adapter)
    return adapted


def output(adapted):
    with torch.no_grad():
        return adapted(normal(2, 3, 28, 28)).tokens


# ---- code book -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("bits", "positive"),
    [
        (1, [0.67449]),
        (2, [0.37775, 1.26572]),
        (4, [0.10555, 0.31904, 0.54007, 0.77519, 1.03401, 1.33311, 1.70774, 2.26549]),
    ],
)
def test_levels_are_the_published_ones(bits, positive):
    levels, thresholds = (torch.tensor(values, dtype=torch.float64) for values in code_book(bits))
    assert_close(levels, torch.tensor([-x for x in reversed(positive)] + positive).double(), tolerance=1e-5)
    assert_close(thresholds, (levels[1:] + levels[:-1]) / 2, tolerance=1e-9)


def test_thresholds_of_8_bits_are_those_of_the_last_round():
    levels, thresholds = (torch.tensor(values, dtype=torch.float64) for values in code_book(8))
    assert len(levels) == 256 and levels.diff().min() > 0 and thresholds.diff().min() > 0
    off = (thresholds - (levels[1:] + levels[:-1]) / 2).abs().max()
    assert 9.5e-4 < off < 9.7e-4


# ---- one matrix ------------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(bits=BITS, values=st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_packing_keeps_every_number_and_puts_the_first_lowest(bits, values):
    codes = torch.tensor(values) % 2**bits
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-len(values) * bits // 8)
    first_byte = sum(int(c) * 2 ** (bits * n) for n, c in enumerate(codes[: 8 // bits]))
    assert packed[0] == first_byte
    assert torch.equal(unpack(packed, bits, len(values)), codes)


@settings(max_examples=40, deadline=None)
@given(bits=BITS, shape=st.tuples(st.integers(1, 9), st.integers(2, 9)), scale=st.sampled_from([1e-3, 1.0, 50.0]))
def test_value_and_gradient_are_those_of_the_equation(bits, shape, scale):
    """The gradient by the chain rule by hand: through the standardised matrix as if q were the identity, m and s."""
    w, cotangent = scale * (normal(*shape) + 0.3), normal(*shape, seed=1)
    quantised = Quantised(w.clone(), bits)
    m, s = w.mean(), w.std()
    standard = (w - m) / (s + EPS)
    levels, thresholds = (torch.tensor(values) for values in code_book(bits))
    q = levels[0] + sum((standard > t) * (b - a) for t, a, b in zip(thresholds, levels, levels[1:]))
    assert_close(quantised().detach(), q * s + m, tolerance=1e-5 * max(1, scale))
    (quantised() * cotangent).sum().backward()
    of_standard = cotangent * s
    of_s = (cotangent * q).sum() - (of_standard * standard).sum() / (s + EPS)
    of_m = cotangent.sum() - of_standard.sum() / (s + EPS)
    expected = of_standard / (s + EPS) + of_m / w.numel() + of_s * (w - m) / (s * (w.numel() - 1))
    assert_close(quantised.weight.grad, expected, tolerance=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    bits=BITS,
    shape=st.tuples(st.integers(1, 9), st.integers(2, 9)),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 50.0]),
    shift=st.sampled_from([0.0, 0.3, -100.0]),
)
def test_restored_matrix_is_the_same_bit_for_bit_and_packs_to_the_same(bits, shape, scale, shift):
    quantised = Quantised(scale * (normal(*shape) + shift), bits)
    fresh = Quantised(normal(*shape, seed=1), bits)
    fresh.restore(**quantised.stored())
    assert torch.equal(fresh(), quantised())
    again = fresh.stored()
    assert all(torch.equal(again[k], v) for k, v in quantised.stored().items())


def test_constant_matrix_is_kept_and_has_a_gradient():
    quantised, fresh = Quantised(torch.full((4, 4), 0.5), 1), Quantised(normal(4, 4), 1)
    fresh.restore(**quantised.stored())
    for matrix in (quantised, fresh):
        assert torch.equal(matrix(), torch.full((4, 4), 0.5))
        matrix().sum().backward()
        assert matrix.weight.grad.isfinite().all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_restored_matrix_follows_its_latent(bits):
    """A shift of all latents shifts Q, a factor is one on s; counted anew, s of +-0.67 s would be 0.67 s."""
    quantised, fresh = Quantised(normal(16, 8), bits), Quantised(normal(16, 8, seed=1), bits)
    fresh.restore(**quantised.stored())
    fresh.weight.data += 0.25
    assert_close(fresh().detach(), quantised().detach() + 0.25)
    fresh.weight.data *= 1.5
    assert_close(fresh.statistics()[1].detach(), 1.5 * quantised.statistics()[1].detach())


# ---- files and checkpoints -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("make", [BiLoRA, BiAdaptFormer])
def test_file_holds_the_bits_and_two_numbers_per_matrix(make, bits, tmp_path):
    adapted = adapt(make(3, bits))
    noise(adapted.adapters)
    latents = [p.numel() for p in adapted.adapters.parameters()]
    tensors = adapter_tensors(adapted, "a").values()
    assert sum(t.numel() * t.element_size() for t in tensors) == sum(-(-n * bits // 8) + 8 for n in latents)

    adapted.save(tmp_path / "a.safetensors")
    fresh = Adapted(copy.deepcopy(BACKBONE)).eval()
    assert fresh.load(tmp_path / "a.safetensors").probe_error == 0
    assert torch.equal(output(fresh), output(adapted))
    fresh.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_resume_is_exact_also_of_a_run_that_began_from_a_file(name, loaded, tmp_path):
    run = Run(METHODS[name](), total=5).go()
    run.model.adapted.save(tmp_path / "a.safetensors")

    def begin():
        other = Run(METHODS[name](), total=8)
        if loaded:
            other.model.adapted.load(tmp_path / "a.safetensors")
        return other

    expected = begin().go().model.state_dict()
    parts = begin().go(3).resumed(METHODS[name]()).go().model.state_dict()
    assert not [k for k, v in parts.items() if not torch.equal(v, expected[k])]
    start = begin().model.state_dict()
    assert any(not torch.equal(v, start[k]) for k, v in expected.items() if "adapters" in k)


def test_training_goes_on_from_a_file_without_a_jump(tmp_path):
    adapted = adapt(BiLoRA(4, targets=TARGETS))
    noise(adapted.adapters)
    adapted.save(tmp_path / "a.safetensors")
    fresh = Adapted(copy.deepcopy(BACKBONE)).eval()
    fresh.load(tmp_path / "a.safetensors")
    before = output(fresh)
    noise(fresh.adapters, std=1e-6)
    assert_close(output(fresh), before, tolerance=1e-3)


# ---- the methods -----------------------------------------------------------------------------------------------------
def test_published_sizes_on_a_vit_b():
    with torch.device("meta"):
        backbone = TimmViT("vit_base_patch16_224")
    for adapter, count in ((BiAdaptFormer(), 589_824), (BiLoRA(), 1_179_648)):
        adapter.build(backbone)
        assert sum(p.numel() for p in adapter.parameters()) == count


def test_bi_lora_merges_its_quantised_factors():
    adapted = adapt(BiLoRA(3, bits=2, scale=0.7, targets=["fc2"]))
    noise(adapted.adapters)
    fc2 = adapted.backbone.body.blocks[0].mlp.fc2
    piece, before = first(adapted.adapters["a"]), fc2.weight.clone()
    assert len(piece.down().unique()) == len(piece.up().unique()) == 4
    adapted.merge()
    assert_close(fc2.weight.detach(), before + 0.7 * (piece.up() @ piece.down()).detach())


def test_bi_lora_drops_between_its_factors():
    piece = first(adapt(BiLoRA(2, dropout=0.5, scale=2.0, targets=["fc2"])).adapters["a"]).train()
    assert piece.by_forward() and not piece.eval().by_forward()
    x = normal(5, piece.site.dim_in)
    torch.manual_seed(1)
    y = piece.train()(x)
    torch.manual_seed(1)
    hidden = F.dropout(x @ piece.down().T, 0.5, training=True)
    assert (hidden == 0).any() and (hidden != 0).any()
    assert_close(y, 2 * hidden @ piece.up().T)


def test_bi_adaptformer_is_its_equation_on_the_stream_before_the_norm():
    adapted = adapt(BiAdaptFormer(4, bits=4, scale=0.5))
    noise(adapted.adapters)
    piece = first(adapted.adapters["a"])
    x, y = normal(2, 5, 48), normal(2, 5, 48, seed=1)
    expected = y + 0.5 * nn.functional.relu(x @ piece.down().T) @ piece.up().T
    assert_close(piece(x, y, None), expected)
    assert piece.site.source == "blocks.0.norm2" and piece.position == "parallel"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BiLoRA(bits=3), "BiLoRA: bits is 1, 2, 4 or 8, got 3"),
        (lambda: BiLoRA(bits=32), "BiLoRA: bits is 1, 2, 4 or 8, got 32"),
        (lambda: BiAdaptFormer(bits=0), "BiAdaptFormer: bits is 1, 2, 4 or 8, got 0"),
        (lambda: BiAdaptFormer(width=0), "width must be a whole number"),
        (lambda: BiLoRA(dropout=1.0), "dropout must be in"),
        (lambda: adapt(BiLoRA(rank=49)), "BiLoRA: rank 49 exceeds the site trunk_00_q of 48 x 48"),
        (lambda: adapt(BiLoRA(targets=["patch"])), "cannot sit at patch"),
        (lambda: adapt(BiAdaptFormer(targets=["fc1"])), "cannot sit at fc1"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
