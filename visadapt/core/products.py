"""Linear layers in float32 at the rate that a CPU has."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""What torch.compile makes of linears on CPUs; None where torch is built without oneDNN."""


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
    rows, behind = x.reshape(-1, x.shape[-1]), times if plus is None else plus
    if behind is not None:
        behind = behind.reshape(len(rows), len(w))
    if not _by_onednn(rows, w):
        y = F.linear(rows, w, b)
        if behind is not None:
            y = y.mul_(behind) if plus is None else y.add_(behind)
    else:
        rows, w, b = _dense(rows), _dense(w), None if b is None else b.contiguous()  # strides of b it does not look at
        if behind is None:
            y = ONEDNN(rows, w, b, "none", [], "")
        else:
            y = ONEDNN.binary(rows, behind.contiguous(), w, b, "mul" if plus is None else "add")
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], len(w)))


class Linear(torch.autograd.Function):
    """x w^T + b by `affine`, and so are its gradients, of any order."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        for_x, for_w, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_w else None, w if for_x else None)
        return affine(x, w, b)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, w = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        with torch.autocast(grad.device.type, enabled=False):
            by_x = None if w is None else linear(grad, w.T)
            by_w = None if x is None else linear(rows.T, x.reshape(-1, x.shape[-1]).T)
        return by_x, by_w, rows.sum(0) if ctx.needs_input_grad[2] else None


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """`F.linear`, by oneDNN where `affine` uses it."""
    if torch.is_autocast_enabled(x.device.type) or not _by_onednn(x, w):
        return F.linear(x, w, b)
    return Linear.apply(x, w, b)


def _by_onednn(x: Tensor, w: Tensor) -> bool:
    if ONEDNN is None or torch.compiler.is_compiling() or not torch.backends.mkldnn.enabled:
        return False
    plain = {type(x), type(w)} <= {Tensor, nn.Parameter}  # sharded, quantised and fake tensors know F.linear
    return plain and x.device.type == "cpu" and x.dtype == w.dtype == torch.float32 and x.numel() * w.numel() > 0


def _dense(x: Tensor) -> Tensor:
    """A matrix without gaps. On others, say some columns of a larger one, oneDNN may take a thousand times longer."""
    return x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous()
