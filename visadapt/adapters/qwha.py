"""Sparse updates in the Walsh-Hadamard domain, for quantised weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.calibrate import INPUT_MOMENTS
from ..core.decompose import one_core_each
from ..core.kinds import Delta
from ..core.sites import CONVS, LINEARS, Site
from ..errors import InputError
from ..registry import ADAPTERS
from ._common.hadamard import Hadamard, hadamard_block

BITS = (2, 3, 4, 8)
"""Grids that the base can be rounded to."""

DAMPING = 1e-4
"""Share of the mean of their diagonal that is added to the diagonal of the moments of the inputs."""

CHUNK = 2**23
"""Entries of the systems of equations that are solved at once."""


def rounded(weight: Tensor, bits: int) -> Tensor:
    """weight (o, i) on 2^bits evenly spaced values per row, from its smallest to its largest."""
    low = weight.amin(1, keepdim=True)
    step = (weight.amax(1, keepdim=True) - low) / (2**bits - 1)
    return low + step * ((weight - low) / step.clamp(min=torch.finfo(weight.dtype).tiny)).round()


def budgets(norms: Tensor, total: int, cap: int) -> Tensor:
    """Whole numbers (o,) with this sum, in proportion to `norms` (o,) and at most `cap`.

    They are rounded down, and what is left goes to the smallest, one to each.
    """
    share = total * norms.double() / norms.double().sum().clamp(min=torch.finfo(torch.float64).tiny)
    count = share.floor().long().clamp(max=cap)
    while left := total - int(count.sum()):
        order = count.sort(stable=True).indices
        count[order[count[order] < cap][:left]] += 1
    return count


def chosen(coefficients: Tensor, gram: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The sparse coefficients that fit a matrix, each row by least squares.

    Args:
        coefficients: (o, i) of the whole matrix; row n is to be approximated by few coefficients s with small
            (s - c_n) gram (s - c_n).T.
        gram: (i, i) of the basis.
        total: how many coefficients all rows have together.

    Returns:
        Places (total,) row * i + column in rising order, and values (total,).
    """
    o, i = coefficients.shape
    count = budgets(coefficients.norm(dim=1), total, i)
    width = int(count.max())
    columns = (gram.diagonal() * coefficients.square()).topk(width).indices
    target, solved = (coefficients @ gram).gather(1, columns), torch.zeros(o, width, dtype=gram.dtype)
    used = torch.arange(width) < count[:, None]
    for rows in torch.arange(o).split(max(1, CHUNK // width**2)):
        at, on = columns[rows], used[rows]
        system = gram[at[:, :, None], at[:, None, :]] * (on[:, :, None] & on[:, None, :])
        system += torch.diag_embed((~on).to(gram.dtype))  # the places beyond a row's number are 0
        right = (target[rows] * on)[:, :, None]
        solved[rows] = torch.cholesky_solve(right, torch.linalg.cholesky(system))[:, :, 0]
    places = (torch.arange(o)[:, None] * i + columns)[used]
    order = places.argsort()
    return places[order], solved[used][order]


def random_places(o: int, i: int, count: int, seed: int) -> Tensor:
    """Places (count,) row * i + column as the official code draws them."""
    return torch.randperm(o * i, generator=torch.Generator().manual_seed(seed))[:count].clone()


class QWHASite(Delta):
    """delta = alpha / (i sqrt(o)) S H, with S (o, i) zero but for `values` (k,) at `index`; Q(W) - W is added where the
    base is rounded with the error W - Q(W).
    """

    recompute = True

    def __init__(
        self, site: Site, shape: tuple[int, int], index: Tensor, hadamard: Hadamard, alpha: float, error: Tensor | None
    ) -> None:
        super().__init__(site)
        self.values = nn.Parameter(torch.zeros(len(index)))
        self.register_buffer("index", index, persistent=error is not None)
        self.register_buffer("error", error, persistent=False)
        self.shape, self.hadamard, self.scaling = shape, hadamard, alpha / (shape[0] ** 0.5 * shape[1])
        self.rebases = error is not None

    def stored(self) -> dict[str, Tensor]:
        return {k: v.int() if k == "index" else v for k, v in super().stored().items()}

    def delta(self) -> Tensor:
        o, i = self.shape
        with torch.autocast(self.values.device.type, enabled=False):
            spectrum = self.values.new_zeros(o * i).index_add(0, self.index, self.values).view(o, i)
            change = self.scaling * self.hadamard(spectrum)
            return change if self.error is None else change - self.error

    @torch.no_grad()
    def begin(self, moments: Tensor) -> None:
        """Start where the error of the rounded weight has the largest effect on inputs with these moments (i, i)."""
        moments = moments.to("cpu", torch.float64, copy=True)
        tiny = torch.finfo(torch.float32).tiny  # for inputs that are always zero
        moments.diagonal().add_((DAMPING * moments.diagonal().mean()).clamp(min=tiny))
        hadamard, i = Hadamard(self.hadamard.a.cpu(), self.shape[1]).double(), self.shape[1]
        gram = hadamard(hadamard(moments, transposed=True).T.contiguous(), transposed=True) / i**2
        coefficients = hadamard(self.error.double().cpu(), transposed=True)
        index, values = chosen(coefficients, gram, len(self.index))
        self.index.copy_(index)
        self.values.copy_(values / (i * self.scaling))


@ADAPTERS.register_module()
class QWHA(Adapter):
    """W' = W + (alpha / sqrt(o)) S H / i with a sparse S (o, i) of k = rank (i + o) trained values at fixed places.

    H (i, i) is a Hadamard matrix: Sylvester's in natural order where i is a power of two, else K 2^k with a block of
    order K as in QuaRot. The update has full rank and is made by three small products instead of one with H. k values
    per site, as many as LoRA of this rank has.

    On a float base the places are random and the values start at zero. With `base_bits` the base is a rounded one,
    Q(W), and S starts at what makes up best for E = W - Q(W): with the coefficients C = E H.T and the second moments M
    of the inputs in training (`Adapted.calibrate`), the k coefficients are shared among the outputs in proportion to
    the norms of the rows of C; a row keeps those with the largest C_j^2 G_jj, G = H M H.T / i^2, and they are fitted
    anew by least squares. The published start takes a root of M from its eigenvectors; it drops out of all these terms.

    Q(W) is a simulation of ours, for the backbone itself stays in floating point: 2^bits evenly spaced values from the
    smallest to the largest of each output's weights. The paper has 2 bits from GPTQ and MagR. A copy of E stays in
    memory and is not stored; the adapter includes Q(W) - W, also when it is merged. M is that of the base before
    rounding. Places that come from data are stored in files, as int32.

    Blocks K of our own: Paley's of prime fields, so 12, 20, 28, 36, 44, 60, 68, 76, 84, 104, ...; the published
    checkpoints have those of a table, and where two fit (i = 40 2^k) the larger. Linears as published; convolutions are
    taken as (o, i kh kw), which is ours. The official layer leaves out the bias of the base and all active adapters but
    the last; that is not repeated.

    Args:
        rank: k / (i + o).
        alpha: numerator of the scaling. The paper's 4,000 is for layers with about 4,096 inputs; an entry of the
            update has alpha / (i sqrt(o)) times the sum of its row's values.
        base_bits: 2, 3, 4 or 8 for a rounded base, None for the base as it is.
        seed: of random places; all sites draw with it, as in the official code.
        calibration_batches: training batches for M.
        targets: roles of linears and convolutions.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("all-linear",)
    roles = (*LINEARS, *CONVS)
    paper = "QWHA: quantization-aware Walsh-Hadamard adaptation (vantaa89/qwha)"
    mergeable = True

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 3000.0,
        base_bits: int | None = None,
        seed: int = 777,
        calibration_batches: int = 8,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(rank=rank, calibration_batches=calibration_batches)
        self.require_strength(alpha=alpha)
        if base_bits is not None and base_bits not in BITS:
            raise InputError(f"QWHA: base_bits is one of {', '.join(map(str, BITS))}, or None; got {base_bits!r}")
        self.rank, self.alpha, self.base_bits, self.seed = rank, alpha, base_bits, seed
        self.calibration_batches = calibration_batches
        self.calibration = None if base_bits is None else INPUT_MOMENTS
        self.identity_at_init = base_bits is None

    def shared(self, sites: list[Site], backbone) -> nn.ModuleDict:
        found = nn.ModuleDict()
        for site in sites:
            i = self.weight(site, backbone).shape[1]
            if str(i) not in found:
                if (block := hadamard_block(i)) is None:
                    raise InputError(
                        f"QWHA: {site.key} has {i} weights per output, and there is no Hadamard matrix of that order "
                        "here; the order is 2^k, or 2^k times 12, 20, 28, 36, 44, ...; choose other targets"
                    )
                found[str(i)] = Hadamard(block, i)
        return found

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> QWHASite:
        weight = self.weight(site, backbone)
        o, i = weight.shape
        if (count := self.rank * (o + i)) > o * i:
            raise InputError(
                f"QWHA: rank {self.rank} asks for {count} values of the site {site.key}, which has {o} x {i}; the rank "
                f"may be at most {o * i // (o + i)}"
            )
        error = index = None
        if self.base_bits is None:
            index = random_places(o, i, count, self.seed)
        else:
            error, index = weight - rounded(weight, self.base_bits), torch.zeros(count, dtype=torch.int64)
        return QWHASite(site, (o, i), index, shared[str(i)], self.alpha, error)

    def calibrate(self, statistic: dict[str, Tensor]) -> None:
        one_core_each(lambda key: self.pieces[key].begin(statistic[key]), self.pieces)

    def has_start(self) -> bool:
        return not self.calibration or all(p.index.any() for p in self.pieces.values())
