"""Sparse updates of a linear layer: few entries of the weight, at little more than the cost of the frozen layer."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .products import affine, as_matrix

DENSEST = 1 / 16
"""Share of entries up to which the CPU computes the gradients of the entries alone. On weights of 768 x 768 and
3072 x 768 that takes 1/2 to 1/6 of the time of the whole gradient at a share of 1/50, and about as long at 1/8."""

with warnings.catch_warnings():  # torch says once per process that its compressed rows are new
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1), dtype=torch.float32, check_invariants=False)


class Entries(NamedTuple):
    """A matrix (o, i) that is zero but for some entries.

    Attributes:
        index: (k,) int64 places row * i + column, each once and in rising order.
        values: (k,) what stands there.
        columns: (c,) where the entries are whole columns: these, and `index` goes through them row by row.
    """

    index: Tensor
    values: Tensor
    columns: Tensor | None = None


def with_entries(weight: Tensor, rows: tuple[tuple[int, int], ...], scales, indices, values) -> Tensor:
    """A copy of weight (o, i) with scale * values added at the places of each slice of rows."""
    new = weight.clone()
    for (start, stop), scale, index, value in zip(rows, scales, indices, values):
        new[start:stop].view(-1).index_add_(0, index, value, alpha=scale)
    return new


def gradient_at(grad: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """Entries (k,) of grad.T @ x (o, i) at the places `index`, for grad (N, o) and x (N, i).

    On the CPU few entries are computed one by one; elsewhere, and where there are many, the whole product is faster.
    """
    o, i = grad.shape[1], x.shape[1]
    if x.device.type != "cpu" or len(index) > DENSEST * o * i:
        return (grad.T @ x).view(-1)[index]
    dtype = torch.promote_types(x.dtype, torch.float32)
    ends = torch.searchsorted(index, i * torch.arange(o + 1))
    zeros = torch.zeros(len(index), dtype=dtype)
    wanted = torch.sparse_csr_tensor(ends, index % i, zeros, (o, i), check_invariants=False)
    return torch.sparse.sampled_addmm(wanted, grad.T.to(dtype), x.to(dtype), beta=0).values()


class SparseLinear(torch.autograd.Function):
    """y = x (W + sum_i s_i S_i).T + b for a frozen W and sparse S_i.

    Forward is one matrix product with the changed weight. Backward gives gradients to the entries only. Of the layer
    nothing is stored but its input, and of that only the columns concerned where all S_i consist of whole columns.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, rows, scales, entries, *values: Tensor) -> Tensor:
        ctx.rows, ctx.scales, ctx.entries, ctx.shape = rows, scales, entries, x.shape
        ctx.by_columns = all(e.columns is not None for e in entries)
        kept = [x[..., e.columns] for e in entries] if ctx.by_columns else [x]
        ctx.save_for_backward(weight, *values, *kept)
        return affine(x, with_entries(weight, rows, scales, [e.index for e in entries], values), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        weight, *saved = ctx.saved_tensors
        count = len(ctx.entries)
        values, kept, flat = saved[:count], [as_matrix(x) for x in saved[count:]], as_matrix(grad)
        found = []
        for n, (entries, (start, stop), scale) in enumerate(zip(ctx.entries, ctx.rows, ctx.scales)):
            part = flat[:, start:stop]
            if ctx.by_columns:
                gradient = affine(kept[n].T, part.T).T.reshape(-1)
            else:
                gradient = gradient_at(part, kept[0], entries.index)
            found.append(gradient.mul_(scale).to(values[n].dtype))
        grad_x = None
        if ctx.needs_input_grad[0]:
            changed = with_entries(weight, ctx.rows, ctx.scales, [e.index for e in ctx.entries], values)
            grad_x = affine(flat, changed.T).view(ctx.shape)
        return grad_x, None, None, None, None, None, *found
