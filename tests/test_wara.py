"""Updates in the domain of a wavelet transform: WaRA."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from small import compiles, linear_site, on_vit_b, vit

from visadapt.adapters.wara import WAVELETS, WaRA, WaRASite, WaRATokens
from visadapt.core.adapted import Adapted
from visadapt.core.context import Context
from visadapt.core.decompose import svd
from visadapt.core.io import read_manifest
from visadapt.core.sites import Site
from visadapt.errors import InputError
from visadapt.testing import assert_close, difference, noise, tiny_backbone

FUSED, ALL = ("qkv",), ("qkv", "proj", "fc1", "fc2")
FAMILIES = st.sampled_from(sorted(WAVELETS))
SIDES = st.integers(2, 23)


# ---- WaRA: filters ---------------------------------------------------------------------------------------------------
def analysis(n, wavelet):
    """The matrix (n, n) of one level, entry by entry: n / 2 rows of the low-pass, then of the high-pass filter."""
    h = WAVELETS[wavelet]
    g = [(-1) ** t * h[len(h) - 1 - t] for t in range(len(h))]
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for k in range(n // 2):
        for t in range(len(h)):
            matrix[k, (2 * k + t) % n] += h[t]
            matrix[n // 2 + k, (2 * k + t) % n] += g[t]
    return matrix


def symmetric(x, dim):
    """Extended to an even length by its last entry."""
    return torch.cat([x, x.narrow(dim, -1, 1)], dim) if x.shape[dim] % 2 else x


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_filters_are_those_of_daubechies(wavelet):
    """Orthonormal to their even shifts, and with as many vanishing moments as half their length allows."""
    h = torch.tensor(WAVELETS[wavelet], dtype=torch.float64)
    p = len(h) // 2
    assert p == (1 if wavelet == "haar" else int(wavelet[2:]))
    for shift in range(p):
        assert (h[2 * shift :] @ h[: len(h) - 2 * shift]).item() == pytest.approx(float(shift == 0), abs=1e-14)
    t = torch.arange(2 * p, dtype=torch.float64)
    for k in range(p):
        assert ((-1) ** t * t**k * h).sum().item() == pytest.approx(0, abs=1e-11)
    assert h[:p].square().sum() >= h[p:].square().sum()  # of the two mirror images the minimum-phase one


# ---- WaRA v1: the weight ---------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(o=SIDES, i=SIDES, tokens=st.integers(1, 4), wavelet=FAMILIES)
def test_v1_is_the_adapter_between_explicit_2d_transforms(o, i, tokens, wavelet):
    """Features x tokens through the 2-D transform, B A in all four sub-bands, and back."""
    piece = WaRASite(linear_site(o, i), 1, 0.7, wavelet).double()
    noise(piece, 1.0)
    x = torch.randn(i, 2 * tokens, dtype=torch.float64)
    n, w_out, w_tokens = i + i % 2, analysis(o + o % 2, wavelet), analysis(2 * tokens, wavelet)
    coefficients = analysis(n, wavelet) @ symmetric(x, 0) @ w_tokens.T
    adapted = [
        torch.cat([piece.b @ (piece.a @ band) for band in half.chunk(2, 1)], 1) for half in coefficients.chunk(2, 0)
    ]  # LL and LH, then HL and HH
    expected = 0.7 * (w_out.T @ torch.cat(adapted) @ w_tokens)[:o]
    assert_close(piece(x.T), expected.T)
    assert_close(piece.delta() @ x, expected)


def test_v1_has_twice_the_rank_and_factors_of_that_size():
    piece = WaRASite(linear_site(20, 14), 2, 1.0, "db3")
    noise(piece, 1.0)
    a, b, _ = piece.factors()
    assert a.shape == (4, 14) and b.shape == (20, 4)
    assert torch.linalg.matrix_rank(piece.delta()) == 4


def test_v1_differs_between_wavelets():
    deltas = []
    for wavelet in ("haar", "db2", "db3", "db4"):
        piece = vit(WaRA(2, wavelet=wavelet, targets=["q"])).pieces("a")[0]
        deltas.append(piece.delta() / piece.delta().norm())
    assert min(difference(a, b) for n, a in enumerate(deltas) for b in deltas[:n]) > 1e-2


@pytest.mark.parametrize(("targets", "count"), [(FUSED, 147_456), (ALL, 589_824)])
def test_v1_parameters_on_a_vit_b(targets, count):
    adapter = on_vit_b(WaRA(8, targets=targets))
    assert sum(p.numel() for p in adapter.parameters()) == count


# ---- WaRA v2: the token grid -----------------------------------------------------------------------------------------
def tokens_piece(rank=3, wavelet="haar", width=10):
    piece = WaRATokens(Site("layer", "mlp", 0, width, width), rank, 0.7, wavelet).double()
    noise(piece, 1.0)
    return piece


def change(piece, x, grid, prefix=0, prompts=0):
    ctx = Context()
    ctx.begin(None, grid, prefix)
    ctx.prompts["p"] = prompts
    return piece(x, torch.zeros_like(x), ctx)


@settings(max_examples=40, deadline=None)
@given(h=st.integers(1, 6), w=st.integers(1, 6), wavelet=FAMILIES, prefix=st.integers(0, 2), prompts=st.integers(0, 2))
def test_v2_is_the_adapter_between_explicit_2d_transforms_of_all_channels(h, w, wavelet, prefix, prompts):
    piece, lead = tokens_piece(wavelet=wavelet), prefix + prompts
    x = torch.randn(2, lead + h * w, 10, dtype=torch.float64)
    grid = symmetric(symmetric(x[:, lead:].mT.unflatten(2, (h, w)), 2), 3)  # (B, D, h, w)
    rows, columns = (analysis(n, wavelet) for n in grid.shape[2:])
    bands = rows @ grid @ columns.T
    adapted = [
        [
            torch.einsum(
                "dr,brhw->bdhw", piece.b, F.gelu(gain[:, None, None] * torch.einsum("rd,bdhw->brhw", piece.a, c))
            )
            for gain, c in zip(gains, half.chunk(2, 3))
        ]
        for gains, half in zip(piece.gain.transpose(0, 1), bands.chunk(2, 2))
    ]
    back = rows.T @ torch.cat([torch.cat(half, 3) for half in adapted], 2) @ columns
    found = change(piece, x, (h, w), prefix, prompts)
    assert_close(found[:, lead:], 0.7 * back[:, :, :h, :w].flatten(2).mT)
    assert not found[:, :lead].any()


def best_linear_residual(inputs, outputs):
    """What no map of the channels, with a bias, can explain of the outputs: share of their norm."""
    ones = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
    fitted = ones @ torch.linalg.lstsq(ones, outputs).solution
    return ((outputs - fitted).norm() / (outputs - outputs.mean(0)).norm()).item()


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_v2_is_no_channel_adapter(wavelet, monkeypatch):
    """No LoRA reproduces it, nor does any function of single tokens; without the non-linearity and gains one does."""
    piece = tokens_piece(wavelet=wavelet)
    x = torch.randn(64, 16, 10, dtype=torch.float64)
    found = change(piece, x, (4, 4)).detach()
    assert best_linear_residual(x.flatten(0, 1), found.flatten(0, 1)) > 0.3

    other = x.clone()
    other[:, 0] += 1
    moved = (change(piece, other, (4, 4)) - found).abs().amax((0, 2))
    assert moved[1] > 1e-3 and moved[4] > 1e-3  # neighbours on the grid

    monkeypatch.setattr(F, "gelu", lambda t: t)
    linear = change(piece, x, (4, 4)).detach()
    assert best_linear_residual(x.flatten(0, 1), linear.flatten(0, 1)) > 1e-2  # unequal gains mix tokens
    piece.gain.data.fill_(1.3)
    assert_close(change(piece, x, (4, 4)), 0.7 * 1.3 * x @ piece.a.T @ piece.b.T)


def test_v2_leaves_class_and_register_tokens_alone_in_a_network():
    adapted = Adapted(tiny_backbone(TINY["dinov2"])).eval()
    noise(adapted.add("a", WaRA(2, version="v2", targets=["mlp"], layers=[-1])))
    prefix, block, seen = adapted.backbone.prefix, adapted.backbone.body.blocks[-1], []
    block.register_forward_hook(lambda m, args, y: seen.append(y))
    x = torch.randn(1, 3, 42, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapted(x)
        with adapted.disabled():
            adapted(x)
    assert prefix == 5 and torch.equal(seen[0][:, :prefix], seen[1][:, :prefix])
    assert difference(seen[0][:, prefix:], seen[1][:, prefix:]) > 1e-3


def test_v2_parameters_on_a_vit_b():
    adapter = on_vit_b(WaRA(8, version="v2"))
    assert sum(p.numel() for p in adapter.parameters()) == 24 * (2 * 768 * 8 + 4 * 8)


# ---- WaRA tiny: the singular basis -----------------------------------------------------------------------------------
def test_tiny_is_a_matrix_between_singular_vectors_and_stores_nothing_else(tmp_path):
    adapted = vit(WaRA(3, 6, version="tiny", targets=["q", "fc1"]))
    piece = adapted.pieces("a")[0]
    u, _, vt = svd(adapted.backbone.body.blocks[0].attn.qkv.weight[:48])
    assert_close(piece.delta(), 2.0 * u[:, :3] @ piece.c @ vt[:3])
    assert [n for n, _ in piece.named_parameters()] == ["c"]
    adapted.save(tmp_path / "a.safetensors", "a")
    names = set(read_manifest(tmp_path / "a.safetensors")["tensors"])
    assert {k.rsplit("/", 1)[1] for k in names} - {"output"} == {"c"}


# ---- WaRA: versions --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("version", "kinds", "mergeable", "targets"),
    [
        ("v1", ("delta",), True, ("q", "v")),
        ("v2", ("tokens",), False, ("attn", "mlp")),
        ("tiny", ("delta",), True, ("q", "v")),
    ],
)
def test_flags_and_targets_follow_the_version(version, kinds, mergeable, targets):
    adapter = WaRA(version=version)
    assert (adapter.kinds, adapter.mergeable, adapter.targets) == (kinds, mergeable, targets)
    again = WaRA(**adapter.arguments())
    assert again.arguments() == adapter.arguments()


@pytest.mark.compile
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_wara_compiles_as_one_graph(version):
    adapted = vit(WaRA(2, version=version, wavelet="db2"))
    compiles(adapted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WaRA(wavelet="db5"), r"no wavelet 'db5' \(did you mean"),
        (lambda: WaRA(wavelet="har"), r"did you mean 'haar'\?"),
        (lambda: WaRA(wavelet="bior2.2"), "it is one of: db1, db2, db3, db4, haar"),
        (lambda: WaRA(version="v3"), "no version 'v3'; it is one of: tiny, v1, v2"),
        (lambda: WaRA(version="tiny", wavelet="db2"), "'tiny' has no transform"),
        (lambda: WaRA(0), "rank must be"),
        (lambda: vit(WaRA(25)), "rank 25 exceeds the sub-bands of trunk_00_q, 24 and 24 channels"),
        (lambda: vit(WaRA(49, version="v2")), "rank 49 exceeds the site trunk_00_attn"),
        (lambda: vit(WaRA(49, version="tiny")), "rank 49 exceeds the site trunk_00_q"),
        (lambda: vit(WaRA(targets=["patch"])), "cannot sit at patch"),
        (lambda: vit(WaRA(version="v2", targets=["q"])), "cannot sit at q; it takes the roles attn, mlp"),
    ],
)
def test_wrong_wara_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
