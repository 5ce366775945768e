"""Adapters of few entries are written into the weights and exchanged there."""

from __future__ import annotations

import math

import pytest
import torch
from cases import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from visadapt.adapters.lora import LoRA
from visadapt.adapters.paca import PaCA
from visadapt.adapters.shira import SHiRA
from visadapt.core.adapted import Adapted
from visadapt.core.io import fingerprint
from visadapt.errors import InputError
from visadapt.testing import assert_close, noise, tiny_backbone

X = torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(1))


def vit(**adapters):
    """A tiny ViT with adapters away from their starts, the first one enabled."""
    adapted = Adapted(tiny_backbone(TINY["vit"])).eval()
    for seed, (name, adapter) in enumerate(adapters.items()):
        noise(adapted.add(name, adapter, enable=seed == 0), seed=seed)
    return adapted


def run(adapted):
    with torch.no_grad():
        return adapted(X).tokens


def bits(adapted):
    return {k: v.clone() for k, v in adapted.backbone.body.state_dict().items()}


def assert_bits(adapted, before):
    assert [k for k, v in bits(adapted).items() if not torch.equal(v, before[k])] == []


def sparse_vit():
    roles = ["q", "v", "fc2", "patch"]
    return vit(
        a=SHiRA(2, "random", seed=1, targets=roles),
        b=SHiRA(1, "magnitude", targets=roles),
        c=PaCA(2, targets=roles),
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["a", "b", "c", "ab", "abc"]), min_size=1, max_size=4), st.sampled_from([1.0, 0.3]))
def test_any_order_of_exchanges_gives_each_output_and_the_bits_of_the_base(order, scale):
    adapted = sparse_vit()
    before = bits(adapted)
    for names in order:
        adapted.enable(*names, scale=scale)
        y = run(adapted)
        adapted.merge(*names, check=X)
        assert "forward" not in adapted.backbone.body.blocks[0].mlp.fc2.__dict__
        assert_close(run(adapted), y)
        adapted.unmerge()
        assert_bits(adapted, before)


def test_a_merge_touches_and_keeps_only_the_entries():
    adapted = sparse_vit()
    before, base = bits(adapted), fingerprint(adapted)
    adapted.merge("a")
    assert fingerprint(adapted) == base
    after = bits(adapted)
    pieces = adapted.pieces("a")
    for path, original in adapted.merger.originals.items():
        own = [p for p in pieces if p.site.path == path]
        changed = after[f"{path}.weight"] != before[f"{path}.weight"]
        assert sum(old.numel() for *_, old in original.parts) == sum(len(p.index) for p in own) < changed.numel() / 2
        marked = torch.zeros_like(changed)
        for rows, places, _ in original.parts:
            marked[rows].view(-1)[places] = True
        assert not (changed & ~marked).any() and changed.sum() > 0.9 * marked.sum()
    adapted.unmerge()
    assert_bits(adapted, before)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_threads_side_by_side_write_the_same(three_threads):
    """Sparse pieces beside others, on modules of their own and on shared ones."""
    adapted = vit(a=SHiRA(2), b=LoRA(2, targets=["fc1"]), c=PaCA(2, targets=["fc2", "patch"]))
    before = bits(adapted)
    adapted.enable("a", "b", "c")
    y = run(adapted)
    assert adapted.merge(check=X) == 4 * 2 + 1
    merged = bits(adapted)
    assert_close(run(adapted), y)
    adapted.unmerge()
    assert_bits(adapted, before)
    torch.set_num_threads(1)
    adapted.merge()
    assert_bits(adapted, merged)
    adapted.unmerge()
    torch.set_num_threads(3)
    adapted.adapters["a"].pieces["trunk_00_q"].values.data[0] = math.nan
    with pytest.raises(InputError, match=r"weight of blocks\.0\.attn\.qkv non-finite; nothing was"):
        adapted.merge()
    assert_bits(adapted, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_entries_in_half_precision_are_rounded_once_also_where_adapters_share_them(dtype):
    for names in (["a"], ["a", "b"]):
        adapted = vit(a=SHiRA(2, targets=["q"]), b=SHiRA(2, targets=["q"]))
        adapted.backbone.to(dtype)
        adapted.enable(*names)
        fc, before = adapted.backbone.body.blocks[0].attn.qkv, bits(adapted)
        wanted = fc.weight.double()
        wanted[:48] += sum(adapted.adapters[n].pieces["trunk_00_q"].delta().double() for n in names)
        adapted.merge()
        assert torch.equal(fc.weight, wanted.float().to(dtype))
        adapted.unmerge()
        assert_bits(adapted, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_entries_are_refused_and_nothing_is_changed(value):
    adapted = sparse_vit()
    before, y = bits(adapted), run(adapted)
    piece = adapted.adapters["a"].pieces["trunk_01_fc2"]
    kept = piece.values[3].item()
    piece.values.data[3] = value
    with pytest.raises(
        InputError, match=r"merging \['a'\] makes the weight of blocks.1.mlp.fc2 non-finite; nothing was"
    ):
        adapted.merge()
    piece.values.data[3] = kept
    assert_bits(adapted, before)
    assert torch.equal(run(adapted), y) and not adapted.merger.originals


def test_a_merge_that_breaks_off_is_taken_back():
    adapted = sparse_vit()
    before = bits(adapted)

    def broken():
        raise MemoryError

    adapted.adapters["a"].pieces["trunk_01_fc2"].entries = broken
    with pytest.raises(MemoryError):
        adapted.merge()
    assert_bits(adapted, before)
    assert all(p.on for p in adapted.pieces("a"))
