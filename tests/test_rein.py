"""Learned tokens that refine patches, and the queries they give."""

from __future__ import annotations

import math

import pytest
import torch
from cases import TINY
from parity.rein import Idle
from small import compiles, on_vit_b, vit

from visadapt.adapters.lora import LoRA
from visadapt.adapters.rein import Rein
from visadapt.adapters.vpt import VPT
from visadapt.backbones.timm_vit import TimmViT
from visadapt.convert.rein import rein_keys
from visadapt.core.adapted import Adapted
from visadapt.core.io import read_manifest
from visadapt.core.sites import Site
from visadapt.errors import InputError
from visadapt.testing import assert_close, difference, noise, tiny_backbone

D, DEPTH = 12, 3


def idle(adapter, dtype=torch.float64, depth=DEPTH):
    """The adapter, away from its start, behind blocks that do nothing."""
    adapted = Adapted(Idle(depth, D, 4).to(dtype))
    torch.manual_seed(0)
    noise(adapted.add("a", adapter).to(dtype), std=0.5)
    adapted.set_trainable("a")
    return adapted


def run(adapted, x, grid, prefix=1, prompts=0):
    adapted.ctx.begin(x, grid, prefix)
    adapted.ctx.prompts = {"p": prompts}
    return adapted.backbone.body(x)


def tokens(*shape, seed=1):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_rule(adapter, x, softmax=True):
    """Patches (N, D) of one image behind all blocks, one patch at a time."""
    refiner = adapter.common["refiner"]
    for piece in adapter.pieces.values():
        table, rows = piece.tokens(), []
        for patch in x:
            scores = [torch.dot(patch, token) for token in table]
            if softmax:
                raised = [math.exp(s / math.sqrt(D)) for s in scores]
                scores = [r / sum(raised) for r in raised]
            given = sum(s * refiner.value(token) for s, token in zip(scores[1:], table[1:]))
            rows.append(patch + (1 if refiner.strength is None else refiner.strength) * refiner.out(given + patch))
        x = torch.stack(rows)
    return x


@pytest.mark.parametrize("options", [{}, dict(rank=None), dict(softmax=False), dict(zero_start=True)], ids=str)
@torch.no_grad()
def test_every_patch_is_refined_by_the_tokens_of_every_block(options):
    adapted = idle(Rein(**dict(length=5, rank=2, query_dim=None) | options))
    x = tokens(2, 2 + 3 + 6)
    found = run(adapted, x, (2, 3), prefix=2, prompts=3)
    assert torch.equal(found[:, :5], x[:, :5])
    for image in range(2):
        wanted = by_rule(adapted.adapters["a"], x[image, 5:], options.get("softmax", True))
        assert_close(found[image, 5:], wanted)


def test_prompts_beside_it_are_left_out():
    """In the network: what stands between class token and patches is not taken for patches."""
    adapted, seen = Adapted(tiny_backbone(TINY["vit"])).eval(), []
    adapted.add("p", VPT(count=3))
    refiner = adapted.add("a", Rein(length=4, rank=2)).common["refiner"]
    inner = refiner.change
    refiner.change = lambda x: seen.append(x.shape[1]) or inner(x)
    adapted(torch.randn(1, 3, 28, 42))
    assert seen == [6, 6]


@torch.no_grad()
def test_a_patch_that_looks_at_the_first_token_takes_nothing():
    adapted = idle(Rein(length=3, rank=None, query_dim=None), depth=1)
    (piece,), refiner, x = adapted.adapters["a"].pieces.values(), adapted.adapters["a"].common["refiner"], tokens(1, 2)
    piece.a[0] = 1e4 * x[0, 1]
    assert_close(run(adapted, x, (1, 1))[:, 1:], x[:, 1:] + refiner.strength * refiner.out(x[:, 1:]))


def test_the_first_token_learns_through_the_softmax_alone():
    for softmax in (True, False):
        adapted = idle(Rein(length=3, rank=None, query_dim=None, softmax=softmax), depth=1)
        run(adapted, tokens(1, 5), (2, 2)).square().sum().backward()
        (piece,) = adapted.adapters["a"].pieces.values()
        assert bool(piece.a.grad[0].abs().sum() > 1e-3) == softmax
        assert piece.a.grad[1:].abs().sum() > 1e-3


# ---- queries ---------------------------------------------------------------------------------------------------------
def test_queries_have_maximum_mean_and_last_block_next_to_each_other():
    adapted = idle(Rein(length=4, rank=2, query_dim=3))
    link = adapted.adapters["a"].common["link"]
    rows = []
    for n in range(4):
        z = [link.project(piece.tokens()[n]).tolist() for piece in adapted.adapters["a"].pieces.values()]
        row = [f(c) for c in zip(*z) for f in (max, lambda c: sum(c) / len(c), lambda c: c[-1])]
        rows.append(link.merge(torch.tensor(row, dtype=torch.float64)))
    assert_close(adapted.queries(), torch.stack(rows))


def test_queries_teach_the_tokens_of_every_block():
    adapted = idle(Rein(length=4, rank=2, query_dim=3))
    (adapted.queries() * torch.randn(4, 3)).sum().backward()
    adapter = adapted.adapters["a"]
    for value in [*adapter.pieces.parameters(), *adapter.common["link"].parameters()]:
        assert value.grad.abs().sum() > 1e-6


def test_queries_are_offered_by_an_enabled_adapter_that_has_them():
    adapted = vit(Rein(length=4, rank=2, query_dim=6))
    assert adapted.queries().shape == (4, 6)
    with adapted.disabled():
        assert adapted.queries() is None
    adapted.add("b", Rein(length=4, rank=2, query_dim=None))
    assert adapted.queries().shape == (4, 6)
    adapted.enable("b")
    assert adapted.queries() is None


# ---- sizes, starts ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def vit_l():
    with torch.device("meta"):
        return TimmViT("vit_large_patch16_224")


@pytest.mark.parametrize(
    ("options", "total"),
    [({}, 2_990_081), (dict(rank=None), 5_016_065), (dict(query_dim=None, zero_start=True), 2_530_816)],
    ids=str,
)
def test_parameters_in_a_vit_l(vit_l, options, total):
    with torch.device("meta"):
        adapter = Rein(**options)
        adapter.build(vit_l)
    assert sum(p.numel() for p in adapter.parameters()) == total


@pytest.mark.parametrize(("rank", "fan"), [(16, math.sqrt(768 * 16)), (None, 768)])
def test_tokens_start_uniform(rank, fan):
    adapter = on_vit_b(Rein(rank=rank, query_dim=None))
    bound = math.sqrt(6 / (3 * 16**2 + fan))
    for value in adapter.pieces.parameters():
        assert 0.99 * bound < value.abs().max() <= bound and abs(value.mean()) < 0.1 * bound
    assert adapter.common["refiner"].strength.item() == pytest.approx(1e-3)


def test_learns_from_a_start_that_changes_nothing():
    adapted, x = Adapted(tiny_backbone(TINY["vit"])).eval(), torch.randn(2, 3, 28, 42)
    adapter = adapted.add("a", Rein(length=4, rank=2, query_dim=None, zero_start=True))
    adapted.set_trainable("a")
    with torch.no_grad():
        with adapted.disabled():
            base = adapted(x).tokens
        assert torch.equal(adapted(x).tokens, base)
        target = torch.roll(base, 1, 1)
    optimizer, losses = torch.optim.Adam(adapter.parameters(), 3e-3), []
    for _ in range(15):
        optimizer.zero_grad()
        losses.append((adapted(x).tokens - target).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_what_blocks_share_is_stored_once(tmp_path):
    adapted = vit(Rein(length=4, rank=2, query_dim=6))
    adapted.save(tmp_path / "a.safetensors", "a")
    names = [n for n in read_manifest(tmp_path / "a.safetensors")["tensors"] if n.startswith("adapters/")]
    assert len(names) == 2 * 2 + 5 + 4
    assert sum("/shared/" in n for n in names) == 9


@pytest.mark.compile
def test_compiles():
    compiles(vit(Rein(length=4, rank=2, query_dim=None)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(length=1), "length must be at least 2"),
        (dict(length=2.5), "length must be a whole number"),
        (dict(rank=0), "rank must be a whole number of at least 1"),
        (dict(query_dim=0), "query_dim must be a whole number of at least 1"),
    ],
)
def test_what_makes_no_sense(options, message):
    with pytest.raises(InputError, match=message) as caught:
        Rein(**options)
    assert "\n" not in str(caught.value)


def test_blocks_of_two_widths_are_refused():
    backbone = Idle(2, D, 4)
    backbone.sites = lambda: [Site("0", "block", 0, D, D), Site("1", "block", 1, D, 2 * D)]
    with pytest.raises(InputError, match=rf"blocks are \[{D}, {2 * D}\] wide"):
        Adapted(backbone).add("a", Rein(length=3, rank=2))


# ---- published files -------------------------------------------------------------------------------------------------
def published(adapter, prefix="backbone.reins."):
    """A state dict of the official code with the values of an adapter, in a whole model."""
    pieces, common = list(adapter.pieces.values()), dict(adapter.common.named_parameters())
    full = pieces[0].b is None
    state = {"learnable_tokens" if full else "learnable_tokens_a": torch.stack([p.a for p in pieces])}
    if not full:
        state["learnable_tokens_b"] = torch.stack([p.b for p in pieces])
    official = {"refiner.value": "mlp_token2feat", "refiner.out": "mlp_delta_f", "link.project": "transform"}
    for name, value in common.items():
        part, _, leaf = name.rpartition(".")
        state["scale" if leaf == "strength" else f"{official.get(part, 'merge')}.{leaf}"] = value
    whole = {f"{prefix}{k}": v.detach().clone() for k, v in state.items()}
    if prefix.startswith("backbone."):
        whole |= {"backbone.blocks.0.norm1.weight": torch.ones(D), "decode_head.querys2feat.weight": torch.ones(1)}
    return whole


@pytest.mark.parametrize("prefix", ["backbone.reins.", "reins.", ""])
@pytest.mark.parametrize(
    "options", [{}, dict(rank=None), dict(query_dim=None), dict(query_dim=None, zero_start=True)], ids=str
)
@torch.no_grad()
def test_published_file_gives_the_same_adapter(options, prefix):
    options = dict(length=4, rank=2, query_dim=3) | options
    first, second = idle(Rein(**options)), idle(Rein(**options))
    noise(second.adapters)
    adapter, x = second.adapters["a"], tokens(1, 7)
    assert difference(run(first, x, (2, 3)), run(second, x, (2, 3))) > 1e-2
    keys = rein_keys({"state_dict": published(first.adapters["a"], prefix), "meta": {}})
    adapter.common.load_state_dict(keys.pop("shared"))
    assert set(keys) == set(adapter.pieces)
    for key, values in keys.items():
        adapter.pieces[key].load_state_dict(values)
    assert torch.equal(run(first, x, (2, 3)), run(second, x, (2, 3)))
    if options["query_dim"]:
        assert torch.equal(first.queries(), second.queries())


def changed(**values):
    state = published(idle(Rein(length=4, rank=2, query_dim=3)).adapters["a"], "")
    state |= values
    return {k: v for k, v in state.items() if v is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"decode_head.conv.weight": torch.zeros(1)}, "Rein file has decode_head.conv.weight"),
        (changed(gate=torch.zeros(1)), "Rein file has gate"),
        (changed(learnable_tokens_b=None), "lacks learnable_tokens_b"),
        (changed(**{"mlp_delta_f.bias": None}), "lacks mlp_delta_f.bias"),
        (changed(**{"merge.bias": None}), "lacks merge.bias"),
        (changed(learnable_tokens_a=torch.zeros(2, 4, 2)), r"for \[2, 3\] blocks"),
        ({}, "lacks learnable_tokens_a, "),
    ],
)
def test_other_files_are_refused(state, message):
    with pytest.raises(InputError, match=message):
        rein_keys(state)


def test_merging_says_what_cannot_be_folded():
    adapted = Adapted(TimmViT("test_vit")).eval()
    adapted.add("look", Rein(length=4, query_dim=None))
    adapted.add("tune", LoRA(rank=2))
    with pytest.raises(
        InputError, match=r"nothing of 'look' \(Rein, kind tokens\) can be folded into weights"
    ) as caught:
        adapted.merge("look")
    assert str(caught.value).endswith("use the adapter file itself, which needs no merging")
    assert adapted.merge("look", "tune") > 0  # what folds does
