"""Updates of few entries and from random bases: the mathematics, the masks, exchange in place."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cases import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from small import compiles
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from visadapt.adapters.lora import LoRA
from visadapt.adapters.paca import PaCA, PaCASite
from visadapt.adapters.randlora import RandLoRA
from visadapt.adapters.shira import SHiRA, SHiRASite, largest, structured
from visadapt.adapters.snell import SNELL
from visadapt.adapters.snella import SNELLA
from visadapt.benchmark.flops import flops
from visadapt.benchmark.parameters import trainable
from visadapt.core import sparse
from visadapt.core.adapted import Adapted
from visadapt.core.context import Context
from visadapt.core.inject import WeightForward
from visadapt.core.io import read_manifest, read_tensors
from visadapt.core.sites import Site
from visadapt.errors import InputError
from visadapt.testing import assert_close, noise, tiny_backbone

many = settings(max_examples=40, deadline=None, derandomize=True)
X = torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(1))


def vit(**adapters):
    """A tiny ViT with adapters away from their starts, the first one enabled."""
    adapted = Adapted(tiny_backbone(TINY["vit"])).eval()
    for seed, (name, adapter) in enumerate(adapters.items()):
        torch.manual_seed(seed)
        noise(adapted.add(name, adapter, enable=seed == 0), seed=seed)
    return adapted


def run(adapted):
    with torch.no_grad():
        return adapted(X).tokens


def linear(pieces, o, i, bias=True):
    """A frozen linear that carries these pieces."""
    module = nn.Linear(i, o, bias).requires_grad_(False)
    module.forward = WeightForward(module, Context())
    for piece in pieces:
        piece.on = True
    module.forward.pieces = pieces
    return module


def site(o, i, rows=None):
    return Site("fc", "fc1", 0, i, o, rows)


# ---- numbers of trained values ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: SHiRA(8, "random", targets=["qkv", "proj", "fc1", "fc2"]), 1_179_648),
        (lambda: SHiRA(8, "structured", targets=["qkv"]), 294_912),
        (lambda: PaCA(16, targets=["qkv"]), 442_368),
        (lambda: PaCA(16, targets=["qkv", "proj", "fc1", "fc2"]), 1_327_104),
        (lambda: RandLoRA(6, targets=["qkv"]), 1_198_152),
        (lambda: RandLoRA(6, targets=["qkv", "proj", "fc1", "fc2"]), 4_792_608),
        (lambda: SNELL(8), 1_327_104),
        (lambda: SNELL(32), 5_308_416),
        (lambda: SNELLA(32), 5_308_416 + 3 * 72),
    ],
)
def test_values_on_a_vit_b(make, expected, vit_b_block):
    assert 12 * trainable(vit_b_block, make()) == expected


# ---- sparse linears --------------------------------------------------------------------------------------------------
def entries(o, i, rows, share, seed):
    """A piece with random places and values, on some rows."""
    generator = torch.Generator().manual_seed(seed)
    height = o if rows is None else rows[1] - rows[0]
    k = max(1, int(share * height * i))
    index = torch.randperm(height * i, generator=generator)[:k].sort().values
    piece = SHiRASite(site(height, i, rows), (height, i), index, False)
    noise(piece, 1.0, seed)
    return piece


def columns(o, i, rows, share, seed):
    height = o if rows is None else rows[1] - rows[0]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(i, generator=generator)[: max(1, int(share * i))].sort().values
    piece = PaCASite(site(height, i, rows), torch.randn(height, i, generator=generator), chosen)
    noise(piece, 1.0, seed)
    return piece


@many
@given(
    sizes=st.tuples(st.integers(2, 7), st.integers(1, 8)),
    sort=st.sampled_from(["entries", "columns", "both"]),
    slices=st.lists(st.tuples(st.floats(0, 1), st.floats(0.05, 1)), max_size=2),
    share=st.sampled_from([0.03, 0.3, 1.0]),
    densest=st.sampled_from([0, 1]),
    shape=st.sampled_from([(3,), (2, 3), (2, 2, 2)]),
    scale=st.sampled_from([1.0, -0.5]),
)
def test_sparse_linear_is_the_dense_formula(sizes, sort, slices, share, densest, shape, scale):
    """Output and gradients of values and input, for whole weights and slices that may overlap."""
    o, i = sizes
    rows = [None, *((a := int(begin * (o - 1)), min(o, a + 1 + int(part * o))) for begin, part in slices)]
    makers = {"entries": [entries], "columns": [columns], "both": [entries, columns]}[sort]
    pieces = [makers[n % len(makers)](o, i, r, share, n) for n, r in enumerate(rows)]
    for piece in pieces:
        piece.scale = scale
    torch.manual_seed(0)
    module, x = linear(pieces, o, i), torch.randn(*shape, i, requires_grad=True)
    before, sparse.DENSEST = sparse.DENSEST, densest
    try:
        y = module(x)
        cotangent = torch.randn_like(y)
        found = torch.autograd.grad((y * cotangent).sum(), [x, *(p for q in pieces for p in q.parameters())])
    finally:
        sparse.DENSEST = before
    weight = module.weight.clone()
    for piece in pieces:
        start, stop = piece.site.rows or (0, o)
        weight[start:stop] += scale * piece.delta()
    expected_y = F.linear(x, weight, module.bias)
    wanted = [x, *(p for q in pieces for p in q.parameters())]
    expected = torch.autograd.grad((expected_y * cotangent).sum(), wanted)
    assert_close(y, expected_y)
    for one, other in zip(found, expected):
        assert_close(one, other, "gradient")
    with torch.no_grad():
        assert_close(module(x), expected_y)


def kept_by(module, x):
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = module(x)
    return y, kept


def test_training_keeps_chosen_columns_of_the_input_and_forms_no_dense_gradient():
    """Backward products: gradient of the input, 2 N o i operations, and that of the columns, 2 N o r, or none."""
    n, o, i, r = 50, 30, 40, 3
    for piece, kept_width, extra in ((columns(o, i, None, r / i, 0), r, r), (entries(o, i, None, 0.05, 0), i, 0)):
        module, x = linear([piece], o, i), torch.randn(n, i, requires_grad=True)
        y, kept = kept_by(module, x)
        of_input = [t for t in kept if n in t.shape]
        assert [tuple(t.shape) for t in of_input] == [(n, kept_width)]
        of_weight = [t for t in kept if t.shape == (o, i)]
        assert of_weight and all(t.data_ptr() == module.weight.data_ptr() for t in of_weight)
        assert flops(y.sum().backward) == 2 * n * o * (i + extra)


def test_a_sparse_piece_and_a_low_rank_one_on_the_same_rows_add_up():
    adapted = vit(s=SHiRA(2, targets=["q", "fc1"]), p=PaCA(4, targets=["q", "fc1"]), l=LoRA(2, targets=["q", "fc1"]))
    body = adapted.backbone.body
    for names in (["s", "l"], ["p", "l"], ["s", "p"], ["s", "p", "l"]):
        adapted.enable(*names)
        weight = body.blocks[0].mlp.fc1.weight
        total = weight + sum(adapted.adapters[n].pieces["trunk_00_fc1"].delta() for n in names)
        x = torch.randn(5, weight.shape[1])
        assert_close(body.blocks[0].mlp.fc1(x), F.linear(x, total, body.blocks[0].mlp.fc1.bias))


# ---- SHiRA: masks ----------------------------------------------------------------------------------------------------
def chosen(piece):
    mask = torch.zeros(math.prod(piece.shape), dtype=torch.bool)
    mask[piece.index] = True
    assert mask.sum() == len(piece.index) and (piece.index.diff() > 0).all()
    return mask.view(piece.shape)


def test_random_places_are_those_of_peft_with_one_seed_and_differ_between_sites_otherwise():
    masks = pytest.importorskip("peft.tuners.shira.mask_functions")
    same = vit(a=SHiRA(3, "random", seed=5, same_seed=True, targets=["q", "v", "fc2"])).adapters["a"].pieces
    for key, piece in same.items():
        o, i = piece.shape
        layer = nn.Linear(i, o)
        official = masks.random_mask(layer, 3, random_seed=5)
        assert torch.equal(chosen(piece), official.bool()), key
    own = vit(a=SHiRA(3, "random", seed=5, targets=["q", "v"])).adapters["a"].pieces
    sets = {tuple(p.index.tolist()) for p in own.values()}
    assert len(sets) == len(own) == 4
    again = vit(a=SHiRA(3, "random", seed=5, targets=["q", "v"])).adapters["a"].pieces
    assert all(torch.equal(p.index, again[k].index) for k, p in own.items())
    other = vit(a=SHiRA(3, "random", seed=6, targets=["q", "v"])).adapters["a"].pieces
    assert not any(torch.equal(p.index, other[k].index) for k, p in own.items())


def test_magnitude_takes_the_largest_weights():
    adapted = vit(a=SHiRA(2, targets=["k", "patch"]))
    for piece in adapted.pieces("a"):
        module = adapted.backbone.body.get_submodule(piece.site.path)
        weight = module.weight[slice(*(piece.site.rows or (None,)))].flatten(1).abs()
        mask = chosen(piece)
        assert mask.sum() == 2 * sum(weight.shape) and weight[mask].min() > weight[~mask].max()


def test_equal_scores_are_taken_in_order_on_every_machine():
    score = torch.tensor([[1.0, 3.0, 1.0], [1.0, 2.0, 1.0]])
    assert largest(score, 4).tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize("mask", ["snip", "gradient"])
def test_places_come_from_gradients_and_are_in_the_file(mask, tmp_path):
    adapted = vit()
    adapted.add("a", SHiRA(2, mask, calibration_batches=2, targets=["q", "fc2"]))
    batches = [lambda s=s: adapted(X * s).tokens.square().sum() for s in (1.0, -2.0, 50.0)]  # the third is not used
    for act in (lambda: adapted.train()(X), lambda: adapted.eval().merge("a")):
        with pytest.raises(InputError, match="'a' takes its start from data and has none yet"):
            act()
    adapted.calibrate("a", batches)
    adapted.train()(X)
    adapted.eval()
    body, score = adapted.backbone.body, {}
    for path in ("blocks.0.attn.qkv", "blocks.1.mlp.fc2"):
        weight = body.get_submodule(path).weight.requires_grad_(True)
        score[path] = sum(torch.autograd.grad(b(), weight)[0].abs() for b in batches[:2])
        score[path] = (score[path] * (weight.abs() if mask == "snip" else 1)).detach()
        weight.requires_grad_(False)
    pieces = adapted.adapters["a"].pieces
    for key, wanted in {"00_q": score["blocks.0.attn.qkv"][:48], "01_fc2": score["blocks.1.mlp.fc2"]}.items():
        found = chosen(pieces[f"trunk_{key}"])
        assert wanted[found].min() > wanted[~found].max()
    noise(adapted.adapters["a"])
    path = tmp_path / "a.safetensors"
    adapted.save(path, "a")
    stored = read_tensors(path, read_manifest(path))
    assert stored["adapters/a/trunk_00_q/index"].dtype == torch.int32
    fresh = vit()
    fresh.load(path)
    assert torch.equal(run(fresh), run(adapted))


def test_places_without_data_are_not_stored():
    for mask in ("random", "magnitude", "structured"):
        piece = vit(a=SHiRA(2, mask)).pieces("a")[0]
        assert list(piece.stored()) == ["values"]


@pytest.mark.parametrize(("o", "i", "rank"), [(48, 48, 4), (192, 48, 3), (48, 192, 3), (6, 6, 2), (5, 9, 3)])
def test_structured_places_are_a_diagonal_and_whole_lines(o, i, rank):
    k = rank * (o + i)
    mask = torch.zeros(o * i, dtype=torch.bool)
    mask[structured(o, i, k)] = True
    mask = mask.view(o, i)
    assert mask.sum() == k and mask.diagonal().all()
    rows, cols = mask.all(1).nonzero()[:, 0], mask.all(0).nonzero()[:, 0]
    assert len(rows) >= rank - 1 and len(cols) >= rank - 1
    if min(o, i) == 48:  # evenly spaced, and of high rank
        assert rows.diff().max() <= 1.5 * o / len(rows) and cols.diff().max() <= 1.5 * i / len(cols)
        values = torch.randn(o, i, generator=torch.Generator().manual_seed(0)) * mask
        assert torch.linalg.matrix_rank(values) == min(o, i) > 2 * rank


# ---- PaCA ------------------------------------------------------------------------------------------------------------
def test_partial_training_is_training_of_these_columns_of_the_weight():
    """AdamW with weight decay on the piece against the same on a weight whose other columns have no part."""
    adapted = vit()
    before = adapted.backbone.body.blocks[1].mlp.fc1.weight.clone()
    (piece,) = adapted.add("a", PaCA(5, targets=["fc1"], layers=[1])).pieces.values()
    adapted.set_trainable("a")
    fc = adapted.backbone.body.blocks[1].mlp.fc1
    assert piece.columns.unique().numel() == 5 and torch.equal(piece.part.data, before[:, piece.columns])
    expected = nn.Parameter(before[:, piece.columns].clone())
    ours, theirs = (torch.optim.AdamW([p], lr=1e-2, weight_decay=0.3) for p in (piece.part, expected))
    for step in range(3):
        x = torch.randn(2, 4, 48, generator=torch.Generator().manual_seed(step))
        fc(x).square().sum().backward()
        whole = before.index_copy(1, piece.columns, expected)
        F.linear(x, whole, fc.bias).square().sum().backward()
        assert_close(piece.part.grad, expected.grad, "gradient", 1e-4)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        assert_close(fc(x), F.linear(x, before.index_copy(1, piece.columns, expected), fc.bias))  # never a step behind
    adapted.merge()
    left = torch.ones(48, dtype=torch.bool)
    left[piece.columns] = False
    assert torch.equal(fc.weight[:, left], before[:, left])
    assert_close(fc.weight[:, piece.columns], expected.detach())


def test_columns_of_a_convolution_are_channels_with_all_their_taps():
    piece = vit(a=PaCA(2, targets=["patch"])).pieces("a")[0]
    channels = (piece.columns // 14**2).unique()
    assert len(channels) == 2 and len(piece.columns) == 2 * 14**2
    wanted = [c * 14**2 + t for c in channels.tolist() for t in range(14**2)]
    assert piece.columns.tolist() == wanted


def test_columns_differ_between_sites_and_seeds():
    sets = [
        {tuple(p.columns.tolist()) for p in vit(a=PaCA(4, seed, targets=["q", "v"])).pieces("a")} for seed in (0, 0, 1)
    ]
    assert len(sets[0]) == 4 and sets[0] == sets[1] and not sets[0] & sets[2]


# ---- RandLoRA --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("role", ["q", "fc1", "fc2"])
def test_random_bases_sum_up_to_the_formula(role):
    """Sum over p of column p of all B and row p of all A, the pairing of the official code."""
    adapted = vit(a=RandLoRA(5, alpha=2.0, targets=["q", "fc1", "fc2"]))
    piece = adapted.adapters["a"].pieces[f"trunk_01_{role}"]
    long, n, r = max(piece.site.dim_in, piece.site.dim_out), 48 // 5 + 1, 5
    b, a = piece.bases.b.double(), piece.bases.a.double()
    total = torch.zeros(long, 48, dtype=torch.float64)
    for p in range(n * r):
        (b_n, b_j), (a_j, a_n) = divmod(p, r), divmod(p, n)
        row = piece.lambda_[a_n, a_j].double() * a[a_j, :48] * piece.gamma[a_n].double()
        total += torch.outer(b[:long, b_n, b_j], row)
    total *= 2.0 / 5
    delta = piece.delta().detach()
    assert_close(delta, (total.T if role == "fc2" else total).float(), tolerance=1e-4)
    assert torch.linalg.matrix_rank(delta) == 48


def test_bases_are_shared_drawn_from_the_seed_and_not_stored():
    adapted = vit(a=RandLoRA(4, seed=3), b=RandLoRA(4, seed=4))
    bases = adapted.adapters["a"].common["bases"]
    assert all(p.bases is bases for p in adapted.pieces("a"))
    assert bases.a.std().item() == pytest.approx(1) and bases.b.std().item() == pytest.approx(1)
    assert not torch.equal(bases.b, adapted.adapters["b"].common["bases"].b)
    assert set(adapted.adapters["a"].state_dict()) == {k for k, _ in adapted.adapters["a"].named_parameters()}


def test_few_bases_go_through_the_factors():
    piece = vit(a=RandLoRA(2, bases=3)).pieces("a")[0]
    a, b, _ = piece.factors()
    assert a.shape == (6, 48) and b.shape == (48, 6) and len(piece.gamma) == 3


# ---- all of them -----------------------------------------------------------------------------------------------------
MAKES = {
    "SHiRA": lambda: SHiRA(2),
    "PaCA": lambda: PaCA(3),
    "RandLoRA": lambda: RandLoRA(5),
    "SNELL": lambda: SNELL(4),
    "SNELLA": lambda: SNELLA(4, dropout=0.1, drop_path=0.1),
}


@pytest.mark.compile
@pytest.mark.parametrize("name", MAKES)
def test_compiles_as_one_graph(name):
    adapted = vit(a=MAKES[name]())
    adapted.set_trainable("a")
    compiles(adapted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SHiRA(mask="magnitud"), "SHiRA: unknown mask 'magnitud'.*magnitude"),
        (lambda: SHiRA(rank=0), "SHiRA: rank must be a whole number"),
        (lambda: SHiRA(25, targets=["q"]), "rank 25 asks for 2400 entries of the site trunk_00_q, .* at most 24"),
        (lambda: PaCA(49, targets=["q"]), "PaCA: rank 49 exceeds the 48 inputs of the site trunk_00_q"),
        (lambda: PaCA(targets=["norm1"]), "PaCA on TimmViT: it cannot sit at norm1"),
        (lambda: RandLoRA(49), "RandLoRA: rank 49 exceeds the site trunk_00_q of 48 x 48"),
        (lambda: RandLoRA(bases=0), "RandLoRA: bases must be a whole number"),
        (lambda: RandLoRA(targets=["patch"]), "RandLoRA on TimmViT: it cannot sit at patch"),
        (lambda: SNELL(3), "SNELL: rank must be even"),
        (lambda: SNELL(50), "SNELL: rank 50 exceeds the site"),
        (lambda: SNELL(variant="offical"), "SNELL: unknown variant 'offical'.*official"),
        (lambda: SNELL(sparsity=1.0), r"SNELL: sparsity must be in \[0, 1\)"),
        (lambda: SNELLA(5), "SNELLA: rank must be even"),
        (lambda: SNELLA(start=-0.1), r"SNELLA: start must be in \[0, 1\)"),
        (lambda: SNELLA(final_warmup=-1), "SNELLA: warm-ups must not be negative"),
        (lambda: SNELLA(interval=0), "SNELLA: interval must be a whole number"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(InputError, match=message):
        vit(a=make())
