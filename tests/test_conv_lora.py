"""ConvLoRA, the super-resolution network that it was made for, and the loss of its distillation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from visadapt.adapters.conv_lora import ConvLoRA
from visadapt.backbones.base import Backbone
from visadapt.backbones.dscf import DSCF
from visadapt.core.adapted import Adapted
from visadapt.core.sites import Site
from visadapt.errors import InputError
from visadapt.losses.affinity import SpatialAffinity
from visadapt.registry import BACKBONES, LOSSES
from visadapt.testing import assert_close, difference, noise, tiny_backbone

SMALL = dict(type="DSCF", channels=5, blocks=3, upscale=2)


class Layer(Backbone):
    def __init__(self, layer, role="conv"):
        super().__init__()
        self.body, self.role = nn.Sequential(layer), role

    def sites(self):
        o, i = self.body[0].weight.shape[:2]
        groups = getattr(self.body[0], "groups", 1)
        return [Site("0", self.role, 0, i * groups, o, layout="NLC" if self.role == "fc1" else "NCHW")]


def adapt(backbone, **adapters):
    adapted = Adapted(backbone).eval()
    for seed, (name, adapter) in enumerate(adapters.items()):
        noise(adapted.add(name, adapter), std=0.05, seed=seed)
    adapted.enable(*adapters)
    adapted.set_trainable(*adapters)
    return adapted


def images(height=6, width=7, batch=2, seed=0):
    return 50 * torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


# ---- the update ------------------------------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None)
@given(
    o=st.integers(2, 5),
    i=st.integers(2, 5),
    kernel=st.integers(1, 3),
    rank=st.integers(1, 2),
    stride=st.integers(1, 2),
    alpha=st.sampled_from([None, 1.0, 3.0]),
)
def test_the_product_is_cut_into_kernels_row_by_row(o, i, kernel, rank, stride, alpha):
    torch.manual_seed(0)
    conv = nn.Conv2d(i, o, kernel, stride, padding=1)
    adapted = Adapted(Layer(conv)).double()
    adapter = adapted.add("a", ConvLoRA(rank, alpha))
    adapter.double()
    (piece,) = adapter.pieces.values()
    assert not piece.delta().any() and piece.a.abs().max() <= (i * kernel) ** -0.5 and piece.a.std() > 0
    assert sum(p.numel() for p in adapter.parameters()) == rank * kernel**2 * (o + i)
    noise(adapter, std=0.5)
    expected = conv.weight.clone()
    for n, c, u, v in torch.cartesian_prod(*(torch.arange(size) for size in expected.shape)).tolist():
        number = ((n * i + c) * kernel + u) * kernel + v
        row, column = divmod(number, i * kernel)
        scaling = 2 if alpha is None else alpha / rank
        expected[n, c, u, v] += scaling * piece.b[row] @ piece.a[:, column]
    x = torch.randn(2, i, 6, 5, dtype=torch.float64)
    assert_close(adapted.backbone.body(x), F.conv2d(x, expected, conv.bias, stride, 1))


def test_a_linear_gets_the_usual_factors():
    torch.manual_seed(0)
    linear = nn.Linear(12, 9)
    adapted = Adapted(Layer(linear, "fc1"))
    noise(adapted.add("a", ConvLoRA(3, targets=["fc1"])))
    (piece,) = adapted.pieces("a")
    assert piece.a.shape == (3, 12) and piece.b.shape == (9, 3) and piece.factors() is not None
    x = torch.randn(4, 12)
    assert_close(adapted.backbone.body(x), F.linear(x, linear.weight + 2 * piece.b @ piece.a, linear.bias))


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (nn.Conv2d(4, 6, 3), dict(rank=5), "rank 5 exceeds the site trunk_00_conv of 6 x 4"),
        (nn.Conv2d(4, 6, (1, 3)), dict(), "0 has a kernel of 1 x 3; it takes square ones"),
        (nn.Conv2d(4, 6, 3, groups=2), dict(), "0 has 2 groups; it takes none, choose other targets"),
        (nn.Conv2d(4, 6, 3), dict(targets=["down"]), "target 'down' matches no site"),
        (nn.Conv2d(4, 6, 3), dict(rank=0), "rank must be a whole number of at least 1"),
    ],
)
def test_what_it_does_not_take(layer, options, message):
    with pytest.raises(InputError, match=message) as caught:
        Adapted(Layer(layer)).add("a", ConvLoRA(**options))
    assert "\n" not in str(caught.value)


def test_it_takes_no_norms():
    with pytest.raises(InputError, match="cannot sit at norm1"):
        Adapted(tiny_backbone(TINY["resnet"])).add("a", ConvLoRA(targets=["norm1"]))


# ---- the network -----------------------------------------------------------------------------------------------------
def by_rule(network, x):
    """The enlarged images, and the blocks' outputs, from the published description and the values of the network."""
    values = network.body.state_dict()

    def conv(name, x):
        weight = values[f"{name}.weight"]
        return F.conv2d(x, weight, values[f"{name}.bias"], padding=weight.shape[-1] // 2)

    outputs, inner = [conv("conv_1", x)], None
    for n in range(1, network.blocks + 1):
        before = outputs[-1]
        inner = F.silu(conv(f"block_{n}.c1_r", before))
        third = conv(f"block_{n}.c3_r", F.silu(conv(f"block_{n}.c2_r", inner)))
        outputs.append((third + before) * (third.sigmoid() - 0.5))
    parts = [outputs[0], conv("conv_2", outputs[-1]), outputs[1], inner]
    last = conv("upsampler.0", conv("conv_cat", torch.cat(parts, 1)))
    return F.pixel_shuffle(last, network.upscale), outputs[1:]


@pytest.mark.parametrize("blocks", [1, 2, 4])
@torch.no_grad()
def test_network_is_the_published_one(blocks):
    network, x = tiny_backbone(SMALL | dict(blocks=blocks, upscale=3, out_indices=list(range(blocks)))), images()
    features = network(x)
    image, outputs = by_rule(network, x)
    assert image.shape == (2, 3, 18, 21) and features.tokens.shape == (2, 42, 27) and features.grid == (6, 7)
    assert_close(network.image(features), image)
    assert torch.equal(network.image(features), network.body(x))
    assert len(features.maps) == blocks
    for found, expected in zip(features.maps, outputs):
        assert_close(found, expected)


def test_the_published_size_and_mean():
    network = DSCF()
    assert sum(p.numel() for p in network.parameters()) == 130_828
    assert network.image(network(torch.zeros(1, 3, 4, 5))).shape == (1, 3, 16, 20)
    assert torch.allclose(torch.tensor(network.mean), torch.tensor([114.444, 111.4605, 103.02])) and set(
        network.std
    ) == {1}


def test_every_convolution_is_a_site_and_layers_go_up():
    network = tiny_backbone(SMALL)
    convs = [path for path, m in network.body.named_modules() if isinstance(m, nn.Conv2d)]
    sites = network.sites()
    assert sorted(s.path for s in sites if s.role in ("patch", "conv")) == sorted(convs)
    assert len({s.key for s in sites}) == len(sites)
    assert [s.path for s in sites if s.role == "block"] == ["block_1", "block_2"]
    assert [network.layer_id(f"{n}.x") for n in ("conv_1", "block_1", "block_3", "conv_2", "upsampler")] == [
        0,
        1,
        3,
        4,
        4,
    ]
    assert {s.layer for s in sites if s.path.startswith("block_2")} == {1}


def test_weights_of_the_published_names(tmp_path):
    network, path = tiny_backbone(SMALL), tmp_path / "published.pth"
    plain = ("conv_cat", "upsampler")
    state = {
        k if k.startswith(plain) else k.replace(".weight", ".eval_conv.weight").replace(".bias", ".eval_conv.bias"): v
        for k, v in network.body.state_dict().items()
    }
    assert "block_1.c1_r.eval_conv.weight" in state
    torch.save(state, path)
    loaded = BACKBONES.build(SMALL | dict(weights=str(path)))
    assert loaded.weight_report.layout == "dscf" and loaded.weight_report.loaded == len(state)
    assert torch.equal(loaded.body(images()), network.body(images()))
    assert BACKBONES.build({"type": "DSCF", **loaded.arguments()}).arguments() == loaded.arguments()
    with pytest.raises(InputError, match="made for another architecture: it has also block_3"):
        BACKBONES.build(SMALL | dict(blocks=2, weights=str(path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(channels=0), "DSCF: channels must be a whole number of at least 1, got 0"),
        (dict(out_indices=[6]), r"out_indices must name blocks from 0 to 5 in order, got \[6\]"),
        (dict(out_indices=[2, 1]), "in order"),
        (dict(out_indices=[1, 1]), "in order"),
        (dict(weights="missing.pth"), "there is no file"),
    ],
)
def test_networks_that_make_no_sense(options, message):
    with pytest.raises(InputError, match=message):
        DSCF(**options)
    with pytest.raises(InputError, match=r"DSCF takes \(B, 3, H, W\) images, got \(1, 4, 8, 8\)"):
        DSCF()(torch.zeros(1, 4, 8, 8))


# ---- both ------------------------------------------------------------------------------------------------------------
def authors():
    """Rank 2 in the blocks, 8 behind them."""
    return dict(blocks=ConvLoRA(2, 4, ["block_*.c*"]), last=ConvLoRA(8, 16, ["conv_2*", "upsampler.0"]))


def test_ranks_of_the_authors_and_their_numbers():
    adapted = adapt(DSCF(), **authors())
    sizes = {name: sum(p.numel() for p in a.parameters()) for name, a in adapted.adapters.items()}
    assert sizes == dict(blocks=18 * 2 * 9 * 52, last=8 * 9 * (52 + 74))
    assert {p.scaling for p in adapted.pieces()} == {2.0}


@torch.no_grad()
def test_merged_it_is_the_plain_network_with_other_weights(tmp_path):
    network, x = tiny_backbone(SMALL), images()
    adapted = adapt(copy.deepcopy(network), a=ConvLoRA(2, targets=["patch", "conv"]))
    before = adapted.backbone.image(adapted(x))
    assert difference(before, network.body(x)) > 1e-2
    assert adapted.merge(check=x) == 3 * 3 + 4
    save_file(adapted.backbone.body.state_dict(), tmp_path / "merged.safetensors")
    assert_close(BACKBONES.build(SMALL | dict(weights=str(tmp_path / "merged.safetensors"))).body(x), before)


def test_distillation_brings_affinities_nearer_to_those_of_a_wider_teacher():
    config, x = SMALL | dict(out_indices=[0, 2]), images(8, 8)
    student = adapt(tiny_backbone(config), a=ConvLoRA(2, targets=["patch", "conv"]))
    with torch.no_grad():
        taught = tiny_backbone(config | dict(channels=7), seed=1)(x).maps
    loss, seen = LOSSES.build(dict(type="SpatialAffinity")), []
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], 5e-3)
    for _ in range(30):
        optimizer.zero_grad()
        seen.append(loss(student(x).maps, taught))
        seen[-1].backward()
        optimizer.step()
    assert seen[-1] < 0.9 * seen[0], seen


# ---- the loss --------------------------------------------------------------------------------------------------------
def test_affinity_is_its_equation():
    torch.manual_seed(0)
    student = [torch.randn(2, 3, 2, 3), torch.randn(2, 4, 1, 2)]
    teacher = [torch.randn(2, 5, 2, 3), torch.randn(2, 4, 1, 2)]

    def cosines(m):
        flat = m.flatten(2)
        return torch.stack([F.cosine_similarity(flat, flat[:, :, p, None], dim=1) for p in range(flat.shape[2])], 1)

    levels = [(cosines(t) - cosines(s)).abs().mean() for s, t in zip(student, teacher)]
    assert_close(SpatialAffinity()(student, teacher), (levels[0] + levels[1]) / 2)


def test_affinity_ignores_lengths_rotations_and_the_gradient_of_the_teacher():
    torch.manual_seed(0)
    teacher = torch.randn(2, 4, 3, 3, requires_grad=True)
    student = (teacher.detach() * torch.rand(2, 1, 3, 3)).requires_grad_()
    turn, _ = torch.linalg.qr(torch.randn(4, 4))
    loss = SpatialAffinity()
    assert loss([torch.einsum("dc,bchw->bdhw", turn, student)], [teacher]) < 1e-6
    other = torch.randn(2, 4, 3, 3, requires_grad=True)
    value = loss([other], [teacher])
    value.backward()
    assert value > 0.1 and other.grad.abs().sum() > 0 and teacher.grad is None


@pytest.mark.parametrize(
    ("student", "teacher"),
    [([], []), ([(1, 2, 3, 3)], []), ([(1, 2, 3, 3)], [(1, 2, 3, 4)]), ([(1, 2, 3, 3)], [(2, 2, 3, 3)])],
)
def test_affinity_needs_maps_of_equal_sizes(student, teacher):
    with pytest.raises(InputError, match="SpatialAffinity: the student has maps"):
        SpatialAffinity()([torch.zeros(s) for s in student], [torch.zeros(t) for t in teacher])


def test_affinities_stay_in_full_precision():
    maps = [torch.randn(1, 4, 5, 5)]
    with torch.autocast("cpu", torch.bfloat16):
        found = SpatialAffinity()(maps, [2 * maps[0] + 1])
    assert found.dtype == torch.float32 and torch.equal(found, SpatialAffinity()(maps, [2 * maps[0] + 1]))


def test_affinity_is_no_loss_of_class_scores():
    with pytest.raises(InputError, match="no loss of class scores"):
        SpatialAffinity()(torch.randn(2, 3), torch.tensor([0, 1]))
