"""Sparse updates in the domain of the cosine transform, with learned places."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..core.adapter import Adapter
from ..core.kinds import Delta
from ..core.progress import Progress
from ..core.sites import LINEARS, Site
from ..errors import InputError
from ..registry import ADAPTERS


def _turn(n: int, like: Tensor) -> Tensor:
    """exp(i pi k / (2 n)) for k = 0, ..., n // 2."""
    angle = torch.arange(n // 2 + 1, device=like.device, dtype=like.dtype) * (math.pi / (2 * n))
    return torch.polar(torch.ones_like(angle), angle)


def _scales(n: int, like: Tensor) -> Tensor:
    """sqrt(2 / n), and sqrt(1 / n) for the mean: what makes the transform orthonormal."""
    scales = torch.full((n,), math.sqrt(2 / n), device=like.device, dtype=like.dtype)
    scales[0] = math.sqrt(1 / n)
    return scales


def dct(x: Tensor) -> Tensor:
    """Orthonormal DCT-II of the last dimension, x @ C.T, by one FFT of the same length (even entries, then odd)."""
    n = x.shape[-1]
    bins = torch.fft.rfft(torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1)) * _turn(n, x).conj()
    return torch.cat([bins.real, -bins.imag[..., 1 : (n + 1) // 2].flip(-1)], -1) * _scales(n, x)


def idct(y: Tensor) -> Tensor:
    """The inverse of `dct`, y @ C."""
    n = y.shape[-1]
    y = y / _scales(n, y)
    mirrored = torch.cat([torch.zeros_like(y[..., :1]), y[..., n - n // 2 :].flip(-1)], -1)  # y[n - k], 0 for k = 0
    x = torch.fft.irfft(torch.complex(y[..., : n // 2 + 1], -mirrored) * _turn(n, y), n=n)
    even, odd = x[..., : (n + 1) // 2], x[..., (n + 1) // 2 :].flip(-1)
    if n % 2:
        odd = torch.cat([odd, odd.new_zeros(*odd.shape[:-1], 1)], -1)
    return torch.stack([even, odd], -1).flatten(-2)[..., :n]


class CosineUpdate(torch.autograd.Function):
    """C^T S D (o, i) for a matrix S of zeros but for `values` (n,), added up at the `places` (n, 2).

    Places are whole numbers and have no derivative. In its stead `shift` (n, 2) gets central differences: with
    Z = C G D^T for the gradient G of the result, values[k] (Z[p + 1, q] - Z[p - 1, q]) / 2 along the rows and the same
    along the columns, beyond a border the entry at the border. `values` get Z[p, q].
    """

    @staticmethod
    def forward(ctx, values: Tensor, shift: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(values, places)
        flat = values.to(torch.promote_types(values.dtype, torch.float32))
        rows, columns = places.unbind(1)
        s = flat.new_zeros(shape[0] * shape[1]).index_add(0, rows * shape[1] + columns, flat).view(shape)
        return idct(idct(s).mT).mT.to(values.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        values, places = ctx.saved_tensors
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        z = dct(dct(grad).mT).mT
        (p, q), (o, i) = places.unbind(1), z.shape
        along_rows = z[(p + 1).clamp(max=o - 1), q] - z[(p - 1).clamp(min=0), q]
        along_columns = z[p, (q + 1).clamp(max=i - 1)] - z[p, (q - 1).clamp(min=0)]
        to_shift = values[:, None] / 2 * torch.stack([along_rows, along_columns], 1)
        return z[p, q].to(values.dtype), to_shift.to(values.dtype), None, None


class LoCASite(Delta):
    """delta = alpha C^T S D, S (dim_out, dim_in) with `values` (n,) at the places start + shift (n, 2), rounded."""

    def __init__(self, site: Site, count: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__(site)
        o, i = site.dim_out, site.dim_in
        if count > o * i:
            raise InputError(f"LoCA: {count} coefficients exceed the {o} x {i} entries of {site.key}; lower them")
        drawn = torch.randperm(o * i, generator=generator)[:count]
        self.values, self.shift = nn.Parameter(torch.zeros(count)), nn.Parameter(torch.zeros(count, 2))
        self.register_buffer("start", torch.stack([drawn // i, drawn % i], 1), persistent=False)
        self.register_buffer("last", torch.tensor([o - 1, i - 1]), persistent=False)
        self.alpha = alpha

    def places(self) -> Tensor:
        """Rows and columns of the values, (n, 2) whole numbers."""
        return (self.start + self.shift.detach().round().long()).clamp(torch.zeros_like(self.last), self.last)

    def stay_inside(self) -> None:
        """Bring places that have left the matrix back to its border."""
        self.shift.clamp_(-self.start, self.last - self.start)

    def delta(self) -> Tensor:
        shape = (self.site.dim_out, self.site.dim_in)
        return CosineUpdate.apply(self.alpha * self.values, self.shift, self.places(), shape)


@ADAPTERS.register_module()
class LoCA(Adapter):
    """W' = W + alpha C^T S D: few coefficients of the cosine transform of the update, at learned places.

    C (dim_out, dim_out) and D (dim_in, dim_in) are orthonormal DCT-II matrices, C[p, q] = sqrt(2 / n) c_p
    cos(pi p (2 q + 1) / (2 n)) with c_0 = sqrt(1 / 2) and otherwise 1. S holds n values, at places that are continuous
    in training and rounded where they are used; values that meet add up. Both transforms are fast ones, of
    o i log(o i) operations, less than products with C and D or n outer products take. The values start at zero, the
    places at random, no two the same. n values and 2 n coordinates per site; published counts are those of the values.

    In the first `search` of the run `coefficient_steps` steps update the values, the next `location_steps` the places,
    and so on; after that the places stay. What does not learn in a step is left alone, by weight decay as well.

    Our design where the publication is known to us in its equations only: the numbers of steps and their share, the
    start, places learned as their distance from where they started (decay draws there, not to the corner of the
    matrix), and their learning rate: a step of the places is one index times that, so that it has to be much larger
    than that of the values. At `location_lr_mult` 100 and a rate of 1e-3 ten steps of Adam move a place by one, if its
    eps is well below their gradients, which are as small as the values are.

    Args:
        coefficients: n.
        alpha: scaling. A value of 1 changes the weight by alpha in the Frobenius norm.
        search: share of the run in which places are learned; 0 keeps those that were drawn.
        coefficient_steps: steps of the values in a round.
        location_steps: steps of the places in a round.
        location_lr_mult: learning rate of the places over that of the values.
        seed: of the first places. Each site draws with this number and its own name.
        targets: roles of linears.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("q", "v")
    roles = LINEARS
    paper = "LoCA: Location-aware cosine adaptation (ICLR 2025)"
    mergeable = True

    def __init__(
        self,
        coefficients: int = 3000,
        alpha: float = 1.0,
        search: float = 0.1,
        coefficient_steps: int = 10,
        location_steps: int = 20,
        location_lr_mult: float = 100.0,
        seed: int = 0,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(
            coefficients=coefficients, coefficient_steps=coefficient_steps, location_steps=location_steps
        )
        if not 0 <= search <= 1:
            raise InputError(f"LoCA: search is a share of the run from 0 to 1, got {search!r}")
        self.require_strength(alpha=alpha, location_lr_mult=location_lr_mult)
        self.coefficients, self.alpha, self.search, self.seed = coefficients, alpha, search, seed
        self.coefficient_steps, self.location_steps = coefficient_steps, location_steps
        self.location_lr_mult = location_lr_mult

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> LoCASite:
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(site.key.encode()))
        return LoCASite(site, self.coefficients, self.alpha, generator)

    def lr_mult(self, name: str) -> float:
        return self.location_lr_mult if name.endswith(".shift") else 1.0

    def on_gradients(self, progress: Progress) -> None:
        """Leave out what does not learn in this step; optimizers leave parameters without a gradient alone."""
        place = progress.step % (self.coefficient_steps + self.location_steps)
        locations_learn = place >= self.coefficient_steps and progress.step < self.search * progress.total
        for piece in self.pieces.values():
            (piece.values if locations_learn else piece.shift).grad = None

    @torch.no_grad()
    def on_update(self, progress: Progress) -> None:
        for piece in self.pieces.values():
            piece.stay_inside()
