"""Products by oneDNN against the formula in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small import Ops
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from visadapt.benchmark.flops import flops
from visadapt.core import products
from visadapt.core.lowrank import LowRankLinear
from visadapt.core.products import ONEDNN, affine, linear, through
from visadapt.testing import assert_close

IN, OUT = 24, 10
EXACT = 1e-5  # of float32


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def enabled(request, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", request.param)
    return request.param


def operands(*leading):
    torch.manual_seed(0)
    shapes = dict(x=(*leading, IN), w=(OUT, IN), b=(OUT,), times=(*leading, OUT), plus=(*leading, OUT))
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def formula(x, w, b=0, times=1, plus=0):
    return (x @ w.T + b) * times + plus


def single(tensors, names):
    return {name: tensors[name].float() for name in ("x", "w", *names)}


@pytest.mark.parametrize("names", [(), ("b",), ("times",), ("plus",), ("b", "times"), ("b", "plus")], ids="-".join)
@pytest.mark.parametrize("leading", [(7,), (1,), (2, 5), (2, 3, 4), (), (0,), (3, 0)], ids=str)
def test_formula(leading, names, enabled):
    given = single(operands(*leading), names)
    with torch.no_grad():
        y = affine(**given)
    assert y.dtype == torch.float32 and not y._is_view()
    assert_close(y.double(), formula(**{name: t.double() for name, t in given.items()}), tolerance=EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_onednn_is_asked_for_float32_unless_it_is_switched_off(enabled, dtype):
    given = {name: t.to(dtype) for name, t in operands(7).items() if name != "plus"}
    with Ops() as ops:
        affine(**given)
    assert len(ops.onednn) == (ONEDNN is not None and enabled and dtype == torch.float32)


@pytest.mark.parametrize("larger", [True, False])
def test_small_products_are_left_to_torch(larger, monkeypatch):
    """Calling oneDNN takes ten times as long as torch needs for one token of a small network."""
    given = single(operands(7), ("b",))
    monkeypatch.setattr(products, "SMALL", 7 * IN * OUT + (not larger))
    with Ops() as ops:
        affine(**given), linear(**given)
    assert len(ops.onednn) == 2 * (ONEDNN is not None and larger)


def doubled(module, args, y):
    return 2 * y


def linear_layer(kind):
    """A linear that is not torch's own, or has something attached to it."""
    layer = nn.modules.linear.NonDynamicallyQuantizableLinear(IN, OUT) if kind == "class" else nn.Linear(IN, OUT)
    if kind == "forward":
        layer.forward = lambda x: x.square()
    elif kind == "hook":
        layer.register_forward_hook(doubled)
    elif kind == "pre-hook":
        layer.register_forward_pre_hook(lambda module, args: 2 * args[0])
    elif kind == "backward hook":
        layer.register_full_backward_hook(lambda module, by_x, by_y: (2 * by_x[0],))
    elif kind == "backward pre-hook":
        layer.register_full_backward_pre_hook(lambda module, by_y: (2 * by_y[0],))
    return layer


@pytest.mark.parametrize("kind", ["bare", "class", "forward", "hook", "pre-hook", "backward hook", "backward pre-hook"])
def test_what_is_attached_to_a_layer_takes_part(kind):
    layer, x = linear_layer(kind), torch.randn(3, 5, IN, requires_grad=True)
    leaves = [x] if kind == "forward" else [x, *layer.parameters()]
    with Ops() as ops:
        y = through(layer, x)
    assert len(ops.onednn) == (ONEDNN is not None and kind == "bare")
    cotangent = torch.randn_like(y)
    assert_close(y, layer(x), tolerance=EXACT)
    for one, other in zip(*(torch.autograd.grad(f, leaves, cotangent) for f in (y, layer(x))), strict=True):
        assert_close(one, other, tolerance=EXACT)


def test_hooks_on_all_modules_take_part():
    layer, x = nn.Linear(IN, OUT), torch.randn(3, 5, IN)
    wanted = 2 * layer(x)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: 2 * y)
    try:
        assert_close(through(layer, x), wanted)
    finally:
        handle.remove()


@pytest.mark.parametrize("product", [affine, linear])
def test_widths_that_do_not_fit_are_told_by_torch(product):
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied \(3x7 and 24x10\)"):
        product(torch.randn(3, 7), torch.randn(OUT, IN))


def test_tensors_of_other_kinds_are_left_to_torch():
    with FakeTensorMode():
        assert affine(torch.randn(5, IN), torch.randn(OUT, IN), times=torch.randn(5, OUT)).shape == (5, OUT)


@pytest.mark.parametrize("names", [(), ("times",), ("plus",)], ids="-".join)
def test_flops_are_counted(names):
    given = single(operands(2, 5), names)
    assert flops(lambda: affine(**given)) == 2 * 10 * IN * OUT


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "columns": lambda x: torch.cat([x, x], -1)[:, : x.shape[-1]],
    "every second": lambda x: torch.stack([x, x], -1)[..., 0],
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((n, layout) for n in ("x", "w", "times", "plus") for layout in LAYOUTS), ("b", "every second")],
)
def test_layouts(name, layout):
    """What has gaps is copied: oneDNN may take a thousand times longer for matrices, and reads a bias as if without."""
    given = single(operands(7), () if name in ("x", "w") else (name,))
    wanted = formula(**{key: t.double() for key, t in given.items()})
    given[name] = LAYOUTS[layout](given[name])
    assert not given[name].is_contiguous()
    with Ops() as ops:
        assert_close(affine(**given).double(), wanted, tolerance=EXACT)
    assert len(ops.onednn) == (ONEDNN is not None)
    assert all(x.is_contiguous() or x.mT.is_contiguous() for tensors in ops.onednn for x in tensors)


def second_order(product, dtype):
    """Output, gradients and gradients of gradients."""
    leaves = [t.to(dtype).div(2).requires_grad_() for name, t in operands(2, 5).items() if name in ("x", "w", "b")]
    y = product(*leaves)
    first = torch.autograd.grad(y.square().sum() / 10, leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first) / 10, leaves)
    return [t.double() for t in (y, *first, *second)]


def test_gradients_of_gradients(enabled):
    for single, exact in zip(second_order(linear, torch.float32), second_order(F.linear, torch.float64), strict=True):
        assert_close(single, exact, tolerance=EXACT)


@pytest.mark.parametrize("trains", [("x",), ("w",), ("b",), ("x", "w", "b")], ids="-".join)
def test_gradients_in_float32(trains, enabled):
    given = {name: t for name, t in operands(2, 5).items() if name in ("x", "w", "b")}
    found = []
    for dtype, product in ((torch.float32, linear), (torch.float64, F.linear)):
        leaves = {name: t.to(dtype).requires_grad_(name in trains) for name, t in given.items()}
        with Ops() as ops:
            y = product(*leaves.values())
            gradients = torch.autograd.grad(y.square().sum() / 100, [leaves[name] for name in trains])
        by_onednn = ONEDNN is not None and enabled and dtype == torch.float32
        assert len(ops.onednn) == by_onednn * (1 + ("x" in trains) + ("w" in trains))
        found.append([y, *gradients])
    for single, exact in zip(*found, strict=True):
        assert_close(single.double(), exact, tolerance=EXACT)


def test_autocast_is_followed_forward_and_switched_off_backward(enabled):
    given = single(operands(7), ("b",))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*given.values()).dtype == torch.bfloat16
    x = given["x"].requires_grad_()
    y, cotangent = linear(x, given["w"]), torch.randn(7, OUT)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(y, x, cotangent)
    if enabled:
        assert_close(found.double(), cotangent.double() @ given["w"].double(), tolerance=EXACT)


def test_transforms_of_functions_run():
    x, w = single(operands(3), ()).values()
    with Ops() as ops:
        assert_close(torch.vmap(lambda v: affine(v[None], w))(x)[:, 0], x @ w.T)
    assert not ops.onednn
    wanted = w.expand(3, OUT, IN)
    assert_close(torch.vmap(torch.func.jacrev(lambda v: linear(v, w)))(x), wanted)
    assert_close(torch.vmap(torch.func.jacfwd(lambda v: linear(v, w)))(x), wanted)
    assert_close(torch.func.jvp(lambda v: linear(v, w), (x,), (x,))[1], x @ w.T)
    with forward_ad.dual_level():
        assert_close(forward_ad.unpack_dual(linear(forward_ad.make_dual(x, x), w)).tangent, x @ w.T)
    x.requires_grad_()
    (found,) = torch.autograd.grad(linear(x, w).sum(0), x, torch.eye(OUT), is_grads_batched=True)
    assert_close(found, w[:, None].expand(OUT, 3, IN))


def test_shapes_without_values():
    assert linear(torch.zeros(3, 5, IN, device="meta"), torch.zeros(OUT, IN, device="meta")).shape == (3, 5, OUT)


def test_traces_are_saved(tmp_path):
    x, w = single(operands(3), ()).values()
    torch.jit.trace(lambda v: linear(v, w), x).save(str(tmp_path / "traced.pt"))
    assert_close(torch.jit.load(tmp_path / "traced.pt")(x), x @ w.T)


@pytest.mark.parametrize("batch", [3, 0])
def test_updates_of_slices_train_the_same_with_and_without(batch, enabled):
    torch.manual_seed(0)
    rows, scales = ((0, 16), (16, 48)), (0.5, -2.0)
    x, w, b = torch.randn(batch, 20, IN, requires_grad=True), torch.randn(48, IN), torch.randn(48)
    factors = [torch.randn(s, requires_grad=True) for s in ((4, IN), (16, 4), (4, IN), (32, 4))]
    leaves = [x, *factors]
    plain = [t.detach().double().requires_grad_() for t in leaves]
    y = plain[0] @ w.double().T + b
    y = y + torch.cat([s * plain[0] @ down.T @ up.T for s, down, up in zip(scales, plain[1::2], plain[2::2])], -1)
    cotangent = torch.randn(y.shape)
    found = torch.autograd.grad(LowRankLinear.apply(x, w, b, rows, scales, *factors), leaves, cotangent)
    for one, other in zip(found, torch.autograd.grad(y, plain, cotangent.double()), strict=True):
        assert_close(one.double(), other, "gradient", EXACT)
