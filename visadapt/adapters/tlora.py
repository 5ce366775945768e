"""A learned dense transform of the weight in tensor-ring form, and a low-rank residual."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.kinds import WeightMap
from ..core.sites import CONVS, LINEARS, Site
from ..errors import InputError
from ..registry import ADAPTERS
from ._common.low_rank import factor_pair, require_rank

NOISE = 1e-3
"""Standard deviation of the slots that start away from zero."""

SLOWER = 3
"""Time of a multiplication in two products over that in one with T, on CPUs: they move q^2 times as many values."""


def factorise(width: int, count: int) -> tuple[int, ...] | None:
    """`count` whole numbers above 1, in rising order, with this product and the smallest sum; None where none have it.

    Of equal sums the one with the smaller first numbers counts.
    """
    found, waiting = [], [((), width)]
    while waiting:
        head, rest = waiting.pop()
        left = count - len(head)
        if left == 1:
            found.append((*head, rest))
            continue
        low, high = max([2, *head]), math.floor(rest ** (1 / left) + 1e-9)
        waiting += [((*head, n), rest // n) for n in range(low, high + 1) if rest % n == 0]
    return min(found, key=lambda numbers: (sum(numbers), numbers), default=None)


def merged(cores: Sequence[Tensor]) -> Tensor:
    """One core (q, I, I, q) in place of neighbours (q, I_k, I_k, q), with I the product of the I_k."""
    whole = cores[0]
    for core in cores[1:]:
        size = whole.shape[1] * core.shape[1]
        whole = torch.einsum("aijb,bklc->aikjlc", whole, core).reshape(len(core), size, size, -1)
    return whole


class TLoRASite(WeightMap):
    """w' = w T + s B A with T[i, j] = trace(G_1[:, i_1, j_1, :] ... G_d[:, i_d, j_d, :]).

    `cores` are the G_k (q, I_k, I_k, q), `a` (r, i) and `b` (o, r).

    At the start the slots (0, 0) hold the identity. With them alone T = I, and no other slot would ever get a gradient;
    so there is noise in all others of the first core, and in those of the next ones that do not lead back to 0 (second
    index not 0). The last core has none: a ring must begin and end in 0, none through noise does, and T is I exactly.
    """

    recompute = True

    def __init__(
        self, site: Site, shape: tuple[int, int], sizes: tuple[int, ...], ring: int, rank: int, scaling: float
    ) -> None:
        super().__init__(site)
        require_rank("TLoRA", rank, site, shape)
        self.scaling = scaling
        self.cut = min(range(1, len(sizes)), key=lambda n: math.prod(sizes[:n]) + math.prod(sizes[n:]))
        self.cores = nn.ParameterList(torch.zeros(ring, size, size, ring) for size in sizes)
        first, *middle, _ = self.cores
        for slots in (first, *(core[..., 1:] for core in middle)):
            nn.init.normal_(slots, std=NOISE)
        for core in self.cores:
            nn.init.eye_(core[0, :, :, 0])
        self.a, self.b = factor_pair(rank, shape[1], shape[0])

    def transformed(self, w: Tensor) -> Tensor:
        """w T for w (n, i): in two products, or with T where that is faster."""
        cores = list(self.cores)
        g, h = merged(cores[: self.cut]), merged(cores[self.cut :])
        ring, left, right = len(g), g.shape[1], h.shape[1]
        if SLOWER * ring**2 * (left + right) >= left * right:
            return w @ torch.einsum("aijb,bkla->ikjl", g, h).reshape(left * right, -1)
        y = w.reshape(-1, right) @ h.permute(1, 3, 0, 2).reshape(right, -1)  # (n i1, i2) to (n i1, a b j2)
        y = y.view(len(w), -1, right).transpose(1, 2).reshape(len(w) * right, -1)  # (n j2, i1 a b)
        y = y @ g.permute(1, 0, 3, 2).reshape(-1, left)
        return y.view(len(w), right, left).transpose(1, 2).reshape(w.shape)

    def map(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        w = w.to(self.a.dtype)
        with torch.autocast(w.device.type, enabled=False):
            new = torch.addmm(self.transformed(w.flatten(1)), self.b, self.a, alpha=self.scaling)
        return new.view(w.shape), b


@ADAPTERS.register_module()
class TLoRA(Adapter):
    """W' = W T + s B A: a trained dense transform T (i, i) of the inputs and a residual of rank r.

    T is a tensor-ring matrix: with i = I_1 ... I_d its entry at (i_1 ... i_d), (j_1 ... j_d) is the trace of the
    product of the cores' slices G_k[:, i_k, j_k, :], of size q x q. There are q^2 (I_1^2 + ... + I_d^2) + r (i + o)
    values per site, 1,088 + r (i + o) for i = 768 = 8 x 8 x 12 and q = 2. DoRA is the case of a diagonal transform of
    the outputs.

    Only the form W' = transform(W) + residual with both parametrised by tensor decompositions is published in what we
    have. Our design is all the rest: T acts on the inputs; d = 3 sizes with the smallest sum; the residual is B A with
    s = alpha / rank, A Kaiming-uniform and B zero; T starts at the identity, with noise of 1e-3 in slots of the ring
    that do not close yet, so that a fresh adapter changes nothing and all cores learn. Convolutions are taken as
    (o, i kh kw). Neighbouring cores are merged until two are left, which change the weight in two products, without T
    where that is faster; the backward pass makes them once more, so that nothing of their size is kept per site.

    Weight decay would pull T to 0 instead of I: leave it at 0.

    Args:
        rank: r of the residual.
        ring: q, rank of the ring.
        cores: d.
        alpha: numerator of s; the rank where None.
        targets: roles of linears and convolutions.
        layers: block indices.
    """

    kinds = ("weight",)
    targets = ("all-linear",)
    roles = (*LINEARS, *CONVS)
    paper = "Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications to Text-to-image Models"
    mergeable = True

    def __init__(
        self,
        rank: int = 4,
        ring: int = 2,
        cores: int = 3,
        alpha: float | None = None,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(rank=rank, ring=ring)
        self.require_strength(alpha=alpha)
        if cores not in (2, 3, 4):
            raise InputError(f"TLoRA: cores is 2, 3 or 4, got {cores!r}")
        self.rank, self.ring, self.cores, self.alpha = rank, ring, cores, alpha

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> TLoRASite:
        shape = tuple(self.weight(site, backbone).shape)
        if (sizes := factorise(shape[1], self.cores)) is None:
            raise InputError(
                f"TLoRA: the {shape[1]} weights per output of {site.key} are no product of {self.cores} numbers above "
                "1; lower cores, or choose other targets"
            )
        scaling = (self.rank if self.alpha is None else self.alpha) / self.rank
        return TLoRASite(site, shape, sizes, self.ring, self.rank, scaling)
