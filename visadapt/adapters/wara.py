"""Low-rank updates in the domain of a wavelet transform: of the channels, or of the grid of patch tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.context import Context
from ..core.kinds import Delta, SiteModule, Tokens
from ..core.sites import LINEARS, Site
from ..errors import InputError, hint
from ..registry import ADAPTERS
from ._common.decomposed import Decomposed
from ._common.low_rank import factor_pair, require_rank

VERSIONS = ("v1", "v2", "tiny")

HAAR = (0.70710678118654752, 0.70710678118654752)
DB2 = (0.48296291314453414, 0.83651630373780791, 0.22414386804201338, -0.12940952255126038)
DB3 = (
    *(0.33267055295008262, 0.80689150931109258, 0.45987750211849157),
    *(-0.13501102001025459, -0.085441273882026662, 0.035226291885709537),
)
DB4 = (
    *(0.2303778133088965, 0.71484657055291565, 0.63088076792985891, -0.027983769416859854),
    *(-0.18703481171909308, 0.030841381835560764, 0.0328830116668852, -0.010597401785069032),
)
WAVELETS = {"haar": HAAR, "db1": HAAR, "db2": DB2, "db3": DB3, "db4": DB4}
"""Low-pass filters h of Daubechies; the high-pass filters are g[t] = (-1)^t h[L - 1 - t]."""


def split(x: Tensor, wavelet: str, dim: int) -> tuple[Tensor, Tensor]:
    """One level of the periodic transform along a (negative) dimension of even length n: low and high half, n / 2 each.

    low[k] = sum_t h[t] x[(2 k + t) mod n]; it is orthonormal for every even n, also below the length of the filter.
    """
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim)
    h, low, high = WAVELETS[wavelet], 0, 0
    for j in range(len(h) // 2):
        e, o = even.roll(-j, dim), odd.roll(-j, dim)
        low, high = low + h[2 * j] * e + h[2 * j + 1] * o, high + h[-1 - 2 * j] * e - h[-2 - 2 * j] * o
    return low, high


def join(low: Tensor, high: Tensor, wavelet: str, dim: int) -> Tensor:
    """The inverse of `split`, which is its transpose."""
    h, even, odd = WAVELETS[wavelet], 0, 0
    for j in range(len(h) // 2):
        a, d = low.roll(j, dim), high.roll(j, dim)
        even, odd = even + h[2 * j] * a + h[-1 - 2 * j] * d, odd + h[2 * j + 1] * a - h[-2 - 2 * j] * d
    return torch.stack([even, odd], dim).flatten(dim - 1, dim)


def in_both_bands(rows: Tensor, wavelet: str) -> Tensor:
    """(I_2 x rows) W for rows (r, n / 2) and the analysis matrix W (n, n): (2 r, n)."""
    none = torch.zeros_like(rows)
    return join(torch.cat([rows, none]), torch.cat([none, rows]), wavelet, -1)


class WaRASite(Delta):
    """delta = s W_out^T (I_2 x B A) W_in with a (r, dim_in / 2) random and b (dim_out / 2, r) zero at the start."""

    def __init__(self, site: Site, rank: int, scaling: float, wavelet: str) -> None:
        super().__init__(site)
        o, i = -(-site.dim_out // 2), -(-site.dim_in // 2)
        if rank > min(o, i):
            raise InputError(f"WaRA: rank {rank} exceeds the sub-bands of {site.key}, {o} and {i} channels; lower it")
        self.a, self.b = factor_pair(rank, i, o)
        self.scaling, self.wavelet = scaling, wavelet

    def factors(self) -> tuple[Tensor, Tensor, float]:
        a, b = in_both_bands(self.a, self.wavelet), in_both_bands(self.b.T, self.wavelet).T
        if self.site.dim_in % 2:  # the last input stands twice in what is transformed
            a = torch.cat([a[:, :-2], a[:, -2:].sum(1, keepdim=True)], 1)
        return a, b[: self.site.dim_out], self.scaling


class WaRATokens(Tokens):
    """y' = y + s IDWT(B GELU(gain * A DWT(x))) on the patch grid, with a (r, D), b (D, r) and gain (2, 2, r).

    `gain` has an entry per sub-band (low and high in width, then in height) and channel. A and B commute with the
    transform over space, so it is taken of r channels instead of D.
    """

    position = "parallel"

    def __init__(self, site: Site, rank: int, scaling: float, wavelet: str) -> None:
        super().__init__(site)
        require_rank("WaRA", rank, site, (site.dim_out, site.dim_in))
        self.a, self.b = factor_pair(rank, site.dim_in, site.dim_out)
        self.gain = nn.Parameter(torch.ones(2, 2, rank))
        self.scaling, self.wavelet = scaling, wavelet

    def forward(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        lead, patches = ctx.split(x)
        h, w = ctx.grid
        grid = F.linear(patches, self.a).unflatten(1, (-1, h, w)).flatten(0, 1)  # (frames, h, w, r)
        if h % 2:
            grid = torch.cat([grid, grid[:, -1:]], 1)
        if w % 2:
            grid = torch.cat([grid, grid[:, :, -1:]], 2)
        bands = torch.stack(split(torch.stack(split(grid, self.wavelet, -3)), self.wavelet, -2))
        bands = F.gelu(self.gain[:, :, None, None, None] * bands)  # (2, 2, B, h / 2, w / 2, r)
        grid = join(*join(*bands, self.wavelet, -2), self.wavelet, -3)[:, :h, :w]
        change = F.linear(grid.reshape(*patches.shape[:2], -1), self.b) * self.scaling
        return y + F.pad(change, (0, 0, lead.shape[1], 0))


class TinyWaRASite(Delta):
    """delta = s U_r C Vt_r with c (r, r) trained from zero on, u (o, r) and vt (r, i) frozen."""

    def __init__(self, site: Site, u: Tensor, vt: Tensor, scaling: float) -> None:
        super().__init__(site)
        self.c = nn.Parameter(torch.zeros(len(vt), len(vt)))
        self.register_buffer("u", u, persistent=False)
        self.register_buffer("vt", vt, persistent=False)
        self.scaling = scaling

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.c @ self.vt, self.u, self.scaling


@ADAPTERS.register_module()
class WaRA(Decomposed):
    """A low-rank update that is shared by the sub-bands of a wavelet transform. s = alpha / rank; B starts at zero.

    The paper was rewritten under one arXiv number, and no code is published; both readings are here.

    "v1" (default): the 2-D transform of the layer's input, features x tokens, is multiplied by B A in each of the four
    sub-bands, transformed back and added to the output. Along the tokens the two transforms cancel. What remains is an
    update of the weight, W + s W_out^T (I_2 x B A) W_in with the one-level analysis matrices W_in (dim_in, dim_in) and
    W_out (dim_out, dim_out) along the features. It has rank 2 r, its factors are r filtered rows per band, and it
    merges. r (dim_in + dim_out) / 2 values per linear.

    "v2": patch tokens x at the input of a sub-layer go to their grid, through a 2-D transform over space, through an
    adapter that all sub-bands share, and back; the result is added to the sub-layer's output. Other tokens are left
    alone. A linear adapter would commute with the transform and be LoRA; between its matrices therefore stands
    GELU(gain * .) with a gain per sub-band and channel, from 1 on. 2 D r + 4 r values per sub-layer. It does not merge.

    "tiny": W + s U_r C Vt_r with C (r, r) from zero on, in the basis of the truncated W = U diag(S) Vt, r^2 values per
    linear; the basis is made anew from the base weight and is not stored.

    Our design where the publication is silent: the start and s; filters are periodic; odd sizes are extended by their
    last entry and cut off again; in "v2" the non-linearity and the place, in "tiny" a full C.

    Args:
        rank: inner width r.
        alpha: numerator of s; equal to the rank where None.
        version: "v1", "v2" or "tiny".
        wavelet: "haar" (also "db1"), "db2", "db3" or "db4", Daubechies wavelets of 1 to 4 vanishing moments.
        targets: roles of linears, q and v where None; of sub-layers in "v2", attn and mlp where None.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("q", "v")
    roles = LINEARS
    paper = "WaRA: wavelet low-rank adaptation, arXiv 2506.24092 (v1 and v2)"
    mergeable = True

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        version: str = "v1",
        wavelet: str = "haar",
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        sublayers = ("attn", "mlp")
        super().__init__(sublayers if version == "v2" and targets is None else targets, layers)
        self.require_positive(rank=rank)
        self.require_strength(alpha=alpha)
        if version not in VERSIONS:
            raise InputError(f"WaRA: no version '{version}'{hint(version, VERSIONS)}")
        if wavelet not in WAVELETS:
            raise InputError(f"WaRA: no wavelet '{wavelet}'{hint(wavelet, WAVELETS)}")
        if version == "tiny" and wavelet != "haar":
            raise InputError(f"WaRA: version 'tiny' has no transform; leave wavelet='{wavelet}' out")
        if version == "v2":
            self.kinds, self.roles, self.needs, self.mergeable = ("tokens",), sublayers, frozenset({"tokens"}), False
        self.rank, self.alpha, self.version, self.wavelet = rank, alpha, version, wavelet

    def components(self, site: Site, shape: tuple[int, int]) -> int:
        require_rank("WaRA", self.rank, site, shape)
        return self.rank

    def shared(self, sites: list[Site], backbone) -> nn.ModuleDict:
        return super().shared(sites, backbone) if self.version == "tiny" else nn.ModuleDict()

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> SiteModule:
        scaling = (self.rank if self.alpha is None else self.alpha) / self.rank
        if self.version == "tiny":
            u, _, vt = self.factors.pop(site.key)
            return TinyWaRASite(site, u, vt, scaling)
        return {"v1": WaRASite, "v2": WaRATokens}[self.version](site, self.rank, scaling, self.wavelet)
