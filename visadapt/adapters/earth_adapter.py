"""Earth-Adapter: bottlenecks behind the blocks, in a few of them one each for space, low and high frequencies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.context import Context
from ..core.kinds import Tokens
from ..core.sites import Site
from ..errors import InputError
from ..registry import ADAPTERS


def projection(size: int, cutoff: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part (n, n) of the projection of n values onto the frequencies -c, ..., c - 1."""
    place = torch.arange(size, device=like.device)
    frequency = torch.arange(-cutoff, cutoff, device=like.device)
    steps = (frequency[:, None, None] * (place[:, None] - place)) % size  # whole numbers: no large angle is rounded
    angle = steps.to(like.dtype) * (2 * math.pi / size)
    return angle.cos().sum(0) / size, angle.sin().sum(0) / size


def low_band(x: Tensor, grid: tuple[int, int], ratio: float) -> Tensor:
    """(B, h*w, K) without its high frequencies.

    Kept are the frequencies -c, ..., c - 1 of rows and of columns, c = int(min(h, w) * ratio // 2), as the official
    code cuts them out of the shifted spectrum; all are lost where c is 0. The set is not symmetric, and the result is
    the real part of the inverse transform. Two products with small matrices, (n, n) for n rows or columns, give the
    same numbers as the FFT and are several times as fast where n is no power of two.
    """
    (h, w), (batch, _, channels) = grid, x.shape
    cutoff = int(min(h, w) * ratio // 2)
    rows, columns = (projection(n, cutoff, x) for n in grid)
    # Re (P X Q^T) = Re P X Re Q^T - Im P X Im Q^T: both products over rows first, beside each other, then their sum
    by_row = torch.stack(rows, 1).flatten(0, 1)  # (2 h, h)
    by_column = torch.cat([columns[0], -columns[1]], 1)  # (w, 2 w)
    both = torch.bmm(by_row.expand(batch, -1, -1), x.reshape(batch, h, w * channels))  # (B, 2 h, w K)
    both = both.view(batch * h, 2 * w, channels)
    return torch.bmm(by_column.expand(batch * h, -1, -1), both).view(x.shape)


class Expert(nn.Module):
    """Both linears of up(relu(down(x))); `extra` more inputs come from tokens."""

    def __init__(self, dim: int, width: int, extra: int = 0) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim + extra, width), nn.Linear(width, dim)


class SpatialExpert(Tokens):
    """X' = X + alpha E(X) on patches X (B, h*w, D); E reads [X, T] where there are tokens T (positions, t)."""

    count = 1

    def __init__(self, site: Site, options: EarthAdapter, bound: float) -> None:
        super().__init__(site)
        self.dim, self.token_grid = site.dim_out, options.token_grid
        extra = [options.token_width] + [0] * (self.count - 1)
        self.experts = nn.ModuleList(Expert(self.dim, options.width, n) for n in extra)
        self.alpha = nn.Parameter(torch.tensor(float(options.scale)))
        self.tokens = None
        if options.token_width:
            shape = (math.prod(self.token_grid), options.token_width)
            self.tokens = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

    def bias(self, grid: tuple[int, int]) -> Tensor:
        """What the first `down` adds to every patch: (r,), or (h*w, r) with tokens."""
        down = self.experts[0].down
        if self.tokens is None:
            return down.bias
        tokens = self.tokens.mT.unflatten(1, self.token_grid)[None]
        if tuple(self.token_grid) != tuple(grid):
            tokens = F.interpolate(tokens, grid, mode="bilinear", align_corners=False)
        return F.linear(tokens[0].flatten(1).mT, down.weight[:, self.dim :], down.bias)

    def hidden(self, y: Tensor, lead: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """relu(down) of every expert, (B, h*w, experts * r), and the experts' shares (B, h*w, experts)."""
        inner = F.linear(y, self.experts[0].down.weight[:, : self.dim])[:, lead:] + self.bias(grid)
        return inner.relu(), torch.ones_like(inner[..., :1])

    def forward(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        lead = ctx.split(y)[0].shape[1]
        hidden, shares = self.hidden(y, lead, ctx.grid)
        hidden = (hidden.unflatten(2, (self.count, -1)) * shares[..., None]).flatten(2)
        # One product for all experts, with alpha in its weight and the shares as inputs of the biases. What stands
        # before the patches has zeros for inputs and stays, without a copy of the patches.
        weight = torch.cat([*(e.up.weight for e in self.experts), *(e.up.bias[:, None] for e in self.experts)], 1)
        inner = F.pad(torch.cat([hidden, shares], 2), (0, 0, lead, 0))
        return y + F.linear(inner.to(weight.dtype), self.alpha * weight)


class FrequencyExperts(SpatialExpert):
    """X' = X + alpha (g0 E1(X) + g1 E2(Lo) + g2 E3(X - Lo)), g = softmax(X Wr + br) per patch, Lo low frequencies of X.

    Lo acts on positions and `down` on channels, so the two change places: only the 2 r channels behind the projections
    of E2 and E3 are filtered, not all D.
    """

    count = 3

    def __init__(self, site: Site, options: EarthAdapter, bound: float) -> None:
        super().__init__(site, options, bound)
        self.router, self.cutoff = nn.Linear(self.dim, self.count), options.cutoff

    def hidden(self, y: Tensor, lead: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """In float32 at least, also under autocast: the high band is a small difference of large values."""
        exact, width = torch.promote_types(y.dtype, torch.float32), self.experts[0].down.out_features
        _, low_down, high_down = (e.down for e in self.experts)
        with torch.autocast(y.device.type, enabled=False):
            weight = torch.cat([*(e.down.weight[:, : self.dim] for e in self.experts), self.router.weight]).to(exact)
            spatial, bands, scores = F.linear(y.to(exact), weight)[:, lead:].split(
                [width, 2 * width, self.count], -1
            )  # (B, h*w, ...)
            low, taken = low_band(bands, grid, self.cutoff).split(width, -1)
            high = bands[..., width:] - taken
            inner = [spatial + self.bias(grid), low + low_down.bias, high + high_down.bias]
            return torch.cat(inner, -1).relu(), (scores + self.router.bias).softmax(-1)


@ADAPTERS.register_module()
class EarthAdapter(Adapter):
    """A bottleneck behind every block; in the blocks of `fft_layers` three that share the work by frequency.

    With patches X behind block l and E(x) = up(relu(down(x))), r wide:

        X' = X + alpha_l E1(X)                                          elsewhere
        X' = X + alpha_l (g0 E1(X) + g1 E2(Lo) + g2 E3(Hi))             in `fft_layers`

    Lo holds the frequencies -c, ..., c - 1 of rows and columns of X on the patch grid, c = int(min(h, w) cutoff // 2),
    Hi = X - Lo the others, and g = softmax(X Wr + br) belongs to each patch. On a grid so small that c is 0, Lo is
    zero and E2 gives a constant. Class, register and prompt tokens stay as they are. Linears start as those of torch
    do, so a fresh adapter changes the output; alpha, one per block, starts at `scale`.

    As in the official code, and unlike the usual low-pass, the kept square is not symmetric about frequency 0. Where
    that code is limited or wasteful this is not: any grid, any width and depth; experts and routers stand in
    `fft_layers` alone, while there all blocks have them and most are never used. Trained values in a ViT-L: 24 (2 D r +
    r + D + 1), and 2 (2 D r + r + D) + 3 D + 3 more per block of `fft_layers`: 3,974,049 with r = 64 and three of them.

    Args:
        width: r.
        fft_layers: indices of the blocks with three experts, negative from the end. Best choices differ by data; the
            authors take three or six of the first or of the last blocks.
        cutoff: share of the shorter side's frequencies that counts as low, above 0 and up to 1; 0.2 or 0.3 as
            published.
        scale: alpha at the start.
        token_width: t, learned inputs per position that E1 reads behind the patch, in every block; 0 for none, as
            published. They start uniform in ±sqrt(6 / (C p² + D)), C bands and patch p, which is our choice: the
            official code leaves them uninitialised.
        token_grid: rows and columns of these positions; for another grid they are resampled bilinearly.
        layers: block indices.
    """

    kinds = ("tokens",)
    targets = ("block",)
    roles = ("block",)
    needs = frozenset({"tokens"})
    paper = "Earth-Adapter: Bridge the Geospatial Domain Gaps with Mixture of Frequency Adaptation, arXiv 2504.06220"
    identity_at_init = False

    def __init__(
        self,
        width: int = 64,
        fft_layers: Sequence[int] = (0, 1, 2),
        cutoff: float = 0.3,
        scale: float = 0.1,
        token_width: int = 0,
        token_grid: Sequence[int] = (32, 32),
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(layers=layers)
        self.require_positive(width=width)
        self.require_strength(scale=scale)
        if not 0 < cutoff <= 1:
            raise InputError(f"EarthAdapter: cutoff must be above 0 and at most 1, got {cutoff!r}")
        if token_width:
            self.require_positive(token_width=token_width)
        if len(token_grid) != 2:
            raise InputError(f"EarthAdapter: token_grid is [rows, columns], got {list(token_grid)}")
        self.require_positive(**{"token_grid[0]": token_grid[0], "token_grid[1]": token_grid[1]})
        self.width, self.fft_layers, self.cutoff, self.scale = width, tuple(fft_layers), cutoff, scale
        self.token_width, self.token_grid = token_width, tuple(token_grid)

    def shared(self, sites: list[Site], backbone) -> nn.ModuleDict:
        depth, adapted = backbone.depth, {s.layer for s in sites}
        if wrong := [n for n in self.fft_layers if not -depth <= n < depth or n % depth not in adapted]:
            raise InputError(f"EarthAdapter: fft_layers {wrong} are not among the adapted blocks {sorted(adapted)}")
        return nn.ModuleDict()

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> SpatialExpert:
        bound = math.sqrt(6 / (backbone.in_chans * backbone.patch**2 + site.dim_out))
        kind = FrequencyExperts if site.layer in {n % backbone.depth for n in self.fft_layers} else SpatialExpert
        return kind(site, self, bound)
