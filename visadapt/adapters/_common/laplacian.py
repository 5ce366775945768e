"""Sums of p-Laplacian messages over the neighbours of every query, without a tensor of all differences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-8
"""e of the weights: added to the attention and to every component of the scaled differences."""

BLOCK = {"cpu": 2**17}
"""Entries of the attention that a thread works on at once, by kind of device: what stays in a core's cache."""

BLOCK_ELSEWHERE = 2**26
"""The same on other devices, where it bounds the memory."""


def _step(probs: Tensor) -> int | None:
    """Rows of A (N, q, k) per block; None for all of them, where N is a symbol."""
    if torch.compiler.is_compiling():
        return None
    kind = probs.device.type
    block = BLOCK[kind] * torch.get_num_threads() if kind in BLOCK else BLOCK_ELSEWHERE
    return max(1, block // max(1, probs.shape[1] * probs.shape[2]))


def _blocks(step: int | None, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors (N, ...) in blocks of rows."""
    return iter([tensors]) if step is None else zip(*(x.split(step) for x in tensors))


def _with_ones(x: Tensor) -> Tensor:
    """(N, n, c) to (N, n, c + 1): a product with it gives the row sums in the last column."""
    return F.pad(x, (0, 1), value=1.0)


def _product(a: Tensor, x: Tensor) -> Tensor:
    """a @ x; with the few columns of x as rows, the CPU libraries are three times faster."""
    return (x.mT @ a.mT).mT


def _shifts(f: Tensor) -> Tensor:
    """What e adds to the squares through every node, 2 e sum_c F, (N, n)."""
    return f.sum(-1).mul_(2 * EPS)


def _squares(a: Tensor, d2: Tensor, shift_q: Tensor, shift_v: Tensor, channels: int) -> tuple[Tensor, ...]:
    """s = ||r d + e||^2 = r (r |d|^2 + 2 e sum_c d) + c e^2 for d = F_j - F_i, with r = sqrt(A + e), and its parts.

    Returns:
        s, r, and the second term of the bracket.
    """
    root = (a + EPS).sqrt_()
    shift = shift_v[:, None] - shift_q[..., None]
    inner = torch.addcmul(shift, root, d2)
    s = torch.addcmul(inner.new_full((), channels * EPS**2), inner, root)
    return s.clamp_min_(1e-7 * channels * EPS**2), root, shift  # rounding could take a sum near 0 below it


def _diagonal(x: Tensor) -> Tensor:
    """Entries of (N, q, k) where query and value are the same node, the queries being the last nodes."""
    return x.diagonal(x.shape[2] - x.shape[1], 1, 2)


class LaplacianSums(torch.autograd.Function):
    """sum_j Abar_ij [F_j, 1] with Abar_ij = A_ij ||sqrt(A_ij + e) (F_j - F_i) + e||^(p - 2), (N, q, c + 1).

    Distances come from differences: as a product of matrices, those of near nodes would be lost to rounding. They are
    kept for backward, one value per entry of A, whatever c is. Of a node and itself the difference is the constant
    zero: its huge gradients would cancel, and take all others with them.

    Args:
        given: A (N, q, k), at least 0; with x scores whose softmax A is.
        fq: features F_i of the queries (N, q, c).
        fv: features F_j of the values (N, k, c).
        p: scalar.
        own: the queries are the last q of the values.
        loops: messages of a node to itself count; with `own` only.
        x: (N, k, d) or None. Where it is given, A x comes with the sums, in the dtype of x: softmax, sums and products
            of a block find A in the cache, forward and backward.
    """

    @staticmethod
    def forward(
        ctx, given: Tensor, fq: Tensor, fv: Tensor, p: Tensor, own: bool, loops: bool, x: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        step, sums, attended, probs, distances, power = _step(given), [], [], [], [], p / 2 - 1
        attends = repeat(None) if x is None else _blocks(step, x)
        blocks = _blocks(step, given, fq, fv, _shifts(fq), _shifts(fv), _with_ones(fv))
        for (a, i, j, *shifts, ones), values in zip(blocks, attends):
            if values is not None:
                a = a.softmax(-1)
                attended.append(a.to(x.dtype) @ values[0])
            d2 = torch.cdist(i, j, compute_mode="donot_use_mm_for_euclid_dist").square_()
            s, *_ = _squares(a, d2, *shifts, j.shape[-1])
            weights = s.log2_().mul_(power).exp2_().mul_(a)
            if own and not loops:
                _diagonal(weights).zero_()
            sums.append(_product(weights, ones))
            probs.append(a)
            distances.append(d2)
        ctx.save_for_backward(fq, fv, p, x, *probs, *distances)
        ctx.own, ctx.loops, ctx.step = own, loops, step
        return torch.cat(sums) if x is None else (torch.cat(sums), torch.cat(attended))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_x: Tensor | None = None):
        fq, fv, p, x, *saved = ctx.saved_tensors
        count, power = len(saved) // 2, p / 2 - 1
        by_given, by_x, found = fq.new_empty(*fq.shape[:2], fv.shape[1]), [], []
        ones_q, ones_v = _with_ones(fq), _with_ones(fv)
        blocks = _blocks(ctx.step, by_given, grad, ones_q, ones_v, _shifts(fq), _shifts(fv))
        attends = repeat(None) if x is None else _blocks(ctx.step, grad_x, x)
        with torch.autocast(grad.device.type, enabled=False):
            for (by_a, *block), a, d2, product in zip(blocks, saved[:count], saved[count:], attends):
                found.append(_gradients(by_a, a, d2, *block, power, ctx.own, ctx.loops))
                if product is None:
                    continue
                by_attended, values = product
                if ctx.needs_input_grad[0]:
                    by_a.baddbmm_(by_attended.to(a.dtype), values.to(a.dtype).mT)
                    by_a.mul_(a).addcmul_(a, by_a.sum(-1, keepdim=True), value=-1)  # softmax
                if ctx.needs_input_grad[6]:
                    by_x.append(a.to(x.dtype).mT @ by_attended)
        sent, to_q, to_v, even_q, even_v, by_power = map(torch.cat, zip(*found))
        by_fq = 2 * (fq * to_q[..., -1:] - to_q[..., :-1] - EPS * even_q[..., None])
        by_fv = sent + 2 * (fv * to_v[..., -1:] - to_v[..., :-1] + EPS * even_v[..., None])
        by_p = by_power.sum() * (math.log(2) / 2)
        return by_given, by_fq, by_fv, by_p, None, None, torch.cat(by_x) if by_x else None


def _gradients(
    by_a: Tensor,
    a: Tensor,
    d2: Tensor,
    grad: Tensor,
    ones_q: Tensor,
    ones_v: Tensor,
    shift_q: Tensor,
    shift_v: Tensor,
    power: Tensor,
    own: bool,
    loops: bool,
) -> tuple[Tensor, ...]:
    """Of one block; what goes to A is written to `by_a`.

    Returns:
        What goes to F_j past the weights (N, k, c); sums of the pull of the distances, with the nodes at the other end
        and without, (N, q, c + 1) and (N, k, c + 1); what goes alike to all channels of F_i and F_j, (N, q) and
        (N, k); and to the power, by base 2, (1,).
    """
    s, root, shift = _squares(a, d2, shift_q, shift_v, ones_v.shape[-1] - 1)
    log = s.log2()
    g = (log * power).exp2_()
    if own and not loops:
        _diagonal(g).zero_()
    weights, by_weight = g * a, grad @ ones_v.mT
    sent = _product(weights.mT, grad[..., :-1])
    by_log = weights.mul_(by_weight)
    by_power = torch.dot(by_log.flatten(), log.flatten())
    by_s = by_log.mul_(power).div_(s)
    if own:
        _diagonal(by_s).zero_()
    torch.addcmul(g.mul_(by_weight), by_s, torch.addcdiv(d2, shift, root, value=0.5), out=by_a)
    by_s.mul_(root)
    even_q, even_v = by_s.sum(-1), by_s.sum(-2)
    # Nothing between equal nodes, where the products would be huge terms of both signs.
    pull = torch.ops.aten.threshold_backward(by_s.mul_(root), d2, 0)
    return sent, _product(pull, ones_v), _product(pull.mT, ones_q), even_q, even_v, by_power[None]
