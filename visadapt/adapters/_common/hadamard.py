"""The Walsh-Hadamard transform, for widths that need not be powers of two."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor, nn


def sylvester(order: int) -> Tensor:
    """(order, order) of +-1 in natural order; `order` is a power of two."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    return reduce(torch.kron, [two] * (order.bit_length() - 1), torch.ones(1, 1))


def _residues(q: int) -> Tensor:
    """Q (q, q) with Q[i, j] = 1 where i - j is a square modulo the prime q, -1 where it is none, 0 on the diagonal."""
    character = torch.full((q,), -1.0)
    character[torch.arange(q).square() % q] = 1.0
    character[0] = 0.0
    return character[(torch.arange(q)[:, None] - torch.arange(q)) % q]


def paley(order: int) -> Tensor | None:
    """A Hadamard matrix by Paley's first or second construction over a prime field; None where neither gives one."""
    for q, second in ((order - 1, False), (order // 2 - 1, True)):
        if order % 4 or q % 4 != (1 if second else 3) or any(q % n == 0 for n in range(2, math.isqrt(q) + 1)):
            continue
        core = torch.zeros(q + 1, q + 1)
        core[0, 1:], core[1:, 0], core[1:, 1:] = (1.0 if second else -1.0), 1.0, _residues(q)
        if not second:
            return core + torch.eye(q + 1)
        return torch.kron(core, sylvester(2)) + torch.kron(torch.eye(q + 1), torch.tensor([[1.0, -1.0], [-1.0, -1.0]]))
    return None


def hadamard_block(order: int) -> Tensor | None:
    """The smallest block K with order = K 2^k of which there is a Hadamard matrix here, (1, 1) for powers of two."""
    odd = order // (order & -order)
    if odd == 1:
        return torch.ones(1, 1)
    sizes = (odd << k for k in range(2, (order // odd).bit_length()))
    return next((block for size in sizes if (block := paley(size)) is not None), None)


class Hadamard(nn.Module):
    """x H for x (n, order) with H = block (K, K) (x) Sylvester's matrix of order 2^k, H H.T = order I.

    It is one product by `block` and two by Sylvester's matrices of about 2^(k / 2), which is faster than butterflies.
    """

    def __init__(self, block: Tensor, order: int) -> None:
        super().__init__()
        self.order = order
        power = (order // len(block)).bit_length() - 1
        for name, factor in zip("abc", (block, sylvester(1 << power // 2), sylvester(1 << (power - power // 2)))):
            self.register_buffer(name, factor, persistent=False)

    def forward(self, x: Tensor, transposed: bool = False) -> Tensor:
        """x H, or x H.T where `transposed`."""
        rows, left, y = len(x), self.order, x
        for factor in (self.a, self.b, self.c):
            if (size := len(factor)) == 1:
                continue
            factor, left = factor.T if transposed else factor, left // size
            if left == 1:  # one product instead of many with a vector
                y = y.reshape(rows, size) @ factor
            else:
                y = factor.T @ y.reshape(rows, size, left)
            rows *= size
        return y.reshape(x.shape)
