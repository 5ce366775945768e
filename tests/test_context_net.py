"""Networks that read an image beside a transformer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from visadapt.adapters._common import context_net
from visadapt.adapters._common.context_net import ConvNeXtPyramid, LinearPyramid, per_pixel
from visadapt.testing import assert_close, difference, noise


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_units_start_with_the_variance_of_the_authors():
    net = LinearPyramid(3, 256, 1)
    for conv, variance in (
        (net.stem.spatial, 2 / (9 * 256)),
        (net.stem.pointwise, 2 / 256),
        (net.stages[0].spatial, 2 / (9 * 256)),
    ):
        assert conv.weight.var().item() == pytest.approx(variance, rel=0.05)
    wide = LinearPyramid(1000, 4, 1).lift.spatial  # one output in each group
    assert wide.weight.var().item() == pytest.approx(2, rel=0.2)


def pyramid(in_chans, width=6, seed=0, **options):
    torch.manual_seed(seed)
    net = LinearPyramid(in_chans, width, 2, **options).double()
    noise(net, seed=seed)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.copy_(normal(*norm.running_mean.shape, seed=1))
        norm.running_var.copy_(normal(*norm.running_var.shape, seed=2).abs() + 0.5)
    return net


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("in_chans", "width"), [(1, 18), (3, 36), (1, 6), (3, 6), (5, 6)])
def test_units_at_full_resolution_are_one_rule(in_chans, width, training):
    """Output, gradients and running statistics are those of unit after unit, borders included."""
    net, image = pyramid(in_chans, width).train(training), normal(2, in_chans, 7, 12).requires_grad_()
    plain, same = copy.deepcopy(net), image.detach().clone().requires_grad_()
    x, rule = net._full_resolution(image)
    assert (rule is None) == (width < 9 * (in_chans + 1))
    first, second = x if rule is None else per_pixel(rule, x), plain.stem(plain.lift(same))
    assert_close(first, second)
    cotangent = normal(*first.shape, seed=3)
    learning = [*net.lift.parameters(), *net.stem.parameters(), image]
    gradients = torch.autograd.grad((first * cotangent).sum(), learning)
    expected = torch.autograd.grad(
        (second * cotangent).sum(), [*plain.lift.parameters(), *plain.stem.parameters(), same]
    )
    for one, other in zip(gradients, expected):
        assert_close(one, other, "gradient", 1e-9)
    for (name, one), other in zip(net.named_buffers(), plain.buffers()):
        assert_close(one.double(), other.double(), name)
    assert net.stem.norm2.num_batches_tracked == int(training)


def test_a_filter_that_sees_differences_of_neighbours_keeps_its_precision():
    """Covariances in single precision would miss by 4e-4, unit after unit misses by 4e-6."""
    rows, columns = torch.meshgrid(torch.arange(200.0), torch.arange(200.0), indexing="ij")
    image = ((rows + 2 * columns) / 200)[None, None] + 1e-2 * normal(1, 1, 200, 200, dtype=torch.float32)
    net = pyramid(1, width=2).float().train()
    with torch.no_grad():
        net.stem.spatial.weight.copy_(torch.tensor([[0.0, 0, 0], [1, -2, 1], [0, 0, 0]]).expand(2, 2, 3, 3))
    exact = copy.deepcopy(net).double()
    (found, _), expected = net._full_resolution(image), exact.stem(exact.lift(image.double()))
    assert difference(found.double(), expected) < 3e-5


@pytest.mark.parametrize(
    ("in_chans", "synchronised", "folds"), [(3, False, True), (16, False, True), (17, False, False), (3, True, False)]
)
def test_many_bands_and_norms_over_processes_go_unit_by_unit(monkeypatch, in_chans, synchronised, folds):
    calls = []
    monkeypatch.setattr(context_net, "as_one_rule", lambda *args: calls.append(args) or args[2:])
    net = LinearPyramid(in_chans, in_chans, 1).eval()
    if synchronised:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net._full_resolution(torch.zeros(1, in_chans, 4, 4))
    assert bool(calls) == folds


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("width", [6, 18], ids=["map", "patches"])
@pytest.mark.parametrize("size", [(13, 18), (16, 9)])
def test_maps_are_those_of_unit_after_unit(size, width, pool, training):
    """Maps, gradients and running statistics, for odd and even sides, though no map of full resolution is made."""
    net, image = pyramid(1, width, pool=pool).train(training), normal(2, 1, *size).requires_grad_()
    plain, same = copy.deepcopy(net), image.detach().clone().requires_grad_()
    found, expected = net(image), [plain.stem(plain.lift(same))]
    for stage in plain.stages:
        expected.append(stage(expected[-1]))
    expected[0] = nn.functional.adaptive_avg_pool2d(expected[0], expected[-1].shape[-2:])
    gradients = []
    for model, given, maps in ((net, image, found), (plain, same, expected)):
        loss = sum((m * normal(*m.shape, seed=n)).sum() for n, m in enumerate(maps))
        gradients.append(torch.autograd.grad(loss, [*model.parameters(), given]))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, "gradient", 1e-9)
    for (name, one), other in zip(net.named_buffers(), plain.buffers()):
        assert_close(one.double(), other.double(), name)


@pytest.mark.parametrize(("stem", "pool", "strides"), [(True, False, "ceil"), (False, False, "ceil"), (True, True, 0)])
def test_maps_of_the_pyramid(stem, pool, strides):
    net = LinearPyramid(3, 5, 3, stem, pool).eval()
    rows = [3, 11, 6, 3] if strides == "ceil" else [2, 10, 5, 2]  # the first map as means over the last one's places
    columns = [5, 17, 9, 5] if strides == "ceil" else [4, 17, 8, 4]
    assert [m.shape for m in net(torch.zeros(2, 3, 21, 34))] == [(2, 5, r, c) for r, c in zip(rows, columns)]
    assert (net.stem is None) != stem
    assert bool([*net.stages.parameters()]) != pool


def test_maps_of_the_convnext():
    image = torch.zeros(2, 4, 32, 48)
    maps = ConvNeXtPyramid(4, 6, 4)(image)
    assert [tuple(m.shape) for m in maps] == [(2, 6, 32 >> n, 48 >> n) for n in (1, 2, 3, 4)]
    torch.manual_seed(0)
    whole = ConvNeXtPyramid(4, 6, 2)
    last = ConvNeXtPyramid(4, 6, 2, only_last=True)
    last.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("norms.0")})
    (one,) = last(image + 1)
    assert torch.equal(one, whole(image + 1)[-1])
