"""The mathematics of every method against a computation written out here."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visadapt.adapters.adaptformer import AdaptFormer
from visadapt.adapters.bitfit import BitFit
from visadapt.adapters.conv_branch import ConvBranch
from visadapt.adapters.convpass import Convpass
from visadapt.adapters.full import FullFineTune
from visadapt.adapters.houlsby import Houlsby
from visadapt.adapters.layernorm import LayerNormTuning
from visadapt.adapters.linear_probe import LinearProbe
from visadapt.adapters.lora import LoRA
from visadapt.adapters.pfeiffer import Pfeiffer
from visadapt.adapters.ssf import SSF
from visadapt.adapters.vpt import VPT
from visadapt.backbones.base import Backbone
from visadapt.core.adapted import Adapted
from visadapt.core.adapter import Adapter
from visadapt.core.sites import Site, select
from visadapt.errors import InputError
from visadapt.registry import ADAPTERS
from visadapt.testing import assert_close, noise, tiny_backbone

DEPTH, D, HEADS, GRID = 2, 48, 3, (4, 5)
HIDDEN = 4 * D


def tiny(in_chans: int = 3, name: str = "vit_small_patch14_dinov2", **arch) -> Backbone:
    """Random norms, biases and LayerScale included, so that a branch is not the same before and behind LayerScale."""
    arch = dict(depth=DEPTH, embed_dim=D, num_heads=HEADS, init_values=1.0) | arch
    return tiny_backbone(dict(type="TimmViT", name=name, in_chans=in_chans, arch=arch))


def images(count: int = 2, bands: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, bands, 56, 70, generator=torch.Generator().manual_seed(seed))


def adapt(adapter: Adapter, **arch) -> Adapted:
    """The tiny backbone with this adapter, its parameters moved away from the start."""
    adapted = Adapted(tiny(**arch)).eval()
    adapted.add("a", adapter)
    adapted.set_trainable("a")
    noise(adapter)
    return adapted


def count(adapted: Adapted) -> int:
    return adapted.trainable_report().trainable


def embed(body: nn.Module, x: Tensor) -> Tensor:
    return body._pos_embed(body.patch_embed(x))


def check(adapted: Adapted, stream: Tensor) -> None:
    """The adapted network against a stream (B, 1 + h*w, D) behind the last block."""
    tokens = adapted.backbone.body.norm(stream)
    found = adapted(images())
    assert_close(found.tokens, tokens[:, 1:])
    assert_close(found.cls, tokens[:, 0])


# ---- no pieces ----------------------------------------------------------------------------------------------------
def test_linear_probe_attaches_nothing():
    adapted = Adapted(tiny())
    before = adapted(images()).tokens
    adapted.add("a", LinearProbe())
    adapted.set_trainable("a", heads=[head := nn.Linear(D, 2)])
    assert torch.equal(adapted(images()).tokens, before)
    assert not any(p.requires_grad for p in adapted.parameters()) and head.weight.requires_grad
    with pytest.raises(InputError, match="no pieces"):
        adapted.merge("a")


def test_full_fine_tuning_trains_all_of_the_base_and_gives_it_back():
    adapted = Adapted(tiny())
    base = {k: v.clone() for k, v in adapted.backbone.body.state_dict().items()}
    before = adapted(images()).tokens
    adapted.add("a", FullFineTune())
    adapted.set_trainable("a")
    assert count(adapted) == sum(p.numel() for p in adapted.backbone.body.parameters())
    noise(adapted.backbone.body, std=0.01)
    changed = adapted(images()).tokens
    assert not torch.allclose(changed, before)
    with adapted.disabled():
        assert torch.equal(adapted(images()).tokens, before)
    assert torch.equal(adapted(images()).tokens, changed)
    adapted.remove("a")
    assert all(torch.equal(v, base[k]) for k, v in adapted.backbone.body.state_dict().items())


def test_full_fine_tuning_of_the_last_block():
    adapted = Adapted(tiny())
    adapted.add("a", FullFineTune(layers=[-1]))
    adapted.set_trainable("a")
    trained = {n for n, p in adapted.backbone.body.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in adapted.backbone.body.named_parameters() if n.startswith("blocks.1.")}
    with pytest.raises(InputError, match="layer 2 does not exist"):
        Adapted(tiny()).add("b", FullFineTune(layers=[2]))


# ---- weights ------------------------------------------------------------------------------------------------------
def test_all_weights_is_every_module_once():
    backbone = tiny()
    sites = select(backbone.sites(), ["all-weights"], None, "test")
    with_weight = [n for n, m in backbone.body.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.LayerNorm)]
    assert sorted(s.path for s in sites) == sorted(with_weight)
    split = [Site("a", role, 0, 4, 4) for role in "qkv"] + [Site("b", r, 0, 4, 4, rows=(0, 4)) for r in "qk"]
    assert select(split, ["all-weights"], None, "test") == split  # without a fused site, the slices themselves
    assert {s.role for s in select(backbone.sites(), ["all-norm"], None, "test")} == {"norm1", "norm2", "norm"}


def test_bitfit_moves_every_bias():
    adapter = BitFit()
    adapted = adapt(adapter)
    body = adapted.backbone.body
    assert count(adapted) == D + DEPTH * (3 * D + D + HIDDEN + D + 2 * D) + D
    changed = copy.deepcopy(tiny())
    with torch.no_grad():
        for piece in adapter.pieces.values():
            changed.body.get_submodule(piece.site.path).bias.add_(piece.db)
    out = adapted(images())
    assert_close(out.tokens, changed(images()).tokens)
    out.native.square().sum().backward()
    assert all(p.grad is None for p in body.parameters())
    grad = adapter.pieces["trunk_00_qkv"].db.grad.view(3, D).abs().amax(1)
    assert grad[1] < 1e-4 * grad[0] and grad[2] > 0  # the softmax does not see what all keys share
    assert adapted.merge("a", check=images()) == 2 + 6 * DEPTH


def test_bitfit_hands_the_weight_on_and_skips_what_has_no_bias():
    adapted = adapt(BitFit(), qkv_bias=False)
    assert not any(p.site.role == "qkv" for p in adapted.pieces())
    weight = adapted.backbone.body.blocks[0].mlp.fc1.weight
    piece = adapted.adapters["a"].pieces["trunk_00_fc1"]
    assert piece.map(weight, weight[:, 0])[0] is weight  # so that autograd never forms a weight gradient
    with pytest.raises(InputError, match="nothing to do at the 2 chosen sites"):
        adapted.add("b", BitFit(targets=["qkv"]))


def test_scales_hand_the_weight_on_to_maps_that_work_on_it():
    adapted = Adapted(tiny())
    noise(adapted.add("a", SSF()))
    noise(adapted.add("b", BitFit()))
    adapted.set_trainable("a", "b")
    trained = adapted.train()(images()).tokens
    with torch.no_grad():
        assert_close(trained.detach(), adapted.eval()(images()).tokens)
    trained.sum().backward()
    assert all(p.grad is not None for p in adapted.adapters.parameters())


def test_layer_norm_tuning_moves_gains_and_biases():
    adapter = LayerNormTuning()
    adapted = adapt(adapter)
    assert count(adapted) == 2 * D * (2 * DEPTH + 1)
    changed = copy.deepcopy(tiny())
    with torch.no_grad():
        for piece in adapter.pieces.values():
            norm = changed.body.get_submodule(piece.site.path)
            norm.weight.add_(piece.dw)
            norm.bias.add_(piece.db)
    assert_close(adapted(images()).tokens, changed(images()).tokens)
    assert adapted.merge("a", check=images()) == 2 * DEPTH + 1


def test_ssf_scales_and_shifts_every_output():
    adapter = SSF()
    adapted = adapt(adapter)
    assert count(adapted) == 2 * (D + DEPTH * (3 * D + D + HIDDEN + D + 2 * D) + D)
    reference = tiny()
    for piece in adapter.pieces.values():
        shape = (-1, 1, 1) if piece.site.role == "patch" else (-1,)
        gamma, beta = piece.gamma.detach().view(shape), piece.beta.detach().view(shape)
        module = reference.body.get_submodule(piece.site.path)
        module.register_forward_hook(lambda m, args, y, gamma=gamma, beta=beta: y * gamma + beta)
    expected = reference(images()).tokens
    assert_close(adapted(images()).tokens, expected, "in training")
    with torch.no_grad():
        assert_close(adapted(images()).tokens, expected, "by the folded weight")
    adapted.merge("a", check=images())
    assert "forward" not in adapted.backbone.body.blocks[0].attn.qkv.__dict__
    assert_close(adapted(images()).tokens, expected, "merged")


def test_ssf_trains_without_a_weight_gradient():
    adapter = SSF()
    adapted = adapt(adapter)
    pieces = adapter.pieces
    assert pieces["trunk_00_qkv"].by_forward() and not pieces["trunk_00_norm1"].by_forward()
    with torch.no_grad():
        assert not pieces["trunk_00_qkv"].by_forward()
    trained = adapted(images()).native.square().sum()
    by_forward = torch.autograd.grad(trained, list(adapter.parameters()))
    for piece in pieces.values():
        piece.dense = False  # now through the folded weight
    folded = torch.autograd.grad(adapted(images()).native.square().sum(), list(adapter.parameters()))
    for one, other in zip(by_forward, folded):
        assert_close(one, other, "gradient", 1e-3)


def test_ssf_starts_near_the_base():
    torch.manual_seed(0)
    adapter = SSF()
    Adapted(tiny()).add("a", adapter)
    gamma = torch.cat([p.gamma for p in adapter.pieces.values()])
    beta = torch.cat([p.beta for p in adapter.pieces.values()])
    for values, mean in ((gamma, 1.0), (beta, 0.0)):
        assert abs(values.mean() - mean) < 0.005 and abs(values.std() - 0.02) < 0.002


# ---- bottlenecks --------------------------------------------------------------------------------------------------
def mlp_of(piece: nn.Module, act, x: Tensor) -> Tensor:
    p = piece.bottleneck
    return act(x @ p.down.weight.T + p.down.bias) @ p.up.weight.T + p.up.bias


def test_adaptformer_reads_the_stream_before_the_norm():
    adapter = AdaptFormer(width=5, scale=0.7)
    adapted = adapt(adapter)
    assert count(adapted) == DEPTH * (2 * D * 5 + D + 5)
    x = embed(adapted.backbone.body, images())
    for i, block in enumerate(tiny().body.blocks):
        x = x + block.ls1(block.attn(block.norm1(x)))
        side = mlp_of(adapter.pieces[f"trunk_0{i}_mlp_res"], F.relu, x)
        x = x + block.ls2(block.mlp(block.norm2(x))) + 0.7 * side
    check(adapted, x)


@pytest.mark.parametrize(
    "adapter, act, places", [(Houlsby(width=5), F.gelu, ("attn", "mlp")), (Pfeiffer(width=5), F.relu, ("mlp",))]
)
def test_serial_bottlenecks_stand_behind_the_sub_layer(adapter, act, places):
    adapted = adapt(adapter)
    assert count(adapted) == DEPTH * len(places) * (2 * D * 5 + D + 5)
    x = embed(adapted.backbone.body, images())
    for i, block in enumerate(tiny().body.blocks):
        for sub, norm, scale in ((block.attn, block.norm1, block.ls1), (block.mlp, block.norm2, block.ls2)):
            y = sub(norm(x))
            place = "attn" if sub is block.attn else "mlp"
            if place in places:
                y = y + mlp_of(adapter.pieces[f"trunk_0{i}_{place}"], act, y)
            x = x + scale(y)
    check(adapted, x)


@pytest.mark.parametrize(
    "adapter", [AdaptFormer(width=4), Houlsby(width=4), Pfeiffer(width=4), Convpass(width=4), ConvBranch(width=8)]
)
def test_a_fresh_adapter_is_the_identity(adapter):
    adapted = Adapted(tiny()).eval()
    before = adapted(images()).tokens
    adapted.add("a", adapter)
    assert torch.equal(adapted(images()).tokens, before)


@pytest.mark.parametrize("kind", [AdaptFormer, Convpass])
def test_dropout_acts_in_training_only(kind):
    adapted = adapt(kind(width=8, dropout=0.5))
    assert torch.equal(adapted(images()).tokens, adapted(images()).tokens)
    adapted.train()
    assert not torch.equal(adapted(images()).tokens, adapted(images()).tokens)
    with pytest.raises(InputError, match=rf"{kind.__name__}: dropout must be in \[0, 1\), got 1"):
        kind(dropout=1)
    with pytest.raises(InputError, match=f"{kind.__name__}: width must be a whole number"):
        kind(width=0)


def bypass(piece: nn.Module, x: Tensor, lead: int) -> Tensor:
    """Convpass as images: the patches are one, every token before them is an image of one pixel."""

    def act(t: Tensor) -> Tensor:
        return t * torch.sigmoid(1.702 * t)

    def conv(t: Tensor) -> Tensor:
        return F.conv2d(t, piece.conv.weight, piece.conv.bias, padding=1)

    hidden = act(piece.down(x))
    width = hidden.shape[-1]
    rows = [conv(hidden[:, i].reshape(-1, width, 1, 1)).reshape(-1, 1, width) for i in range(lead)]
    grid = hidden[:, lead:].reshape(-1, *GRID, width).permute(0, 3, 1, 2)
    rows.append(conv(grid).permute(0, 2, 3, 1).reshape(len(x), -1, width))
    return piece.up(act(torch.cat(rows, 1)))


def test_convpass_runs_beside_both_sub_layers():
    adapter = Convpass(width=4, scale=0.7)
    adapted = adapt(adapter)
    assert count(adapted) == DEPTH * 2 * (2 * D * 4 + D + 4 + 9 * 16 + 4)
    x = embed(adapted.backbone.body, images())
    for i, block in enumerate(tiny().body.blocks):
        n = block.norm1(x)
        x = x + block.ls1(block.attn(n) + 0.7 * bypass(adapter.pieces[f"trunk_0{i}_attn"], n, 1))
        n = block.norm2(x)
        x = x + block.ls2(block.mlp(n) + 0.7 * bypass(adapter.pieces[f"trunk_0{i}_mlp"], n, 1))
    check(adapted, x)


def test_convpass_keeps_prompts_off_the_grid():
    adapted = adapt(Convpass(width=4, scale=0.7, targets=["mlp"]))
    prompt = adapted.add("p", VPT(count=3, deep=False))
    x = embed(adapted.backbone.body, images())
    tokens = next(iter(prompt.pieces.values())).tokens.expand(2, -1, -1)
    x = torch.cat([x[:, :1], tokens, x[:, 1:]], 1)
    for i, block in enumerate(tiny().body.blocks):
        x = x + block.ls1(block.attn(block.norm1(x)))
        n = block.norm2(x)
        x = x + block.ls2(block.mlp(n) + 0.7 * bypass(adapted.adapters["a"].pieces[f"trunk_0{i}_mlp"], n, 4))
    adapted.enable("a", "p")
    check(adapted, torch.cat([x[:, :1], x[:, 4:]], 1))


# ---- prompts ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("deep", [True, False])
def test_vpt_inserts_tokens_behind_the_class_token(deep):
    adapter = VPT(count=3, deep=deep)
    adapted = adapt(adapter)
    assert count(adapted) == (DEPTH if deep else 1) * 3 * D
    x, n = embed(adapted.backbone.body, images()), 0
    for i, block in enumerate(tiny().body.blocks):
        if (piece := adapter.pieces[f"trunk_0{i}_block"] if deep or i == 0 else None) is not None:
            x = torch.cat([x[:, :1], piece.tokens.expand(2, -1, -1), x[:, 1 + n :]], 1)
            n = 3
        x = block(x)
    check(adapted, torch.cat([x[:, :1], x[:, 1 + n :]], 1))


def test_vpt_start_and_dropout():
    torch.manual_seed(0)
    adapter = VPT(count=50, dropout=0.5)
    adapted = Adapted(tiny(in_chans=5))
    adapted.add("a", adapter)
    piece = next(iter(adapter.pieces.values()))
    bound = math.sqrt(6 / (5 * 14**2 + D))
    assert 0.99 * bound < piece.tokens.abs().max() <= bound
    dropped = piece(2) == 0
    assert 0.4 < dropped.float().mean() < 0.6 and not torch.equal(dropped[0], dropped[1])
    adapted.eval()
    assert torch.equal(piece(2)[1], piece.tokens)


def test_vpt_refuses_what_it_cannot_do():
    with pytest.raises(InputError, match=r"shallow prompts enter at one block, got layers=\[0, 1\]"):
        VPT(deep=False, layers=[0, 1])
    with pytest.raises(InputError, match="it needs prompts"):
        Adapted(tiny(name="vit_small_patch16_dinov3")).add("a", VPT())


# ---- side network -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bands, patch", [(3, 14), (5, 16)])
def test_conv_branch_feeds_the_patches(bands, patch):
    name = {14: "vit_small_patch14_dinov2", 16: "vit_small_patch16_224"}[patch]
    adapter = ConvBranch(width=8, layers=[0, -1])
    adapted = adapt(adapter, in_chans=bands, name=name)
    x = torch.randn(2, bands, 4 * patch, 5 * patch)
    widths = {14: (2, 4, 8), 16: (1, 2, 4, 8)}[patch]
    convs = sum(9 * a * b + 2 * b for a, b in zip((bands, *widths), widths))
    assert count(adapted) == convs + 2 * (8 * D + D)
    branch, runs = adapter.common["branch"], []
    branch.register_forward_hook(lambda *_: runs.append(1))
    found = adapted(x).tokens
    assert len(runs) == 1
    features = x
    for stage in branch.stages:
        features = F.gelu(stage[1](F.conv2d(features, stage[0].weight, stride=2, padding=1)))
    if patch == 16:
        assert features.shape[2:] == GRID
    features = F.interpolate(features, GRID, mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2)
    stream = embed(adapted.backbone.body, x)
    for i, block in enumerate(tiny(in_chans=bands, name=name).body.blocks):
        up = adapter.pieces[f"trunk_0{i}_block"].up
        stream = block(torch.cat([stream[:, :1], stream[:, 1:] + features @ up.weight.T + up.bias], 1))
    assert_close(found, adapted.backbone.body.norm(stream)[:, 1:])
    adapted(x).cls.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in adapter.parameters())  # all of it reaches the class token


@pytest.mark.parametrize("name", sorted(ADAPTERS.names()))
def test_a_strength_of_zero_is_refused(name):
    """With it nothing would be learnt, without a word."""
    given = inspect.signature(ADAPTERS.get(name)).parameters
    for factor in {"alpha", "scale", "scaling", "gamma", "router_lr_mult"} & set(given):
        if not isinstance(given[factor].default, str):
            with pytest.raises(InputError, match=f"{factor} must be above 0 and finite, got 0"):
                ADAPTERS.build({"type": name, factor: 0.0})


def test_half_precision_wants_autocast_or_a_merge():
    adapted = Adapted(tiny())
    noise(adapted.add("a", LoRA(targets=["q"])))
    adapted.backbone.bfloat16()
    x = images().bfloat16()
    with pytest.raises(InputError, match=r"in bfloat16 and adapter 'a' is not; run it under torch\.autocast"):
        adapted(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert adapted(x).tokens.isfinite().all()
    adapted.merge("a")
    assert adapted(x).tokens.dtype == torch.bfloat16


def test_whole_numbers_are_merged_into_nothing():
    adapted = Adapted(tiny())
    noise(adapted.add("a", LoRA(targets=["fc2"])))
    for block in adapted.backbone.body.blocks:
        block.mlp.fc2.weight = nn.Parameter(block.mlp.fc2.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"weight of blocks\.0\.mlp\.fc2 is stored as torch\.int8"):
        adapted.merge("a")


def test_offsets_of_biases_keep_the_precision_of_the_base():
    adapted = Adapted(tiny())
    noise(adapted.add("a", BitFit()))
    adapted.backbone.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert adapted(images().bfloat16()).tokens.isfinite().all()


def test_more_than_two_views_are_refused():
    with pytest.raises(InputError, match="views is 1 or 2, got 3"):
        Adapted(tiny())(images(), views=3)
