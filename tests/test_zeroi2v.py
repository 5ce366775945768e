"""ZeroI2V: published sizes, clips of other lengths, merging, bad input. Equations are checked by its parity kits."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import TINY
from small import zeroi2v_state

from visadapt.adapters.zeroi2v import OFFSETS, AddLinears, LinearAdapter, ZeroI2V, _kept
from visadapt.backbones.timm_vit import TimmViT
from visadapt.convert import convert
from visadapt.convert.zeroi2v import zeroi2v_keys
from visadapt.core.adapted import Adapted
from visadapt.errors import InputError
from visadapt.testing import assert_close, difference, noise, tiny_backbone


def adapt(frames=4, offsets=((1, 1), (-1, 1)), clip=None, **arguments):
    """A noisy ZeroI2V on a tiny image tower of CLIP, for clips of `clip` frames."""
    adapted = Adapted(tiny_backbone(TINY["clip"])).eval()
    adapter = adapted.add("a", ZeroI2V(frames, offsets, **arguments))
    noise(adapter)
    adapted.ctx.num_frames = clip or frames
    return adapted


def frames(count, seed=0):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "model, heads, linear",
    [("vit_base_patch16_clip_224", 12, 14_201_856), ("vit_large_patch14_clip_224", 16, 50_454_528)],
)
def test_trainable_values_are_those_of_the_paper(model, heads, linear):
    with torch.device("meta"):
        adapted = Adapted(TimmViT(model))
        adapter = adapted.add("a", ZeroI2V(8, "base"))
    embedding = adapter.pieces["trunk_xx_stem"].embedding.numel()
    assert embedding == 8 * adapted.backbone.embed_dims[0]
    assert sum(p.numel() for p in adapter.parameters()) - embedding == linear
    tables = {name: table for name, table in OFFSETS.items() if name.startswith(model.split("_")[1])}
    assert tables and all(sum(n for _, n in table) <= heads for table in tables.values())


def test_frames_see_the_frames_that_their_offsets_name():
    """Frame 0 changes frame 1 and 3 through offsets 1 and -3, and no other one."""
    adapted = adapt(offsets=[[1, 1], [-3, 1]], clip=4)
    x = frames(4)
    other = x.clone()
    for changed, seen in ((0, {0, 1}), (3, {3, 0})):
        other = x.clone()
        other[changed] += 1
        with torch.no_grad():
            one_block = copy.deepcopy(adapted)
            one_block.backbone.body.blocks = one_block.backbone.body.blocks[:1]
            a, b = one_block(x).tokens, one_block(other).tokens
        assert {t for t in range(4) if difference(a[t], b[t]) > 1e-4} == seen


def linear_adapter(dropout, dim=24, width=6):
    torch.manual_seed(0)
    module = LinearAdapter(dim, width, 0.5, dropout).double()
    for p in module.parameters():
        torch.nn.init.normal_(p)
    return module


@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 4), (), (0,), (3, 0)])
def test_gradients_of_a_linear_adapter(shape):
    module, x = linear_adapter(0.0), torch.randn(*shape, 24, dtype=torch.float64, requires_grad=True)
    y = module(x)
    plain = x + 0.5 * module.up(module.down(x))
    assert_close(y, plain)
    cotangent, over = torch.randn_like(y), [x, *module.parameters()]
    for found, wanted in zip(*(torch.autograd.grad(z, over, cotangent) for z in (y, plain)), strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize("compiling", [False, True])
def test_dropout_of_a_linear_adapter(compiling, monkeypatch):
    """Each inner value is kept or not, scaled so that the mean stays, and gradients are those of the same mask."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    module, x = linear_adapter(0.3).train(), torch.randn(4000, 24, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        module.up.weight.copy_(torch.eye(24, 6)), module.up.bias.zero_()
    y, z = module(x), module.down(x)
    kept = (((y - x)[:, :6] / z).detach() > 0.1).double()
    assert 0.69 < kept.mean() < 0.71
    assert (kept.mean(0) - 0.7).abs().max() < 0.04  # each of the values in a word
    assert abs((kept[:, 1:] * kept[:, :-1]).mean() - 0.49) < 0.02
    plain = x + 0.5 * module.up(z * kept / 0.7)
    assert_close(y, plain)
    cotangent, over = torch.randn_like(y), [x, *module.parameters()]
    for found, wanted in zip(*(torch.autograd.grad(out, over, cotangent) for out in (y, plain)), strict=True):
        assert_close(found, wanted)
    assert_close(module.eval()(x), x + 0.5 * module.up(module.down(x)))


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("shape", [(2, 9), (), (3, 0)])
def test_linear_adapters_in_float32_are_those_in_float64(shape, dropped):
    """Whose gradients are tested above; in float32 the mask and x come in with the products on a CPU."""
    torch.manual_seed(0)
    x, w1, b1, w2, b2 = (torch.randn(s, dtype=torch.float64) / 4 for s in ((*shape, 24), (6, 24), (6,), (24, 6), (24,)))
    kept, cotangent, found = (torch.rand(*shape, 6) > 0.3).double() if dropped else None, torch.randn(*shape, 24), []
    for dtype in (torch.float64, torch.float32):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w1, b1, w2, b2)]
        y = AddLinears.apply(*leaves, None if kept is None else kept.to(dtype), 0.7, 0.5)
        found.append([y, *torch.autograd.grad(y, leaves, cotangent.to(dtype))])
    for exact, single in zip(*found, strict=True):
        assert_close(single.double(), exact, tolerance=1e-5)


@pytest.mark.parametrize("rate", [0.002, 0.1, 0.998])
def test_rates_of_dropout_between_the_steps_that_eight_bits_have(rate):
    x = torch.zeros(4000, 24)
    kept = torch.stack([_kept(x, 6, rate).mean() for _ in range(400)]).mean()
    assert abs(1 - kept - rate) < 5e-4


def test_the_highest_rate_that_eight_bits_have_drops_with_any_draw(monkeypatch):
    """In float32 the sum of rate and draw would round to 256, which eight bits take for 0."""
    monkeypatch.setattr(torch, "rand", lambda shape, device=None: torch.tensor(1 - 2**-24))
    assert _kept(torch.zeros(4000, 24), 6, 255 / 256).mean() < 0.01


def test_the_output_of_a_linear_adapter_may_be_changed_in_place():
    module, x = linear_adapter(0.0), torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    y, plain = module(x), 2 * module(x)
    y.mul_(2)
    assert_close(*(torch.autograd.grad(out.sum(), module.up.weight)[0] for out in (y, plain)))


def test_a_frozen_linear_adapter_keeps_no_tokens():
    module, x = linear_adapter(0.3).train().requires_grad_(False), torch.randn(50, 24, dtype=torch.float64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        module(x.requires_grad_()).sum().backward()
    assert saved and (50, 24) not in saved


def test_clips_of_one_batch_do_not_mix():
    adapted = adapt()
    x = frames(8)
    with torch.no_grad():
        assert_close(adapted(x).tokens[4:], adapted(x[4:]).tokens)


def test_embeddings_of_another_clip_length_are_resampled():
    adapted = adapt(frames=4, clip=8, offsets=[])
    piece = adapted.adapters["a"].pieces["trunk_xx_stem"]
    x = torch.zeros(8, 5, 48)
    adapted.ctx.begin(frames(8), (2, 2), 1)
    found = piece(x, x, adapted.ctx)[:, 0]
    assert_close(found[0], piece.embedding[0])
    assert_close(found[1], 0.75 * piece.embedding[0] + 0.25 * piece.embedding[1])


def test_merged_network_gives_the_same_and_keeps_only_what_is_free():
    adapted, x = adapt(), frames(8)
    with torch.no_grad():
        before = adapted(x).tokens
        assert adapted.merge("a", check=x) == 8
        assert_close(adapted(x).tokens, before)
    left = [p for p in adapted.pieces("a") if p.on]
    assert {p.kind for p in left} == {"attention", "tokens"}
    assert sum(p.numel() for piece in left for p in piece.parameters()) == 4 * 48


def test_merging_in_training_mode_with_dropout_is_refused():
    adapted = adapt().train()
    with pytest.raises(InputError, match=r"adapter 'a' is random in training mode.*eval\(\)"):
        adapted.merge("a")
    adapted = adapt(dropout=0.0).train()
    assert adapted.merge("a", check=frames(4)) == 8


def test_a_merged_published_file_is_the_unmerged_one():
    """Both published files, before and after the merge, through the converters."""
    adapted = adapt()
    body, adapter = adapted.backbone.body, adapted.adapters["a"]
    x = frames(4)
    with torch.no_grad():
        expected = adapted(x).tokens
        states = [zeroi2v_state(adapter, body, merged=False)]
        adapted.merge("a")
        states.append(zeroi2v_state(adapter, body, merged=True))
        for state, ratio in zip(states, (0.25, None)):
            backbone = TimmViT(TINY["clip"]["name"], arch=TINY["clip"]["arch"]).eval()
            backbone.body.load_state_dict(convert(state, backbone.body).state)
            again, pieces = Adapted(backbone).eval(), zeroi2v_keys({"state_dict": state})
            fresh = again.add("a", ZeroI2V(4, ((1, 1), (-1, 1)), ratio=ratio)).eval()
            fresh.common.load_state_dict(pieces.get("shared", {}))
            fresh.pieces["trunk_xx_stem"].load_state_dict(pieces["trunk_xx_stem"])
            again.ctx.num_frames = 4
            assert_close(again(x).tokens, expected)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (dict(offsets="bass"), "no table of offsets 'bass'.*base"),
        (dict(offsets=[[0, 1]]), "shift not 0"),
        (dict(offsets=[[1]]), "pairs"),
        (dict(offsets=[[1.5, 1]]), r"pairs of integers .* got \[1\.5, 1\]"),
        (dict(offsets=[[1, 2], [-1, 2]]), "offsets take 4 heads, blocks.0.attn has 3"),
        (dict(frames=0), "num_frames must be a whole number"),
        (dict(ratio=0.0), "ratio must be above 0"),
        (dict(dropout=1.0), "dropout must be in"),
    ],
)
def test_wrong_arguments_are_named(arguments, said):
    with pytest.raises(InputError, match=said):
        adapt(**arguments)


def test_a_gate_is_not_left_out_by_accident():
    model = TimmViT("vit_small_plus_patch16_dinov3", arch=dict(depth=1, embed_dim=48, num_heads=3))
    with pytest.raises(InputError, match="fc1 and gate read the same tokens"):
        Adapted(model).add("a", ZeroI2V())
    adapter = Adapted(model).add("a", ZeroI2V(targets=["attn", "qkv", "proj", "fc1", "gate", "fc2", "stem"]))
    assert adapter.pieces["trunk_00_gate"].adapter is adapter.pieces["trunk_00_fc1"].adapter


def test_offsets_beyond_the_clip_and_broken_clips_are_refused():
    with pytest.raises(InputError, match="offset 2 needs clips of more than 2 frames, got 2"):
        adapt(offsets=[[2, 1]], clip=2)(frames(2))
    with pytest.raises(InputError, match="6 images are no whole number of clips of 4 frames"):
        adapt()(frames(6))


@pytest.mark.compile
def test_an_export_can_be_trained_on():
    adapted, x = adapt(), frames(4)
    plain = torch.nn.Module()
    plain.adapted, plain.forward = adapted, lambda x: adapted(x).native
    program = torch.export.export(plain, (x,), strict=False).module()
    found, wanted = {}, {}
    for module, gradients in ((program, found), (plain, wanted)):  # the program may share its parameters
        module.zero_grad()
        module(x).square().sum().backward()
        gradients |= {k: p.grad.clone() for k, p in module.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys() and len(found) > 10
    for name, gradient in found.items():
        assert_close(gradient, wanted[name], name)


def test_files_without_or_with_half_of_an_adapter_are_refused():
    with pytest.raises(InputError, match="no temporal_embedding"):
        zeroi2v_keys({"class_embedding": torch.zeros(3)})
    half = {"temporal_embedding": torch.zeros(1, 2, 4)}
    half["transformer.resblocks.0.S_Adapter.D_fc1.weight"] = torch.zeros(1, 4)
    with pytest.raises(InputError, match=r"lacks 00_attn_in\.down\.bias"):
        zeroi2v_keys(half)
