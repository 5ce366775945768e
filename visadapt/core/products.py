"""Linear layers in float32 at the rate that a CPU has."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""Linears by oneDNN with something behind them; None where torch is built without it."""

PLAIN = Tensor, nn.Parameter  # sharded, quantised and fake tensors know F.linear

SMALL = 2**22
"""Multiplications below which calling oneDNN, 20 us, takes longer than it saves."""


def affine(x: Tensor, w: Tensor, b: Tensor | None = None, times: Tensor | None = None, plus: Tensor | None = None):
    """(x w^T + b) * times, or x w^T + b + plus. It has no gradient: for the inside of a `torch.autograd.Function`.

    In float32 on CPUs by oneDNN, which needs no pass of its own for what comes behind the product. Torch would ask MKL,
    and that leaves half of the width of AMD's vector units idle: 210 GFLOP/s where oneDNN has 390, for (1576, 384) and
    (384, 96) on two cores of an EPYC with AVX-512 (family 26).

    Args:
        x: (..., i).
        w: (o, i).
        b: (o,).
        times: (..., o), without `plus`.
        plus: (..., o), without `times`.

    Returns:
        (..., o); no view, so that it may be what a function returns.
    """
    flat, behind = as_matrix(x), times if plus is None else plus
    if behind is not None:
        behind = as_matrix(behind)
    if _by_onednn(flat, w, b, behind):
        flat, w, b = _dense(flat), _dense(w), None if b is None else b.contiguous()  # strides of b it does not look at
        if behind is None:
            y = ONEDNN.default(flat, w, b, "none", [], "")
        else:
            y = ONEDNN.binary(flat, behind.contiguous(), w, b, "mul" if plus is None else "add")
    elif plus is None:
        y = F.linear(flat, w, b)
        y = y if times is None else y.mul_(behind)
    else:
        y = torch.addmm(behind, flat, w.T) if b is None else torch.add(behind, b).addmm_(flat, w.T)
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], w.shape[0]))


def as_matrix(x: Tensor) -> Tensor:
    """(..., i) as (N, i)."""
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


class Linear(torch.autograd.Function):
    """x w^T + b by `affine`, and so are its gradients, of any order."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        for_x, for_w, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_w else None, w if for_x else None)
        return affine(x, w, b)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x, w), g = ctx.saved_tensors, as_matrix(grad)
        with torch.autocast(grad.device.type, enabled=False):
            by_x = None if w is None else linear(grad, w.T)
            by_w = None if x is None else _between(g, as_matrix(x))
        return by_x, by_w, g.sum(0) if ctx.needs_input_grad[2] else None


def _between(g: Tensor, x: Tensor) -> Tensor:
    """g^T x for g (N, o) and x (N, i). The first operand is copied if it is transposed, so the smaller one is that."""
    return linear(g.T, x.T) if g.shape[1] <= x.shape[1] else linear(x.T, g.T).T


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """`F.linear`, by oneDNN where `affine` uses it."""
    if not _by_onednn(x, w, b) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, w, b)
    return Linear.apply(x, w, b)


def bare(layer: nn.Module | None) -> bool:
    """Whether a layer is torch's own linear with nothing attached to it, so that its weight and bias say all."""
    if type(layer) is not nn.Linear or "forward" in layer.__dict__ or _has_any_global_hook():
        return False
    attached = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return not any(attached)


def through(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), but for rounding: of a bare linear by `linear`."""
    if torch.compiler.is_compiling() or not bare(layer):  # compiled, only a call sees an adapter that comes later
        return layer(x)
    return linear(x, layer.weight, layer.bias)


def _by_onednn(x: Tensor, w: Tensor, *others: Tensor | None) -> bool:
    if ONEDNN is None or not torch.backends.mkldnn.enabled or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:  # which know F.linear
        return False
    given = [t for t in (x, w, *others) if t is not None]
    plain = all(type(t) in PLAIN and t.device.type == "cpu" and t.dtype == torch.float32 for t in given)
    fits = x.shape[-1:] == w.shape[1:]  # else torch says so better
    return plain and fits and x.numel() * w.shape[0] >= SMALL


def _dense(x: Tensor) -> Tensor:
    """A matrix without gaps. On others, say some columns of a larger one, oneDNN may take a thousand times longer."""
    if x.is_contiguous() or x.T.is_contiguous():
        return x
    return x.T.contiguous().T if x.stride(0) == 1 else x.contiguous()
