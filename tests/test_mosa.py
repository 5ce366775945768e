"""MoSA: its equations, draws, partitions and files, and the loss on two passes that trains it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from training import BACKBONE, D, Run, first

from visadapt.adapters.mosa import Experts, MoSA, owners
from visadapt.backbones.timm_vit import TimmViT
from visadapt.core.adapted import Adapted
from visadapt.core.context import Context
from visadapt.core.io import read_manifest
from visadapt.errors import InputError
from visadapt.losses.consistency import Consistency, symmetric_kl
from visadapt.registry import LOSSES
from visadapt.tasks.classify import ImageClassifier
from visadapt.testing import assert_close, noise, progress, tiny_backbone

STYLES = ("adaptformer", "pfeiffer", "houlsby")


def adapt(adapter, **arch):
    """The tiny backbone, with LayerScale, and the adapter on it with different values in all experts."""
    config = {**TINY["dinov2"], "arch": {**TINY["dinov2"]["arch"], **arch}}
    adapted = Adapted(tiny_backbone(config))
    torch.manual_seed(0)
    adapted.add("a", adapter)
    adapted.set_trainable("a")
    noise(adapter)
    return adapted


def images(count=2, seed=0):
    return torch.randn(count, 3, 28, 42, generator=torch.Generator().manual_seed(seed))


def parts(adapter):
    return [part for piece in adapter.pieces.values() for part in (piece.down, piece.up)]


def split(adapter):
    return [part for part in parts(adapter) if len(part.weight) > 1]


# ---- equations -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("share", [None, "down", "up"])
def test_block_is_that_of_the_paper(style, share):
    """Behind LayerScale; in training every view goes through the experts that were drawn for it."""
    adapter = MoSA(5, 3, style, share, dropout=0.0, targets=("attn_res", "mlp_res"))
    adapted = adapt(adapter).train()
    block, pieces = adapted.backbone.body.blocks[0], list(adapter.pieces.values())[:2]
    act = {"adaptformer": F.gelu, "pfeiffer": F.relu, "houlsby": F.silu}[style]
    strength = 0.1 if style == "adaptformer" else 1.0

    def expert(part, view):
        return [v[part.drawn[view] if len(v) > 1 else 0] for v in (part.weight, part.bias)]

    def branch(piece, x, y, view):
        t = {"adaptformer": x, "pfeiffer": y, "houlsby": x + y}[style]
        t = t if style == "houlsby" else F.layer_norm(t, (D,), piece.norm.weight, piece.norm.bias, 1e-6)
        return y + strength * F.linear(act(F.linear(t, *expert(piece.down, view))), *expert(piece.up, view))

    def expected(x, view):
        x = x + branch(pieces[0], x, block.ls1(block.attn(block.norm1(x))), view)
        return x + branch(pieces[1], x, block.ls2(block.mlp(block.norm2(x))), view)

    for part, drawn in zip(split(adapter), ([1, 2], [2, 0], [0, 0], [2, 1])):
        part.drawn.copy_(torch.tensor(drawn))
    x = torch.randn(4, 6, D, generator=torch.Generator().manual_seed(0))
    assert_close(block(x), expected(x, 0))
    adapted.ctx.views = 2
    assert_close(block(x), torch.cat([expected(x[:2], 0), expected(x[2:], 1)]))


def test_views_may_stand_in_another_dimension():
    piece = first(adapt(MoSA(5, dropout=0.0)).train().adapters["a"])
    piece.up.drawn.copy_(torch.tensor([1, 3]))
    ctx = Context()
    ctx.views = 2
    x, y = torch.randn(2, 4, 6, D, generator=torch.Generator().manual_seed(0))
    batch_first = piece(x, y, ctx)
    object.__setattr__(piece.site, "batch_dim", 1)
    assert_close(piece(x.transpose(0, 1), y.transpose(0, 1), ctx), batch_first.transpose(0, 1))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_merges(count, dim_in, dim_out, split_bias, seed):
    def made(**settings):
        part = Experts(dim_in, dim_out, count, seed, MoSA(split_bias=split_bias, **settings))
        noise(part, seed=seed)
        return part

    add, joint, official = made(), made(merge="joint"), made(merge="joint", variant="official")
    masks = add.masks()
    for mean, own in zip(add.merged(), (add.weight, add.bias)):
        assert_close(mean, own.mean(0))
    weight, bias = joint.merged()
    assert torch.equal(weight, (add.weight * masks[0]).sum(0))
    assert_close(bias, (add.bias * masks[1]).sum(0) if split_bias else add.bias.mean(0))
    assert_close(official.merged()[0], weight / count)
    assert_close(official.merged()[1], (bias if split_bias else add.bias[-1]) / count)
    for part in (add, joint, official):  # experts that are the merge have it as their merge
        before = [v.detach().clone() for v in part.merged()]
        part.fill(*before)
        assert torch.equal(part.weight, part.weight[:1].expand_as(part.weight))
        for new, old in zip(part.merged(), before):
            assert torch.equal(new, old) if part is not official else torch.allclose(new, old)


# ---- partition and draws ---------------------------------------------------------------------------------------------
@given(st.integers(1, 7), st.integers(1, 60), st.integers(0, 99))
def test_partition_gives_every_entry_one_owner(experts, n, seed):
    scores = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    owner = owners(scores, experts)
    sizes = [(e + 1) * n // experts - e * n // experts for e in range(experts)]
    assert owner.bincount(minlength=experts).tolist() == sizes
    assert owner[scores.argsort()].diff().ge(0).all()


def test_partition_comes_from_the_seed_alone():
    def made(seed, global_seed):
        adapter, backbone = MoSA(8, seed=seed, share=None), tiny_backbone(TINY["vit"])
        torch.manual_seed(global_seed)
        adapter.build(backbone)
        return [part.weight_owner for part in parts(adapter)]

    ours = made(0, 1)
    assert all(torch.equal(a, b) for a, b in zip(ours, made(0, 2)))
    assert not any(torch.equal(a, b) for a, b in zip(ours, made(1, 1)))
    assert not torch.equal(ours[0], ours[2]) and not torch.equal(ours[0], ours[1].T)


def test_draws_are_independent_and_the_same_on_all_processes():
    adapters = [adapt(MoSA(4, 2, share=None)).adapters["a"] for _ in range(2)]
    seen = set()
    for step in range(300):
        for seed, adapter in enumerate(adapters):
            torch.manual_seed(seed)  # the global state differs between processes
            adapter.on_step(progress(step))
        draws = [torch.cat([part.drawn for part in parts(a)]).tolist() for a in adapters]
        assert draws[0] == draws[1]
        seen.add(tuple(draws[0]))
    assert len(seen) > 150  # of the 256 that 2 blocks, 2 projections and 2 views have, none of them tied to another
    assert all({d[i] for d in seen} == {0, 1} for i in range(8))


def test_an_expert_learns_its_own_entries_only():
    start = Run(MoSA(4, 3, share=None)).adapter
    owned, kept = [], []
    for decay in (0.0, 0.1):
        run = Run(MoSA(4, 3, share=None), total=12, weight_decay=decay).go(10)
        shrunk = (1 - 1e-2 * decay) ** 10
        for before, after in zip(parts(start), parts(run.adapter)):
            for name, mask in zip(("weight", "bias"), after.masks()):
                old, new = getattr(before, name).detach(), getattr(after, name).detach()
                assert_close(new[~mask], shrunk * old[~mask], name)  # weight decay acts on them all the same
                owned.append((new != shrunk * old)[mask].float().mean())
                kept.append(mask.float().mean())
    assert min(owned) > 0.8 and sorted({round(k.item(), 2) for k in kept}) == [0.33, 1.0]


def test_split_biases_learn_by_parts():
    run = Run(MoSA(6, 3, split_bias=True), total=12, weight_decay=0.0).go(10)
    for part in split(run.adapter):
        _, mask = part.masks()
        assert (part.bias != 0)[mask].float().mean() > 0.8 and not part.bias[~mask].any()


# ---- runs and files --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("stop", [1, 7, 10])
def test_resume_is_exact(stop, every):
    """In new objects from a state dict, also in the middle of an accumulation: the same bits at the end."""
    whole = Run(MoSA(4, 3, share=None), total=14, every=every).go()
    rest = Run(MoSA(4, 3, share=None), total=14, every=every).go(stop)
    rest = rest.resumed(MoSA(4, 3, share=None), every=every).go()
    expected = whole.model.state_dict()
    assert not [k for k, v in rest.model.state_dict().items() if not torch.equal(v, expected[k])]


@pytest.mark.parametrize("merge", ["add", "joint"])
def test_a_file_is_as_large_as_a_plain_adapter(merge, tmp_path):
    """While it trains as at the end; what is read is the merge, bit for bit."""
    run = Run(MoSA(4, 3, merge=merge, dropout=0.0), total=6).go(4)
    adapted, x = run.model.adapted, images()
    adapted.eval()
    evaluated = adapted(x).tokens.detach()
    adapted.save(tmp_path / "a.safetensors", "a")
    shapes = [t["shape"] for k, t in read_manifest(tmp_path / "a.safetensors")["tensors"].items() if "adapters" in k]
    assert sorted(shapes) == sorted(2 * [[D], [D], [4, D], [4], [D, 4], [D]])
    fresh = Adapted(copy.deepcopy(BACKBONE)).eval()
    fresh.load(tmp_path / "a.safetensors")
    assert torch.equal(fresh(x).tokens, evaluated)
    for part in parts(fresh.adapters["a"]):
        assert torch.equal(part.weight, part.weight[:1].expand_as(part.weight))
    adapted.train()
    assert not torch.equal(adapted(x).tokens, evaluated)  # a drawn expert
    run.adapter.finalize()
    assert_close(adapted(x).tokens, evaluated)
    assert torch.equal(adapted.eval()(x).tokens, evaluated)


@pytest.mark.parametrize(
    ("settings", "trained", "stored"),
    [
        (dict(), 250_432, 100_672),
        (dict(width=16), 66_064, 26_896),
        (dict(style="houlsby", share=None), 2 * 4 * 99_136, 2 * 99_136),
        (dict(style="pfeiffer", share="up"), 1_536 + 4 * 49_216 + 49_920, 100_672),
    ],
)
def test_sizes_on_a_vit_b(settings, trained, stored):
    """Those of the paper's network per block; of the first, 102,976 values have a gradient."""
    with torch.device("meta"):
        backbone = TimmViT("vit_base_patch16_224")
    adapter = MoSA(**settings, layers=[0])
    adapter.build(backbone)
    assert sum(p.numel() for p in adapter.parameters()) == trained
    assert sum(v.numel() for piece in adapter.pieces.values() for v in piece.stored().values()) == stored
    if not settings:
        learning = sum(mask.sum() for part in parts(adapter) for mask in part.masks())
        assert learning + 2 * 768 == 102_976


# ---- two passes ------------------------------------------------------------------------------------------------------
def test_two_views_are_two_passes_with_draws_of_their_own():
    adapter = MoSA(4, 4, "houlsby", None, dropout=0.0)
    adapted, x = adapt(adapter).train(), images()
    adapter.on_step(progress(0))
    both = adapted(x, views=2)
    assert adapted.ctx.views == 2 and len(both.tokens) == 4
    one = adapted(x)
    for part in parts(adapter):
        part.drawn.copy_(part.drawn.flip(0))
    other = adapted(x)
    assert adapted.ctx.views == 1
    assert_close(both.tokens, torch.cat([one.tokens, other.tokens]))
    assert (one.tokens - other.tokens).abs().max() > 1e-2


def test_recomputed_activations_have_the_views_of_the_pass():
    found = []
    for checkpointing in (False, True):
        adapter = MoSA(4, 4, dropout=0.0)
        adapted = adapt(adapter).train()
        adapted.backbone.body.set_grad_checkpointing(checkpointing)
        adapter.on_step(progress(1))
        adapted(images(), views=2).native.square().sum().backward()
        found.append([p.grad for p in adapter.parameters()])
    for plain, saving in zip(*found):
        assert_close(saving, plain, "gradient")


def task(**settings):
    torch.manual_seed(0)
    built = ImageClassifier(
        TINY["vit"],
        head=dict(type="LinearHead", num_classes=3),
        adapters=dict(main=dict(type="MoSA", width=4, dropout=0.0)),
        **settings,
    )
    noise((p for p in built.parameters() if p.requires_grad), std=0.3)
    return built.train()


@pytest.mark.parametrize(("weight", "second"), [(1.0, 0.0), (0.5, 2.0)])
def test_a_task_trains_on_two_passes_where_its_loss_asks_for_them(weight, second):
    built, x, labels = task(loss=dict(type="Consistency", weight=weight, second=second)), images(), torch.tensor([0, 2])
    adapter = built.adapted.adapters["main"]
    adapter.on_step(progress(2))
    found = built.loss(x, labels)["loss"]
    plain, passes = task(), []
    for view in (0, 1):
        for ours, theirs in zip(parts(plain.adapted.adapters["main"]), parts(adapter)):
            ours.drawn.fill_(theirs.drawn[view])
        passes.append(plain(x))
    a, b = (logits.log_softmax(1) for logits in passes)
    divergence = ((b.exp() * (b - a)).sum() + (a.exp() * (a - b)).sum()) / 2 / len(x)
    assert_close(found, F.nll_loss(a, labels) + second * F.nll_loss(b, labels) + weight * divergence)
    assert divergence > 1e-3
    found.backward()
    assert all(p.grad is not None for p in adapter.parameters())
    assert built(x).shape == (2, 3) and len(built.eval()(x, labels, mode="predict")) == 2


def test_two_passes_see_the_same_mix_and_the_same_cached_features():
    built, x, labels = task(loss=dict(type="Consistency"), mix=dict(mixup=1.0)), images(4), torch.arange(4) % 3
    seen = []
    built.adapted.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert built.loss(x, labels)["loss"].isfinite()
    assert torch.equal(*seen[0].chunk(2)) and not torch.equal(seen[0][:4], x)
    features = torch.randn(4, D)
    assert_close(built.loss(None, labels, features)["loss"], F.cross_entropy(built.head(features), labels))


def test_divergence_draws_each_prediction_to_the_other_as_it_is():
    a, b = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    p, q = a.softmax(1), b.softmax(1)
    value = symmetric_kl(a, b)
    assert_close(value, ((p - q) * (p.log() - q.log())).sum() / 5 / 2)
    grads = torch.autograd.grad(value, (a, b))
    assert_close(grads[0], (p - q) / 10)  # that of a cross-entropy with a fixed target, halved
    assert_close(grads[1], (q - p) / 10)
    assert symmetric_kl(a, a) == 0 and symmetric_kl(a.bfloat16(), b.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(weight=-1.0), "weight must be 0 or more"),
        (dict(second=-0.5), "second must be 0 or more"),
        (dict(loss=dict(type="Consistency")), "loss is that of one pass"),
        (dict(loss=dict(type="CrossEntropi")), "did you mean 'CrossEntropy'"),
    ],
)
def test_mistakes_of_the_loss(settings, message):
    with pytest.raises(InputError, match=message):
        LOSSES.build(dict(type="Consistency", **settings))


def test_the_loss_refuses_logits_of_one_pass():
    with pytest.raises(InputError, match="3 images need twice as many logits, got 3"):
        Consistency()(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(style="houlsbi"), "unknown style 'houlsbi' .did you mean 'houlsby'"),
        (dict(share="both"), "unknown share 'both'; it is one of: down, up"),
        (dict(merge="mean"), "unknown merge 'mean'; it is one of: add, joint"),
        (dict(variant="offical"), "did you mean 'official'"),
        (dict(experts=0), "experts must be a whole number"),
        (dict(dropout=1.0), "dropout must be in"),
        (dict(targets=["mlp"]), "it cannot sit at mlp; it takes the roles attn_res, mlp_res"),
    ],
)
def test_mistakes_of_the_adapter(settings, message):
    with pytest.raises(InputError, match=message):
        Adapted(copy.deepcopy(BACKBONE)).add("a", MoSA(**settings))
