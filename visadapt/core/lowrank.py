"""Low-rank updates of a linear layer at the cost of the frozen layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .products import affine, as_matrix

Rows = tuple[int, int]


def merged_weight(weight: Tensor, rows: tuple[Rows, ...], scales: tuple[float, ...], *factors: Tensor) -> Tensor:
    """weight (o, i) with scale * B @ A added to each slice of rows; `factors` are A1 (r, i), B1 (rows, r), A2, B2, …"""
    merged = weight.clone()
    for (start, stop), scale, a, b in zip(rows, scales, factors[0::2], factors[1::2]):
        merged[start:stop].addmm_(b, a, alpha=scale)
    return merged


def worth_factoring(weight: Tensor, low_rank: list[tuple[Tensor, Tensor, float]]) -> bool:
    """True if the backward pass through the factors A (r, i), B (o, r) costs less than the gradient of the weight."""
    return 2 * sum(a.numel() + b.numel() for a, b, _ in low_rank) <= weight.numel()


class LowRankLinear(torch.autograd.Function):
    """y = x (W + sum_i s_i B_i A_i).T + b for a frozen W.

    Forward is one matrix product with the merged weight. Backward goes through the factors only, so that the (o, i)
    gradient of the merged weight is never formed; of the layer nothing is stored but its input.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, rows, scales, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, *factors)
        ctx.rows, ctx.scales = rows, scales
        return affine(x, merged_weight(weight, rows, scales, *factors), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, *factors = ctx.saved_tensors
        flat_x, flat_g = as_matrix(x), as_matrix(grad)
        # Skinny products are laid out rank-first: with (r, N) factors the CPU libraries run them 2 to 4 times faster.
        # Slices of one layer share its input, so their A factors go through it together.
        downs, ups = factors[0::2], factors[1::2]
        ranks = [a.shape[0] for a in downs]
        slices = [flat_g[:, start:stop] for start, stop in ctx.rows]
        thin_x = affine(downs[0] if len(downs) == 1 else torch.cat(downs), flat_x).split(ranks)  # A x
        thin_g = [affine((s * b).T.contiguous(), g) for s, b, g in zip(ctx.scales, ups, slices)]  # s B.T g
        grads_a = affine(thin_g[0] if len(thin_g) == 1 else torch.cat(thin_g), flat_x.T).split(ranks)
        grads_b = [affine(t, g.T).T.mul_(s) for s, t, g in zip(ctx.scales, thin_x, slices)]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = affine(flat_g, merged_weight(weight, ctx.rows, ctx.scales, *factors).T).view_as(x)
        pairs = [g for pair in zip(grads_a, grads_b) for g in pair]
        return grad_x, None, None, None, None, *pairs
