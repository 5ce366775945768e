"""Sums of p-Laplacian messages over the neighbours of every query, without a tensor of all differences."""

from __future__ import annotations

import math
from collections.abc import Iterator

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


def _slope(root: Tensor, d2: Tensor, fq: Tensor, fv: Tensor) -> tuple[Tensor, Tensor]:
    """For d = F_j - F_i: e sum_c d, and sqrt(A + e) |d|^2 + e sum_c d, half the slope of s by sqrt(A + e)."""
    shift = (EPS * fv.sum(-1))[..., None, :] - EPS * fq.sum(-1, keepdim=True)
    return shift, torch.addcmul(shift, root, d2)


def _square(root: Tensor, slope: Tensor, shift: Tensor, channels: int) -> Tensor:
    """s = ||sqrt(A + e) d + e||^2 = (A + e) |d|^2 + 2 e sqrt(A + e) sum_c d + c e^2."""
    s = (slope + shift).mul_(root).add_(channels * EPS**2)
    return s.clamp_min_(1e-7 * channels * EPS**2)  # rounding could take a sum near 0 below it


def _diagonal(x: Tensor) -> Tensor:
    """Entries of (N, q, k) where query and value are the same node, the queries being the last nodes."""
    return x.diagonal(x.shape[2] - x.shape[1], 1, 2)


class LaplacianSums(torch.autograd.Function):
    """sum_j Abar_ij [F_j, 1] with Abar_ij = A_ij ||sqrt(A_ij + e) (F_j - F_i) + e||^(p - 2), (N, q, c + 1).

    Distances come from differences: as a product of matrices, those of near nodes would be lost to rounding. They are
    kept for backward, one value per entry of A, whatever c is. Of a node and itself the difference is the constant
    zero: its huge gradients would cancel, and take all others with them.

    Args:
        probs: A (N, q, k), at least 0.
        fq: features F_i of the queries (N, q, c).
        fv: features F_j of the values (N, k, c).
        p: scalar.
        own: the queries are the last q of the values.
        loops: messages of a node to itself count; with `own` only.
    """

    @staticmethod
    def forward(ctx, probs: Tensor, fq: Tensor, fv: Tensor, p: Tensor, own: bool, loops: bool) -> Tensor:
        step, sums, distances = _step(probs), [], []
        for a, i, j in _blocks(step, probs, fq, fv):
            d2 = torch.cdist(i, j, compute_mode="donot_use_mm_for_euclid_dist").square_()
            root = (a + EPS).sqrt_()
            shift, slope = _slope(root, d2, i, j)
            weights = _square(root, slope, shift, j.shape[-1]).log2_().mul_(p / 2 - 1).exp2_().mul_(a)
            if own and not loops:
                _diagonal(weights).zero_()
            sums.append(_product(weights, _with_ones(j)))
            distances.append(d2)
        ctx.save_for_backward(probs, fq, fv, p, *distances)
        ctx.own, ctx.loops, ctx.step = own, loops, step
        return torch.cat(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        probs, fq, fv, p, *distances = ctx.saved_tensors
        by_probs = torch.empty_like(probs)
        blocks = zip(_blocks(ctx.step, grad, probs, fq, fv, by_probs), distances)
        with torch.autocast(grad.device.type, enabled=False):
            by_fq, by_fv, by_p = zip(*(_gradients(*block, d2, p, ctx.own, ctx.loops) for block, d2 in blocks))
        return by_probs, torch.cat(by_fq), torch.cat(by_fv), torch.stack(by_p).sum(), None, None


def _gradients(
    grad: Tensor, a: Tensor, fq: Tensor, fv: Tensor, by_a: Tensor, d2: Tensor, p: Tensor, own: bool, loops: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by F_i, F_j and p of one block; that by A goes to `by_a`."""
    ones_q, ones_v = _with_ones(fq), _with_ones(fv)
    root = (a + EPS).sqrt_()
    shift, slope = _slope(root, d2, fq, fv)
    s = _square(root, slope, shift, fv.shape[-1])
    log = s.log2()
    g = (log * (p / 2 - 1)).exp2_()
    if own and not loops:
        _diagonal(g).zero_()
    weights, by_weight = g * a, grad @ ones_v.mT
    by_fv = _product(weights.mT, grad[..., :-1])
    by_log = weights.mul_(by_weight)
    by_p = torch.dot(by_log.flatten(), log.flatten()) * (math.log(2) / 2)
    by_s = by_log.mul_(p / 2 - 1).div_(s)
    if own:
        _diagonal(by_s).zero_()
    torch.addcmul(g.mul_(by_weight), by_s, slope.div_(root), out=by_a)
    by_s.mul_(root)
    even_q, even_v = by_s.sum(-1)[..., None], by_s.sum(-2)[..., None]  # alike in all channels
    # The sign is 0 for equal nodes, between which the products would be huge terms of both signs.
    pull = by_s.mul_(root).mul_(d2.sign())
    to_q, to_v = _product(pull, ones_v), _product(pull.mT, ones_q)
    by_fq = 2 * (fq * to_q[..., -1:] - to_q[..., :-1] - EPS * even_q)
    by_fv = by_fv + 2 * (fv * to_v[..., -1:] - to_v[..., :-1] + EPS * even_v)
    return by_fq, by_fv, by_p
