"""Sparse kernel updates whose sparsity is shared out between the sites by their importance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.progress import Progress
from ..core.sites import LINEARS, Site
from ..errors import InputError
from ..registry import ADAPTERS
from ._common.kernel import KernelSite, compete, smallest

DECAY = 0.85
"""Of the moving averages of importance."""

VECTORS = ("inputs", "outputs")


class SNELLASite(KernelSite):
    """delta = K |K| where |K| > t, else 0; K itself if dense. K = D + alpha softmax(D / gamma over outputs) + beta.

    Attributes:
        sparsity: share of entries below t; python's copy of what `allotted` says.
        allotted: entries left to the site and the epoch in which that was decided, -1 before; in checkpoints and files.
        mean_*, spread_*: moving averages of the importance of each vector's values and of its variation; only in
            checkpoints.
    """

    def __init__(self, site: Site, rank: int, start: float, dense: bool, dropout: float, drop_path: float) -> None:
        super().__init__(site, rank, dropout, drop_path, "SNELLA")
        self.alpha, self.gamma, self.beta = (nn.Parameter(torch.full((1,), value)) for value in (1.0, 1.0, 0.0))
        self.start, self.dense, self.size = start, dense, site.dim_in * site.dim_out
        if not dense:
            self.register_buffer("allotted", torch.tensor([-1, -1]))
            for name in VECTORS:
                self.register_buffer(f"mean_{name}", torch.zeros_like(getattr(self, name)))
                self.register_buffer(f"spread_{name}", torch.zeros_like(getattr(self, name)))
            self._read()

    def _read(self) -> None:
        entries, self.epoch = self.allotted.tolist()
        self.sparsity = self.start if entries < 0 else 1 - entries / self.size

    def allot(self, entries: int | None, epoch: int) -> None:
        """Leave `entries` to the site, as many as before where None."""
        if entries is not None:
            self.allotted[0] = entries
        self.allotted[1] = epoch
        self._read()

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        if not self.dense:
            self._read()

    def stored(self) -> dict[str, Tensor]:
        return {k: v for k, v in super().stored().items() if not k.startswith(("mean_", "spread_"))}

    def restore(self, stored: dict[str, Tensor]) -> None:
        super().restore(stored)
        if not self.dense:
            self._read()

    def kernel(self) -> Tensor:
        d = super().kernel()
        return d + self.alpha * (d / self.gamma).softmax(0) + self.beta

    def delta(self) -> Tensor:
        k = self.kernel()
        if self.dense:
            return k
        return compete(k, smallest(k.detach().abs(), math.floor(self.sparsity * (self.size - 1)) + 1))

    @torch.no_grad()
    def observe(self) -> None:
        """Take the last gradients into the averages: I = |Q dL/dQ|, and how far it is from its average."""
        for name in VECTORS:
            vectors, mean, spread = (getattr(self, prefix + name) for prefix in ("", "mean_", "spread_"))
            if vectors.grad is not None:
                importance = (vectors * vectors.grad).abs().nan_to_num_(0)
                mean.lerp_(importance, 1 - DECAY)
                spread.lerp_((importance - mean).abs(), 1 - DECAY)

    def score(self) -> float:
        return sum((getattr(self, f"mean_{n}") * getattr(self, f"spread_{n}")).mean().item() for n in VECTORS)


def share_out(budget: int, sizes: Sequence[int], scores: Sequence[float]) -> list[int]:
    """Entries per site: the budget by scores, no site above its size, what is left over by scores again.

    Numbers are rounded down; it ends when a round gives nothing, so that a few entries may go to nobody.
    """
    given = [0] * len(sizes)
    while True:
        unfilled = [n for n, size in enumerate(sizes) if given[n] < size]
        total, left = sum(scores[n] for n in unfilled), budget - sum(given)
        before = list(given)
        for n in unfilled:
            part = scores[n] / total if total > 0 else 1 / len(unfilled)
            given[n] = min(sizes[n], given[n] + int(left * part))
        if given == before:
            return given


@ADAPTERS.register_module()
class SNELLA(Adapter):
    """W' = W + S, S = K |K| where |K| is above a threshold and 0 elsewhere, K = D + alpha softmax(D / gamma) + beta.

    D is the kernel matrix of SNELL, with rank (dim_in + dim_out) trained values per site; alpha, gamma and beta are
    three more. The softmax runs over outputs. The factor |K| is a constant in the backward pass, in which S is computed
    once more. A fresh adapter changes the output a little.

    The sites compete for entries. After every step the importance |Q dL/dQ| of each vector Q and its variation enter
    moving averages (decay 0.85); a site's score is the mean of their product. At the start of epoch t, after
    `init_warmup` epochs, all sites together get B_T + (B_0 - B_T) (1 - (t - w0) / (T - w0 - w1))^3 entries, shared out
    by score; B_0 and B_T are what `start` and `sparsity` leave of all weights. Where every score is zero they get equal
    shares, and what rounding leaves over is dropped when it can no longer be shared: there the official code breaks or
    does not end.

    Args:
        rank: length of the vectors, even ("low_rank_dim").
        sparsity: share of all weights that stays as it is in the end; None for S = K, dense and without allotment
            ("mixk").
        start: the same share at the start, in every site.
        init_warmup: epochs w0 at the start without a change.
        final_warmup: epochs w1 at the end with the final budget.
        interval: epochs from one allotment to the next.
        dropout: on the input of the update, in training; not at `proj`. The official scripts take 0.1.
        drop_path: probability to leave the update out for an image, in training. The official scripts take 0.1.
        targets: roles of linears.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("all-linear",)
    roles = LINEARS
    paper = "SNELLA, arXiv 2510.24037 (ssfgunner/SNELL)"
    mergeable = True
    identity_at_init = False

    def __init__(
        self,
        rank: int = 8,
        sparsity: float | None = 0.5,
        start: float = 0.01,
        init_warmup: int = 0,
        final_warmup: int = 0,
        interval: int = 1,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(rank=rank, interval=interval)
        self.require_rate(start=start, dropout=dropout, drop_path=drop_path)
        if sparsity is not None:
            self.require_rate(sparsity=sparsity)
        if min(init_warmup, final_warmup) < 0:
            raise InputError(f"SNELLA: warm-ups must not be negative, got {init_warmup} and {final_warmup} epochs")
        self.rank, self.sparsity, self.start = rank, sparsity, start
        self.init_warmup, self.final_warmup, self.interval = init_warmup, final_warmup, interval
        self.dropout, self.drop_path = dropout, drop_path

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> SNELLASite:
        dropout = 0.0 if site.role == "proj" else self.dropout
        return SNELLASite(site, self.rank, self.start, self.sparsity is None, dropout, self.drop_path)

    def on_step(self, progress: Progress) -> None:
        pieces = list(self.pieces.values())
        if self.sparsity is None or pieces[0].epoch == progress.epoch:
            return
        budget, entries = self._budget(progress.epoch, progress.epochs), [None] * len(pieces)
        if budget is not None:
            entries = share_out(budget, [p.size for p in pieces], [p.score() for p in pieces])
        for piece, count in zip(pieces, entries):
            piece.allot(count, progress.epoch)

    def on_update(self, progress: Progress) -> None:
        if self.sparsity is not None:
            for piece in self.pieces.values():
                piece.observe()

    def _budget(self, epoch: int, epochs: int) -> int | None:
        """Entries of all sites together in an epoch, None where nothing changes."""
        size = sum(p.size for p in self.pieces.values())
        first, last = (1 - self.start) * size, (1 - self.sparsity) * size
        if epoch <= self.init_warmup:
            return None
        if epoch > epochs - self.final_warmup:
            return int(last)
        if epoch % self.interval:
            return None
        done = (epoch - self.init_warmup) / (epochs - self.init_warmup - self.final_warmup)
        return int(last + (first - last) * (1 - done) ** 3)
