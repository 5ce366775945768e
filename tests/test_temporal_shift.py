"""Attention that sees other frames: against a loop, in a network, beside other methods, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from cases import TINY
from torch import Tensor

from visadapt.adapters._common.shifted_attention import ShiftedAttention
from visadapt.adapters.lora import LoRA
from visadapt.adapters.temporal_shift import TemporalShift
from visadapt.core.adapted import Adapted
from visadapt.core.context import Context
from visadapt.core.sites import Site
from visadapt.errors import InputError
from visadapt.testing import assert_close, noise, tiny_backbone


def images(count: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 28, 42, generator=torch.Generator().manual_seed(seed))


def looped(x: Tensor, frames: int, offsets) -> Tensor:
    """(clips * frames, heads, L, head_dim), head by head and frame by frame."""
    out, first = x.clone(), 0
    for offset, heads in offsets:
        for i in range(len(x)):
            clip, t = divmod(i, frames)
            if 0 <= t - offset < frames:
                out[i, first : first + heads] = x[clip * frames + t - offset, first : first + heads]
        first += heads
    return out


@pytest.mark.parametrize("offsets", [((1, 1), (-1, 1)), ((1, 2), (-2, 1), (3, 1)), ((-3, 4),)])
@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("bias", [None, (6, 6), (4, 6, 6), (1, 1, 6, 6), (24, 4, 6, 6)], ids=str)
def test_temporal_shift_equals_a_loop(offsets, windows, bias):
    """Also its gradients; scores of all heads, of each head, and of each window have an offset of their own."""
    frames, clips = 4, 2
    q, k, v = given = list(torch.randn(3, clips * frames * windows, 4, 6, 5, dtype=torch.float64))
    if bias is not None:
        bias = torch.randn(*bias, dtype=torch.float64)[-len(q) :]
        given.append(bias)
    for tensor in given:
        tensor.requires_grad_()
    ctx = Context()
    ctx.begin(torch.zeros(clips * frames, 3, 1, 1), (2, 3), 0)
    ctx.num_frames = frames
    core = ShiftedAttention(Site("attn", "attn", 0, 20, 20), offsets, 4, "TemporalShift")
    found, wanted = core.attend(q, k, v, bias, ctx), []
    for w in range(windows):  # windows of one image stand together
        kw, vw = (looped(t[w::windows], frames, offsets) for t in (k, v))
        scores = q[w::windows] @ kw.mT / math.sqrt(5)
        if bias is not None:
            scores = scores + (bias[w::windows] if len(bias) == len(q) else bias)
        wanted.append(scores.softmax(-1) @ vw)
    wanted = torch.stack(wanted, 1).flatten(0, 1)
    assert_close(found, wanted)
    cotangent = torch.randn_like(wanted)
    for ours, theirs in zip(*(torch.autograd.grad(y, given, cotangent) for y in (found, wanted)), strict=True):
        assert_close(ours, theirs)


def test_temporal_shift_in_a_network():
    adapted = Adapted(tiny_backbone(TINY["vit"])).eval()
    x = images(6)
    before = adapted(x).tokens
    adapted.add("a", TemporalShift(layers=[0]))
    assert not list(adapted.adapters["a"].parameters())
    assert_close(adapted(x).tokens, before, "one frame a clip")
    adapted.ctx.num_frames = 3
    shifted = adapted(x).tokens
    assert not torch.allclose(shifted, before, atol=1e-3)
    other = x.clone()
    other[0] = images(1, seed=2)
    changed = (adapted(other).tokens - shifted).abs().amax((1, 2)) > 1e-6
    assert changed.tolist() == [True, True, False, False, False, False]  # one block looks one frame back, in one clip


def test_temporal_shift_refuses_what_does_not_fit():
    adapted = Adapted(tiny_backbone(TINY["vit"])).eval()
    with pytest.raises(InputError, match=r"offsets take 4 heads, blocks\.0\.attn has 3"):
        adapted.add("a", TemporalShift(offsets=[[1, 2], [-1, 2]]))
    adapted.add("a", TemporalShift(offsets=[[2, 1]]))
    adapted.ctx.num_frames = 4
    with pytest.raises(InputError, match="6 images are no whole number of clips of 4 frames"):
        adapted(images(6))
    adapted.ctx.num_frames = 2
    with pytest.raises(InputError, match="offset 2 needs clips of more than 2 frames"):
        adapted(images(2))
    for bad in ([], [[0, 1]], [[1, 0]], [1, 1]):
        with pytest.raises(InputError, match="TemporalShift: offsets"):
            TemporalShift(offsets=bad)


def test_temporal_shift_stands_beside_lora():
    adapted = Adapted(tiny_backbone(TINY["vit"])).eval()
    adapted.add("t", TemporalShift())
    adapted.ctx.num_frames = 2
    before = adapted(images()).tokens
    noise(adapted.add("a", LoRA(rank=2)))
    assert not torch.allclose(adapted(images()).tokens, before, atol=1e-3)
    adapted.merge("a", check=images())
