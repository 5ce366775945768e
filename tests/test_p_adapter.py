"""p-Laplacian messages on the graph of an attention."""

from __future__ import annotations

import math

import pytest
import torch
from cases import TINY
from parity.p_adapter import Attention, Layer
from small import Ops, compiles, vit
from torch.utils._python_dispatch import TorchDispatchMode

from visadapt.adapters._common import laplacian
from visadapt.adapters._common.laplacian import LaplacianSums
from visadapt.adapters.lora import LoRA
from visadapt.adapters.p_adapter import LaplacianAttention, PAdapter, attention_scores
from visadapt.core.adapted import Adapted
from visadapt.core.inject import Output
from visadapt.core.products import ONEDNN
from visadapt.errors import InputError
from visadapt.testing import assert_close, difference, noise, progress, tiny_backbone

E, ROLES = 1e-8, ("attn", "xattn", "mlp")


def random(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_formula(probs, fq, fv, p, own, loops):
    """The sums with all differences; those of a node and itself are no part of the graph of gradients."""
    others = torch.ones(probs.shape[1:], dtype=probs.dtype)
    if own:
        others.diagonal(others.shape[1] - others.shape[0]).zero_()
    d = (fv[:, None] - fq[:, :, None]) * others[..., None]
    weights = probs * ((probs + E).sqrt()[..., None] * d + E).norm(dim=-1) ** (p - 2)
    weights = weights if loops else weights * others
    return torch.cat([weights @ fv, weights.sum(-1, keepdim=True)], -1)


def given(own, q=5, k=7, same=False):
    """Attention with zeros above the diagonal, features of queries and values, with some equal nodes on request."""
    fv, fq = random(6, k, 3), random(6, q, 3, seed=2)
    if same:
        fv[:, 2], fq[:, 3] = fv[:, 4], fv[:, 1]
    probs = random(6, q, k, seed=3).add(torch.full((q, k), -math.inf).triu(k - q + 1)).softmax(-1)
    return probs, fv[:, k - q :] if own else fq, fv


def gradients(run, probs, fq, fv, p, own, loops, dtype=torch.float64):
    """Of messages as they are used, so that huge weights of self loops cancel as they do there."""
    values = [x.to(dtype).requires_grad_() for x in (probs, fv, torch.tensor(p), fq)]
    probs, fv, p, fq = values
    if own:
        fq = fv[:, -fq.shape[1] :]
    sums = run(probs, fq, fv, p, own, loops)
    mixed = (sums[..., :-1] + 0.3 * fq) / (sums[..., -1:] + 0.3)
    loss = (mixed * random(*mixed.shape, seed=4).to(dtype)).sum()
    return mixed, torch.autograd.grad(loss, values[: 3 if own else 4])


def scaled(found, wanted):
    return (found - wanted).abs().max().item() / max(1.0, wanted.abs().max().item())


# ---- the sums --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("own", "loops"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("p", [1.25, 1.75, 2.5])
@pytest.mark.parametrize("same", [False, True], ids=["apart", "same"])
def test_sums_and_gradients_are_those_of_the_formula(own, loops, p, same):
    values = given(own, same=same)
    found, wanted = (gradients(run, *values, p, own, loops) for run in (LaplacianSums.apply, by_formula))
    assert_close(found[0], wanted[0])
    for one, other in zip(found[1], wanted[1], strict=True):
        assert scaled(one, other) < 1e-10


def test_self_loops_do_not_swamp_gradients_in_float32():
    values = given(own=True, q=7)
    wanted = gradients(by_formula, *values, 1.75, True, True)[1]
    found = gradients(LaplacianSums.apply, *values, 1.75, True, True, torch.float32)[1]
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        assert scaled(one.double(), other) < 2e-5


def test_near_nodes_far_from_zero_keep_their_distance():
    """Squares of 1e6 minus products of 1e6 would leave nothing of a distance of 1e-2."""
    probs, fq, fv = (x.float() for x in given(own=False))
    fq = 1000 + 0.01 * fq
    fv = 1000 + 0.01 * fv
    p = torch.tensor(1.25)
    wanted = by_formula(*(x.double() for x in (probs, fq, fv, p)), False, True)[..., -1]
    assert_close(
        LaplacianSums.apply(probs, fq, fv, p, False, True)[..., -1].double() / wanted, wanted / wanted, "", 1e-4
    )


def test_attended_values_come_with_the_sums(monkeypatch):
    monkeypatch.setitem(laplacian.BLOCK, "cpu", 4 * 5 * 7)
    _, _, fv = given(own=True)
    masked = torch.full((5, 7), torch.finfo(torch.float64).min, dtype=torch.float64).triu(3)
    scores, x = random(6, 5, 7, seed=3) + masked, random(6, 7, 4, seed=5)
    values = scores, fv, x = [v.requires_grad_() for v in (scores, fv, x)]
    p = torch.tensor(1.5, dtype=torch.float64)
    both = LaplacianSums.apply(scores, fv[:, 2:], fv, p, True, False, x)
    apart = LaplacianSums.apply(scores.softmax(-1), fv[:, 2:], fv, p, True, False), scores.softmax(-1) @ x
    given_back = [random(*y.shape, seed=6) for y in apart]
    assert all(torch.equal(one, other) for one, other in zip(both, apart))
    for one, other in zip(*(torch.autograd.grad(y, values, given_back) for y in (both, apart)), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("loops", [True, False])
def test_blocks_change_nothing(monkeypatch, loops):
    values = given(own=True)
    whole = gradients(LaplacianSums.apply, *values, 1.5, True, loops)
    monkeypatch.setitem(laplacian.BLOCK, "cpu", 4 * 5 * 7)  # 6 rows as 4 and 2, with the one thread of tests
    parts = gradients(LaplacianSums.apply, *values, 1.5, True, loops)
    for one, other in zip((parts[0], *parts[1]), (whole[0], *whole[1]), strict=True):
        assert_close(one, other)


def test_no_tensor_has_the_channels_of_all_pairs():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            for x in out if isinstance(out, list | tuple) else [out]:
                self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    probs, f = random(2, 16, 16).softmax(-1), random(2, 16, 3)
    with Largest() as largest:
        gradients(LaplacianSums.apply, probs, f, f, 1.5, True, True)
    assert largest.numel == probs.numel()


# ---- one attention ---------------------------------------------------------------------------------------------------
def layer(role, dtype=torch.float64, seed=0, **options):
    """One layer of width 32 and 4 heads with the adapter at one role, away from its start; its module and its piece."""
    torch.manual_seed(seed)
    adapted = Adapted(Layer().to(dtype)).eval()
    noise(adapted.add("a", PAdapter(**dict(reduction=4) | options, targets=[role])).to(dtype))
    (piece,) = adapted.adapters["a"].pieces.values()
    return adapted.backbone.body[role], piece


def run(module, piece, x, context=None, bias=None, last=None):
    """The attention with a bias; of the last queries only where asked for."""
    q, k, v, _ = module.project(x, context)
    q = q if last is None else q[:, :, -last:]
    return piece.run(q, k, v, bias, Output(module, x), None)


def causal(n):
    return torch.ones(n, n, dtype=torch.bool).tril()


@pytest.mark.parametrize("options", [{}, dict(mask_self_loops=True)], ids=str)
@torch.no_grad()
def test_rows_with_a_cache_are_those_of_the_whole_sequence(options):
    (module, piece), x = layer("attn", **options), random(2, 6, 32)
    whole = run(module, piece, x, bias=causal(6))
    for n in range(1, 7):
        assert_close(run(module, piece, x[:, :n], last=1), whole[:, n - 1 : n])
    assert_close(run(module, piece, x, bias=causal(6)[-2:], last=2), whole[:, -2:])


@pytest.mark.parametrize("beta", [False, True])
@torch.no_grad()
def test_cross_attention_is_the_first_rows_of_the_symmetric_graph(beta):
    (module, piece), x, context = layer("xattn", sample_len=None, beta_cross=beta), random(1, 3, 32), random(1, 5, 32)
    q, k, v, _ = module.project(x, context)
    probs, nodes = attention_scores(q, k, None).softmax(-1), module.output(torch.cat([q, v], 2), x)
    both = torch.zeros(4, 8, 8, dtype=x.dtype)
    both[:, :3, 3:], both[:, 3:, :3] = probs[0], probs[0].mT
    f = piece.inner(nodes)[0].unflatten(-1, (4, -1)).transpose(0, 1)
    sums = by_formula(both, f, f, piece.p, False, True)[:, :3]
    floor = 2 * 0.1 * (2 + piece.m.tanh()) / piece.p
    mixed = (sums[..., :-1] + beta * floor * f[:, :3]) / (sums[..., -1:] + floor)
    h = module.output(probs @ v, x)
    added = piece.up(torch.nn.functional.gelu(piece.gate(h)) * mixed.transpose(0, 1).flatten(1))
    assert_close(module(x, context), h + added)


@torch.no_grad()
def test_values_across_are_pooled_to_the_given_number():
    x, context = random(2, 3, 32), random(2, 10, 32)
    module, piece = layer("xattn", sample_len=None)
    whole = module(x, context)
    piece.length = 10
    assert torch.equal(module(x, context), whole)
    piece.length = 5
    assert difference(module(x, context), whole) > 1e-4
    twice = context[:, ::2].repeat_interleave(2, 1)  # pairs of equal values have themselves as their mean
    q, k, v, _ = module.project(x, twice)
    probs = attention_scores(q, k, None).softmax(-1)
    h = module.output(probs @ v, x)
    nodes = module.output(torch.cat([q, v[:, :, ::2]], 2), x)
    assert_close(module(x, twice), piece.mix(h, *piece.gather(piece.inner(nodes), probs[..., ::2])))


@pytest.mark.parametrize("more", ["nothing", "a hook", "another adapter", "few rows"])
def test_a_linear_behind_the_projection(more, monkeypatch):
    """One product with both weights, unless something lies between them or there are few rows."""
    (module, piece), x = layer("attn"), random(2, 2 if more == "few rows" else 6, 32)
    v = module.project(x)[2]
    if more == "a hook":
        module.dense.register_forward_hook(lambda m, args, y: 2 * y)
    if more == "another adapter":
        module.dense.forward = lambda y: y.square()
    expected, called = piece.inner(module.output(v, x)), []
    monkeypatch.setattr(
        Attention, "output", lambda self, o, x: called.append(o) or self.dense(o.transpose(1, 2).flatten(2))
    )
    assert_close(Output(module, x).then(piece.inner, v), expected)
    assert bool(called) == (more != "nothing")


@torch.no_grad()
def test_masks_take_either_form_and_hide_padding():
    (module, piece), x = layer("attn"), random(2, 6, 32)
    mask = causal(6) & (torch.arange(6) < 4)
    added = torch.zeros(6, 6, dtype=x.dtype).masked_fill(~mask, -math.inf)
    padded = run(module, piece, x, bias=mask[None, None])
    assert_close(padded, run(module, piece, x, bias=added))
    assert_close(padded[:, :4], run(module, piece, x[:, :4], bias=causal(4)))
    nothing = torch.zeros(6, 6, dtype=torch.bool)
    for bias in (nothing, torch.zeros(6, 6, dtype=x.dtype).masked_fill(~nothing, -math.inf)):
        assert run(module, piece, x, bias=bias).isfinite().all()


@torch.no_grad()
def test_attention_alone_is_left_where_nothing_is_added():
    module, piece = layer("attn")
    x = random(2, 6, 32)
    piece.up.weight.zero_(), piece.up.bias.zero_()
    with_piece, piece.on = module(x), False
    assert_close(with_piece, module(x))


def test_mlp_gets_a_bottleneck_in_parallel():
    (module, piece), x = layer("mlp"), random(2, 3, 32)
    down, up = piece.bottleneck.down, piece.bottleneck.up
    y = module.dense(torch.nn.functional.gelu(module.inner(x)))
    assert_close(module(x), y + up(down(x).relu()))


def test_messages_are_float32_under_autocast(monkeypatch):
    (module, _), seen = layer("attn", dtype=torch.float32), []
    apply = LaplacianSums.apply
    monkeypatch.setattr(LaplacianSums, "apply", lambda *a: seen.extend(x.dtype for x in a[:4]) or apply(*a))
    with torch.autocast("cpu", torch.bfloat16):
        y = module(random(2, 6, 32, dtype=torch.float32))
    assert y.dtype == torch.bfloat16
    assert seen == [torch.float32] * 4


# ---- the adapter -----------------------------------------------------------------------------------------------------
def test_counts_of_blip():
    with torch.device("meta"):
        backbone = Layer(width=768, heads=12, context_width=768, hidden=3072)
        adapter = PAdapter(targets=ROLES)
        adapter.build(backbone)
    counts = {piece.site.role: sum(p.numel() for p in piece.parameters()) for piece in adapter.pieces.values()}
    assert counts == {"attn": 222_146, "xattn": 222_146, "mlp": 148_320}
    assert 12 * sum(counts.values()) == 7_111_344


def test_start_is_that_of_bert():
    adapter = PAdapter(p=1.25, targets=ROLES)
    adapter.build(Layer(width=256))
    for name, value in adapter.pieces.named_parameters():
        if name.endswith("weight"):
            assert value.std().item() == pytest.approx(0.02, rel=0.1)
        else:
            assert torch.equal(value, torch.full_like(value, 1.25 if name.endswith(".p") else 0.0)), name
    pieces = adapter.pieces.values()
    assert [p.beta for p in pieces if isinstance(p, LaplacianAttention)] == [True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(p=0), "p must be above 0"),
        (dict(p=-1.5), "p must be above 0"),
        (dict(mu0=0.0), "mu0 must be above 0"),
        (dict(reduction=0), "reduction must be a whole number"),
        (dict(sample_len=0), "sample_len must be a whole number"),
        (dict(reduction=16), r"width 32 of attn is no multiple of reduction \* heads = 16 \* 4"),
        (dict(targets=("attn", "fc1")), "'fc1' matches no site"),
    ],
    ids=str,
)
def test_refuses(options, message):
    with pytest.raises(InputError, match=message):
        PAdapter(**options).build(Layer())


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan])
def test_a_step_that_takes_p_to_zero_is_an_error_with_its_place(value):
    adapter = PAdapter(reduction=4, targets=ROLES)
    adapter.build(Layer())
    adapter.on_update(progress(0))
    adapter.pieces["trunk_00_xattn"].p.data.fill_(value)
    with pytest.raises(InputError, match=f"p at xattn is {value:.3g} after this step"):
        adapter.on_update(progress(1))
    without = PAdapter(targets=["mlp"])
    without.build(Layer())
    without.on_update(progress(0))


class Tokens(torch.nn.Module):
    """A tensor out: what exporters take."""

    def __init__(self, adapted):
        super().__init__()
        self.adapted = adapted

    def forward(self, x):
        return self.adapted(x).tokens


@torch.no_grad()
def test_linears_around_the_graph_go_by_onednn():
    """Queries, keys and values; what is behind both projections; the projection, gate and up; twice in two blocks."""
    adapted = vit(PAdapter(reduction=4, targets=["attn"]))
    with Ops() as ops:
        adapted(torch.randn(2, 3, 28, 42))
    assert len(ops.onednn) == (ONEDNN is not None) * 2 * 5


@pytest.mark.compile
@pytest.mark.parametrize("name", ["vit", "eva02"])
@torch.no_grad()
def test_compiled_blocks_see_an_adapter_that_comes_later(name):
    torch.compiler.reset()
    adapted, x = Adapted(tiny_backbone(TINY[name])).eval(), torch.randn(2, 3, 28, 42)
    noise(adapted.add("p", PAdapter(reduction=4)))
    for block in adapted.backbone.body.blocks:
        block.compile(backend="eager")
    before = adapted(x).tokens
    noise(adapted.add("l", LoRA(rank=2, targets=["q", "v", "proj"])))
    found = adapted(x).tokens
    for block in adapted.backbone.body.blocks:
        block._compiled_call_impl = None
    assert_close(found, adapted(x).tokens, tolerance=1e-4)
    assert difference(found, before) > 1e-2


@pytest.mark.compile
def test_compiles_with_equal_gradients():
    compiles(vit(PAdapter(reduction=4)))


@pytest.mark.compile
def test_exports_with_any_number_of_images():
    adapted = vit(PAdapter(reduction=4))
    batch = {"x": {0: torch.export.Dim("batch", min=2, max=9)}}
    program = torch.export.export(Tokens(adapted), (random(2, 3, 28, 42, dtype=torch.float32),), dynamic_shapes=batch)
    x = random(5, 3, 28, 42, dtype=torch.float32)
    assert_close(program.module()(x), adapted(x).tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_in_half_precision_sums_in_float32(dtype):
    adapted = Adapted(tiny_backbone(TINY["vit"])).eval()
    adapted.add("a", PAdapter(reduction=4))
    x = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = adapted(x).tokens
        found = adapted.to(dtype)(x.to(dtype)).tokens
    assert found.dtype == dtype and difference(found.float(), expected) < 0.2
