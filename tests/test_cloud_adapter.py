"""Cloud-Adapter: context from a convolutional network for the patches after every block."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cases import TINY
from small import compiles, vit
from torch import nn

from visadapt.adapters.cloud_adapter import CloudAdapter, ContextAttention
from visadapt.adapters.vpt import VPT
from visadapt.backbones.timm_vit import TimmViT
from visadapt.convert.cloud_adapter import cloud_adapter_keys
from visadapt.core.adapted import Adapted
from visadapt.core.context import Context
from visadapt.core.sites import Site
from visadapt.errors import InputError
from visadapt.testing import assert_close, noise, tiny_backbone

D = 48  # of the tiny ViT


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def fresh(blocks=2, **options):
    """A tiny ViT of any depth with the adapter in double precision."""
    backbone = tiny_backbone(dict(TINY["vit"], arch=dict(TINY["vit"]["arch"], depth=blocks)))
    adapted = Adapted(backbone)
    adapted.add("a", CloudAdapter(**options))
    adapted.set_trainable("a")
    return adapted.double().eval()


def side_of(adapted):
    return adapted.adapters["a"].sides()[0]


# ---- sizes -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def vit_l():
    with torch.device("meta"):
        return TimmViT("vit_large_patch14_dinov2")


@pytest.mark.parametrize(
    ("rank", "count"), [(16, 1_828_425), (4, 611_913), (8, 1_017_417), (32, 3_450_441), (None, 26_945_097)]
)
def test_parameters_on_vit_l_are_those_of_the_authors(vit_l, rank, count):
    adapter = CloudAdapter(rank=rank)
    with torch.device("meta"):
        adapter.build(vit_l)
    assert sum(p.numel() for p in adapter.parameters()) == count
    assert sum(p.numel() for p in adapter.common.parameters()) == 206_409
    assert all(isinstance(piece, ContextAttention) for piece in adapter.pieces.values())
    assert CloudAdapter().rank == 16


# ---- which block reads what ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("blocks", "depth"), [(4, 4), (8, 4), (12, 4), (5, 5), (24, 4), (8, 6)])
def test_levels_are_those_of_the_authors_wherever_their_code_runs(blocks, depth):
    adapter = CloudAdapter(width=2, rank=1, depth=depth, context="levels")
    sites = [Site(str(n), "block", n, 4, 4) for n in range(blocks)]
    (side,) = adapter.shared(sites, tiny_backbone(TINY["vit"])).values()
    assert list(side.reads.values()) == [n // (blocks // 4) for n in range(blocks)]
    assert len(side.net.stages) == side.reads[sites[-1].key] + 1


@pytest.mark.parametrize("blocks", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("perception", ["pmaa", "convnext"])
def test_levels_for_any_number_of_blocks_and_no_part_without_gradient(blocks, perception):
    adapted = fresh(blocks, width=4, rank=2, context="levels", perception=perception)
    noise(adapted.adapters)
    adapted.train()(normal(2, 3, 28, 42)).tokens.square().sum().backward()
    assert all(p.grad is not None for p in adapted.adapters.parameters())
    assert max(p.read for p in adapted.adapters["a"].pieces.values()) == min(blocks, 4) - 1


@pytest.mark.parametrize("perception", ["pmaa", "convnext"])
def test_last_context_is_the_last_map_and_the_sum_pools_all(perception):
    image = normal(1, 3, 28, 42)
    adapted = fresh(width=4, rank=2, perception=perception)
    side = side_of(adapted)
    maps = side.net(image)
    size = maps[-1].shape[-2:]
    (found,) = side.joined(maps)
    assert_close(found, sum(F.adaptive_avg_pool2d(m, size) for m in maps))
    assert len(maps) == (5 if perception == "pmaa" else 4)
    last = side_of(fresh(width=4, rank=2, perception=perception, context="last"))
    assert last.joined(maps)[0] is maps[-1]


# ---- attention -------------------------------------------------------------------------------------------------------
def piece(rank, seed=0):
    torch.manual_seed(seed)
    made = ContextAttention(Site("block", "block", 0, D, D), 6, rank, 0).double()
    noise(made, seed=seed)
    return made


@pytest.mark.parametrize("rank", [1, 5, 63])
def test_attention_in_r_channels_is_attention_in_64(rank):
    made, y, context = piece(rank), normal(2, 7, D).requires_grad_(), normal(2, 6, 6, seed=1).requires_grad_()
    first, second = made._mix_in_rank(y, context, 1), made._mix(y, context, 1)
    assert_close(first, second)
    learning, cotangent = [y, context, *made.parameters()], normal(*first.shape, seed=2)
    found, expected = (torch.autograd.grad((y * cotangent).sum(), learning) for y in (first, second))
    for one, other in zip(found, expected):
        assert_close(one, other, "gradient", 1e-9)


@pytest.mark.parametrize("rank", [3, 64, None])
def test_attention_is_its_equation_and_leaves_other_tokens_alone(rank):
    made, ctx = piece(rank), Context()
    ctx.begin(torch.zeros(2), (2, 3), prefix=1)
    ctx.prompts, made.owner = {"p": 2}, "a"
    ctx.values["a.context0"] = context = normal(2, 6, 6, seed=1)
    y = normal(2, 9, D)
    q, k, v, out = (f.weight if rank is None else f[1].weight @ f[0].weight for f in (made.q, made.k, made.v, made.out))
    expected = y.clone()
    for image in range(2):
        for head in range(8):
            rows = slice(64 * head, 64 * head + 64)
            scores = (y[image, 3:] @ q[rows].T) @ (context[image] @ k[rows].T).T / 8
            expected[image, 3:] += (scores.softmax(1) @ (context[image] @ v[rows].T)) @ out[:, rows].T
    assert_close(made(y, y, ctx), expected)


def test_context_is_resized_to_a_grid_that_is_not_square():
    adapted = fresh(width=4, rank=2, depth=3)
    image = normal(1, 3, 28, 70)
    adapted(image)
    (context,) = side_of(adapted).joined(side_of(adapted).net(image))
    assert context.shape == (1, 4, 4, 9)
    resized = F.interpolate(context, (2, 5), mode="bilinear", align_corners=False)
    found = adapted.ctx.values["a.context0"]
    assert found.shape == (1, 10, 4)
    assert_close(found[0, 1 * 5 + 3], resized[0, :, 1, 3])


@pytest.mark.parametrize("options", [{}, {"interaction": "gate"}])
def test_prompts_of_another_adapter_pass(options):
    adapted = fresh(width=4, rank=2, **options)
    adapted.add("p", VPT(count=3)).double()
    adapted.enable("a", "p")
    assert adapted.eval()(normal(2, 3, 28, 42)).tokens.shape == (2, 6, D)


# ---- gate ------------------------------------------------------------------------------------------------------------
def test_gate_is_its_equation():
    adapted = fresh(1, width=4, interaction="gate", local_groups=3, global_groups=2)
    (made,), ctx = adapted.adapters["a"].pieces.values(), Context()
    for norm in (m for m in made.modules() if isinstance(m, nn.BatchNorm2d)):
        noise([norm.running_mean, norm.weight.data, norm.bias.data], seed=1)
    ctx.begin(torch.zeros(2), (3, 5), prefix=1)
    ctx.values["a.context0"] = context = normal(2, 4, 2, 2, seed=1)
    y = normal(2, 16, D)
    found = made(y, y, ctx)
    assert torch.equal(found[:, 0], y[:, 0])

    def part(module, values):  # (channels,) at one place
        conv, norm = module
        width = conv.weight.shape[1]
        groups = [
            conv.weight[g * len(conv.weight) // conv.groups : (g + 1) * len(conv.weight) // conv.groups, :, 0, 0]
            @ values[g * width : (g + 1) * width]
            for g in range(conv.groups)
        ]
        return (torch.cat(groups) - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias

    for row, column in ((0, 0), (1, 3), (2, 0)):
        near = context[1, :, row * 2 // 3, column * 2 // 5]
        token = 1 + row * 5 + column
        expected = part(made.local, y[1, token]) * part(made.gate, near).sigmoid() + part(made.shift, near)
        assert_close(found[1, token], expected)


# ---- training --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"interaction": "gate"}])
def test_norms_learn_in_training_once_per_image_and_are_stored(tmp_path, options):
    def run(checkpointing, training=True):
        torch.manual_seed(0)
        adapted = fresh(width=4, rank=2, **options)
        adapted.train(training).backbone.body.set_grad_checkpointing(checkpointing)
        adapted(normal(4, 3, 28, 42)).tokens.square().sum().backward()
        return adapted

    adapted = run(checkpointing=False)
    buffers, twice = dict(adapted.adapters.named_buffers()), dict(run(checkpointing=True).adapters.named_buffers())
    still = dict(run(checkpointing=False, training=False).adapters.named_buffers())
    for name, value in buffers.items():
        assert torch.equal(value, twice[name]), name
        assert not torch.equal(value, still[name]), name
    path = tmp_path / "a.safetensors"
    adapted.float().save(path, "a")
    other = fresh(width=4, rank=2, **options).float()
    other.load(path)
    for (name, value), stored in zip(other.adapters.named_buffers(), adapted.adapters.buffers()):
        assert torch.equal(value, stored), name


@pytest.mark.compile
@pytest.mark.parametrize("options", [{}, {"interaction": "gate"}])
def test_compiles_as_one_graph_in_training(options):
    compiles(vit(CloudAdapter(width=4, rank=2, **options)).train())


def test_any_number_of_bands():
    for bands in (1, 13, 20):
        adapted = Adapted(tiny_backbone(dict(TINY["vit"], in_chans=bands)))
        adapted.add("a", CloudAdapter(width=4, rank=2))
        assert adapted.train()(normal(2, bands, 28, 42, dtype=torch.float32)).tokens.isfinite().all()


# ---- mistakes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(width=0), "width must be"),
        (dict(rank=0), "rank must be"),
        (dict(depth=1.5), "depth must be"),
        (dict(perception="conv"), "unknown perception 'conv'"),
        (dict(interaction="atention"), "unknown interaction 'atention'.*attention"),
        (dict(context="all"), "unknown context 'all'"),
        (dict(perception="convnext", pool=True), "stem and pool are options of perception='pmaa'"),
        (dict(perception="convnext", stem=False), "stem and pool are options of perception='pmaa'"),
        (dict(local_groups=2), "options of interaction='gate'"),
        (dict(interaction="gate", width=9, global_groups=2), "width 9 does not split into global_groups=2"),
        (dict(interaction="gate", global_groups=0), "global_groups must be"),
    ],
)
def test_arguments_that_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        CloudAdapter(**options)


def test_groups_and_images_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="48 channels of the backbone do not split into 5"):
        fresh(interaction="gate", local_groups=5)
    for options in (dict(pool=True), dict(perception="convnext")):
        with pytest.raises(InputError, match="at least 16 pixels, got 14x28"):
            fresh(width=4, **options)(normal(1, 3, 14, 28))
    assert math.isfinite(fresh(width=4)(normal(1, 3, 14, 28)).tokens.sum().item())


# ---- published files -------------------------------------------------------------------------------------------------
def published(blocks=2, width=4, rank=3, prefix="backbone.cloud_adapter."):
    """Names and shapes of the authors' file, with random values, for the tiny ViT."""
    shapes = {}

    def unit(name, middle, kernel):
        shapes.update({f"cnn.{name}.conv_dw.weight": kernel, f"cnn.{name}.conv_pw.weight": (width, middle, 1, 1)})
        for norm, channels in (("bn1", middle), ("bn2", width)):
            leaves = ("weight", "bias", "running_mean", "running_var")
            shapes.update({f"cnn.{name}.{norm}.{leaf}": (channels,) for leaf in leaves})
            shapes[f"cnn.{name}.{norm}.num_batches_tracked"] = ()

    unit("proj_1x1", 3, (3, 1, 1, 1))
    for n in range(5):
        unit(f"spp_dw.{n}", width, (width, width, 3, 3))
    for n in range(blocks):
        for part, dim_in, dim_out in (("q", D, 512), ("k", width, 512), ("v", width, 512), ("out", 512, D)):
            shapes[f"net.{n}.attn.to_{part}.loramlp.0.weight"] = (rank, dim_in)
            shapes[f"net.{n}.attn.to_{part}.loramlp.1.weight"] = (dim_out, rank)
    state = {prefix + k: normal(*v, seed=n) for n, (k, v) in enumerate(shapes.items())}
    return {k: v.abs() + 0.5 if k.endswith("var") else v for k, v in state.items()}


def official_context(state, image):
    """The context map, straight from the authors' names."""

    def unit(x, name, stride):
        def norm(y, n):
            leaves = ("running_mean", "running_var", "weight", "bias")
            return F.batch_norm(y, *(state[f"cnn.{name}.{n}.{leaf}"] for leaf in leaves))

        kernel = state[f"cnn.{name}.conv_dw.weight"]
        groups = x.shape[1] // kernel.shape[1]
        y = norm(F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2, groups=groups), "bn1")
        y = norm(F.conv2d(y, state[f"cnn.{name}.conv_pw.weight"]), "bn2")
        return x + y if x.shape == y.shape else y

    maps = [unit(unit(image, "proj_1x1", 1), "spp_dw.0", 1)]
    for n in range(1, 5):
        maps.append(unit(maps[-1], f"spp_dw.{n}", 2))
    return sum(F.adaptive_avg_pool2d(m, maps[-1].shape[-2:]) for m in maps)


def load(adapted, pieces):
    adapter = adapted.adapters["a"]
    assert {*pieces} == {*adapter.pieces, "shared"}
    for key, values in pieces.items():
        (adapter.common if key == "shared" else adapter.pieces[key]).load_state_dict(values)


def test_published_file_gives_the_authors_context_and_modules():
    head = {"decode_head.query_embed.weight": normal(2, 2), "backbone.cls_token": normal(1, 1, D)}
    adapted, image = fresh(width=4, rank=3), normal(2, 3, 28, 42)
    load(adapted, cloud_adapter_keys({"meta": {}, "state_dict": published() | head}))
    (found,) = side_of(adapted).joined(side_of(adapted).net(image))
    alone = published(prefix="")
    assert_close(found, official_context(alone, image))
    made = adapted.adapters["a"].pieces["trunk_01_block"]
    assert torch.equal(made.k[0].weight, alone["net.1.attn.to_k.loramlp.0.weight"])
    assert torch.equal(made.out[1].weight, alone["net.1.attn.to_out.loramlp.1.weight"])


@pytest.mark.parametrize("prefix", ["", "cloud_adapter."])
def test_modules_of_chosen_blocks_and_other_prefixes(prefix):
    base = {"cls_token": normal(1, 1, D), "blocks.0.norm1.weight": normal(D)} if prefix else {}
    pieces = cloud_adapter_keys(published(prefix=prefix) | base, layers=[3, 7])
    assert {*pieces} == {"trunk_03_block", "trunk_07_block", "shared"}
    load(fresh(8, width=4, rank=3, layers=[3, 7]), pieces)


def test_files_of_the_other_variants():
    full = {"cnn.norm2.weight": 0, "cnn.norm3.weight": 1, "cnn.stages.3.0.gamma": 2, "net.0.attn.to_q.weight": 3}
    full |= {"cnn.downsample_layers.0.1.bias": 4, "cnn.stages.0.0.pwconv2.bias": 5, "net.1.global_act.1.bias": 6}
    shared = {f"perception.net.{k}": v for k, v in {"norms.3.weight": 1, "stages.3.block.gamma": 2}.items()}
    shared |= {"perception.net.stages.0.down.1.bias": 4, "perception.net.stages.0.block.mlp.fc2.bias": 5}
    blocks = {"trunk_00_block": {"q.weight": 3}, "trunk_01_block": {"gate.1.bias": 6}}
    assert cloud_adapter_keys(full, context="last") == blocks | {"shared": shared}
    shared["perception.net.norms.2.weight"] = 0
    assert cloud_adapter_keys(full) == blocks | {"shared": shared}


def changed(add=None, drop=None):
    state = {k: v for k, v in published().items() if drop is None or drop not in k}
    return state | dict.fromkeys(add or (), torch.zeros(1))


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        (changed(add=["neck.weight"]), {}, "neck.weight beside backbone.cloud_adapter"),
        (changed(add=["backbone.cloud_adapter.cnn.fpn.weight"]), {}, "has 'cnn.fpn.weight'"),
        (changed(add=["backbone.cloud_adapter.cnn.proj_1x1.conv.weight"]), {}, "cnn.proj_1x1.conv.weight"),
        (changed(add=["backbone.cloud_adapter.net.0.attn.to_x.weight"]), {}, "has 'net.0.attn.to_x.weight'"),
        (changed(drop="net.0"), {}, r"modules net.\{1\}.*cut off"),
        (changed(drop="net."), {}, "cut off"),
        (changed(drop="cnn."), {}, "0 tensors cnn"),
        (changed(), dict(layers=[1]), "modules for 2 blocks, layers names 1"),
        ({"blocks.0.weight": torch.zeros(1)}, {}, "has 'blocks.0.weight'"),
    ],
)
def test_files_that_are_refused(state, options, message):
    with pytest.raises(InputError, match=message):
        cloud_adapter_keys(state, **options)
