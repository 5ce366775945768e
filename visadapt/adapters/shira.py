"""Sparse high-rank adapters: few entries of the weights, exchanged in place."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.kinds import Delta
from ..core.sites import CONVS, LINEARS, Site
from ..core.sparse import Entries
from ..errors import InputError, hint
from ..registry import ADAPTERS

STATISTICS = {"snip": "saliency", "gradient": "absolute gradient"}
MASKS = ("random", "magnitude", "snip", "gradient", "structured")


def largest(score: Tensor, count: int) -> Tensor:
    """Places (count,) of the largest entries of a matrix, in rising order; of equal ones the first count."""
    flat = score.flatten().cpu()  # the choice must not depend on the machine
    border = flat.kthvalue(len(flat) - count + 1).values
    above, equal = (flat > border).nonzero()[:, 0], (flat == border).nonzero()[:, 0]
    return torch.cat([above, equal[: count - len(above)]]).sort().values


def structured(o: int, i: int, count: int) -> Tensor:
    """Places of the main diagonal and of evenly spaced rows and columns in pairs, of the last pair as many as fit."""
    pairs = max(1, (count - min(o, i)) // (o + i))
    while True:
        score = torch.zeros(o, i)
        for n in range(pairs):
            row, column = (2 * n + 1) * o // (2 * pairs), (2 * n + 1) * i // (2 * pairs)
            score[row].clamp_(min=pairs - n)
            score[:, column].clamp_(min=pairs - n)
        score.fill_diagonal_(pairs + 1)
        if score.count_nonzero() >= count:
            return largest(score, count)
        pairs += 1


class SHiRASite(Delta):
    """delta (o, i) is zero but for `values` (k,) at the places `index` (k,), row * i + column."""

    def __init__(self, site: Site, shape: tuple[int, int], index: Tensor, from_data: bool) -> None:
        super().__init__(site)
        self.values = nn.Parameter(torch.zeros(len(index)))
        self.register_buffer("index", index.long(), persistent=from_data)
        self.shape = shape

    def stored(self) -> dict[str, Tensor]:
        return {k: v.int() if k == "index" else v for k, v in super().stored().items()}

    def entries(self) -> Entries:
        return Entries(self.index, self.values)

    def delta(self) -> Tensor:
        o, i = self.shape
        return self.values.new_zeros(o * i).index_add(0, self.index, self.values).view(o, i)


@ADAPTERS.register_module()
class SHiRA(Adapter):
    """W' = W + S with a sparse S of k = rank (o + i) values at fixed places of the weight, as many as LoRA would have.

    The values are offsets from the base and start at zero, so that weight decay draws to the base. No scaling depends
    on the rank; `Adapted.enable(name, scale=alpha)` gives W + alpha S. Several adapters add up, also where their places
    coincide. A merge writes the k entries in place and keeps what stood there, so that adapters are exchanged fast and
    the base comes back bit for bit: `adapted.unmerge()`, `adapted.enable("b")`, `adapted.merge("b")`.

    Masks: "random" draws the places; "magnitude" takes the largest |W|, "gradient" the largest |dL/dW| and "snip" the
    largest |W dL/dW|, both averaged over training batches (`Adapted.calibrate`); "structured" takes the main diagonal
    and evenly spaced rows and columns. Of these the last is ours in detail: it is cut off at k entries.

    Places that come from data are stored in files as int32; the others are made anew from the seed or the base weight.
    Linears as published; convolutions are taken as (o, i kh kw), which is ours.

    Args:
        rank: k / (o + i). 5 is 1 % of the linears of a ViT-B; the paper changes 1 to 2 %.
        mask: one of the five above.
        seed: of random places. Each site draws with this number and its own name.
        same_seed: all sites draw with `seed` alone, as in HF PEFT; sites of equal shape then share their places.
        calibration_batches: training batches for "gradient" and "snip".
        targets: roles of linears and convolutions.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("all-linear",)
    roles = (*LINEARS, *CONVS)
    paper = "Sparse High Rank Adapters (NeurIPS 2024), arXiv 2406.13175"
    mergeable = True

    def __init__(
        self,
        rank: int = 5,
        mask: str = "magnitude",
        seed: int = 0,
        same_seed: bool = False,
        calibration_batches: int = 8,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(rank=rank, calibration_batches=calibration_batches)
        if mask not in MASKS:
            raise InputError(f"SHiRA: unknown mask '{mask}'{hint(mask, MASKS)}")
        self.rank, self.mask, self.seed, self.same_seed = rank, mask, seed, same_seed
        self.calibration_batches = calibration_batches
        self.calibration = STATISTICS.get(mask)

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> SHiRASite:
        weight = self.weight(site, backbone)
        o, i = weight.shape
        count = self.rank * (o + i)
        if count > o * i:
            raise InputError(
                f"SHiRA: rank {self.rank} asks for {count} entries of the site {site.key}, which has {o} x {i}; "
                f"the rank may be at most {o * i // (o + i)}"
            )
        return SHiRASite(site, (o, i), self._places(site, weight, count), self.calibration is not None)

    def _places(self, site: Site, weight: Tensor, count: int) -> Tensor:
        if self.mask == "random":
            seed = self.seed if self.same_seed else self.seed + zlib.crc32(site.key.encode())
            generator = torch.Generator().manual_seed(seed)
            return torch.randperm(weight.numel(), generator=generator)[:count].sort().values
        if self.mask == "magnitude":
            return largest(weight.abs(), count)
        if self.mask == "structured":
            return structured(*weight.shape, count)
        return torch.zeros(count)  # until `calibrate`

    def calibrate(self, statistic: dict[str, Tensor]) -> None:
        for key, piece in self.pieces.items():
            piece.index.copy_(largest(statistic[key], len(piece.index)))

    def has_start(self) -> bool:
        return not self.calibration or all(p.index.any() for p in self.pieces.values())
