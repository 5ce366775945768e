"""IncreLoRA: low-rank updates that gain ranks where the loss is sensitive to them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.calibrate import mean_over_processes
from ..core.kinds import Delta
from ..core.progress import Progress
from ..core.sites import LINEARS, Site
from ..errors import InputError
from ..registry import ADAPTERS
from ._common.low_rank import orthogonality, require_rank


class IncreLoRASite(Delta):
    """delta = alpha / (n + 1e-5) B diag(e) A in parts, one of the first ranks and one per further rank.

    Every part has its own parameters, a (n, dim_in), e (n,) and b (n, dim_out), so that an optimizer starts afresh with
    it; B is the transpose of all b. The first `active` parts count; behind them, up to `born`, there is a reserve whose
    e is held; the others wait behind a mask. The buffer `counts` holds both numbers too, for files and for masks on the
    device.
    """

    def __init__(self, site: Site, rank: int, max_rank: int, alpha: float, dropout: float, advance: bool) -> None:
        super().__init__(site)
        sizes = [rank, *[1] * (max_rank - rank)]
        starts = [0.0] + [1e-5 if advance else 0.0] * (len(sizes) - 1)
        self.a = nn.ParameterList(nn.Parameter(0.02 * torch.randn(n, site.dim_in)) for n in sizes)
        self.e = nn.ParameterList(nn.Parameter(torch.full((n,), start)) for n, start in zip(sizes, starts))
        self.b = nn.ParameterList(nn.Parameter(0.02 * torch.randn(n, site.dim_out)) for n in sizes)
        self.alpha, self.dropout, self.scoring = alpha, dropout, False
        self.register_buffer("counts", torch.empty(2, dtype=torch.long))
        self.set_counts(1, 1)
        self.register_buffer("score", torch.zeros(()), persistent=False)
        part = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        self.register_buffer("part", part, persistent=False)

    def by_forward(self) -> bool:
        return self.training and self.dropout > 0

    def _pair(self) -> tuple[Tensor, Tensor]:
        e, (active, born) = torch.cat(list(self.e)), self.part < self.counts[:, None]
        e = torch.where(active, e, e.detach()) * born * (self.alpha / (active.sum() + 1e-5))
        return torch.cat(list(self.a)) * e[:, None], torch.cat(list(self.b)).T

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        return None if self.scoring and self.training else (*self._pair(), 1.0)

    def delta(self) -> Tensor:
        a, b = self._pair()
        delta = b @ a
        if self.scoring and self.training and delta.requires_grad:
            delta.register_hook(self._keep_score)
        return delta

    @torch.no_grad()
    def _keep_score(self, gradient: Tensor) -> None:
        a, b = self._pair()  # multiplied out anew: cheaper than to keep delta until the backward pass
        self.score.copy_((gradient * (b @ a)).abs().sum() / math.sqrt(gradient.numel()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, self.dropout, self.training))

    def set_counts(self, active: int, born: int) -> None:
        self.counts.copy_(torch.tensor([active, born]))
        self.active, self.born = active, born

    def restore(self, stored: dict[str, Tensor]) -> None:
        super().restore(stored)
        self.set_counts(*self.counts.tolist())

    @torch.no_grad()
    def drop_reserve(self) -> None:
        for part in list(self.e)[self.active : self.born]:
            part.zero_()
        self.set_counts(self.active, self.active)


@ADAPTERS.register_module()
class IncreLoRA(Adapter):
    """Low-rank update that starts small and grows where it matters, up to a total rank.

    W + alpha / (n + 1e-5) B diag(e) A with n active ranks; A and B from N(0, 0.02^2), e zero. After every step each
    site's score s = sum |dW * dL/d(dW)| / sqrt(dim_out dim_in) goes into a moving average m and |s - m| into another
    one u. Every `interval` steps after `warmup` the `top` sites with the largest m u gain `growth` ranks (all that tie
    with the last of them do), until the ranks sum to `target_rank` times the number of sites. Until then every site has
    a reserve of `growth` ranks whose A and B learn ahead, with e held at 1e-5. A loss `penalty` * mean of ||A A' - I||
    and ||B' B - I|| over all parts (the first ranks are one, every later rank is one) keeps factors orthonormal.
    dL/d(dW) is formed once per step, as the gradient of the adapted weight, and no more once the target
    is reached.

    Our design where the authors add modules in training: parts for `max_rank` ranks exist from the beginning, i.e.
    max_rank (dim_in + dim_out + 1) values per site, and have no gradient, hence no optimizer state and no decay, before
    their time; a site grows to `max_rank` at most. Scores are averaged over processes; with accumulated gradients the
    score is that of the last batch, and under float16 it contains the loss scale. The paper's recipe: rank 1, target 2,
    alpha 16, dropout 0.2, warm-up and interval 1000, top 2.

    Args:
        rank: active ranks at the start.
        target_rank: mean of active ranks at the end.
        max_rank: largest rank of one site; 4 times the target where None.
        growth: ranks per growth; half the target where None.
        top: sites that grow at a time.
        warmup: steps before the first interval.
        interval: steps from one growth to the next.
        alpha: numerator of the scaling.
        advance_learn: A and B of the reserve learn ahead; without it there is no reserve, and new e start at 0.
        penalty: factor of the orthogonality loss.
        betas: decays of m and u.
        dropout: on the input of the update, in training.
        targets: roles of linears.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("all-linear",)
    roles = LINEARS
    paper = "IncreLoRA (Zhang et al., 2023)"
    mergeable = True

    def __init__(
        self,
        rank: int = 1,
        target_rank: int = 2,
        max_rank: int | None = None,
        growth: int | None = None,
        top: int = 2,
        warmup: int = 1000,
        interval: int = 1000,
        alpha: float = 16,
        advance_learn: bool = True,
        penalty: float = 0.1,
        betas: tuple[float, float] = (0.85, 0.85),
        dropout: float = 0.0,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        gain = max(1, target_rank // 2) if growth is None else growth
        limit = 4 * target_rank if max_rank is None else max_rank
        self.require_positive(rank=rank, target_rank=target_rank, growth=gain, max_rank=limit, top=top)
        self.require_strength(alpha=alpha)
        self.require_positive(interval=interval, warmup=warmup + 1)
        self.require_rate(dropout=dropout, beta1=betas[0], beta2=betas[1])
        if not rank < target_rank <= limit or rank + gain > limit:
            raise InputError(
                "IncreLoRA: ranks grow from rank to a mean of target_rank, by growth and up to max_rank each; got "
                f"rank={rank}, target_rank={target_rank}, growth={gain}, max_rank={limit}"
            )
        self.rank, self.target_rank, self.max_rank, self.growth = rank, target_rank, max_rank, growth
        self.top, self.warmup, self.interval, self.alpha = top, warmup, interval, alpha
        self.advance_learn, self.penalty, self.betas = advance_learn, penalty, tuple(betas)
        self.dropout, self.gain, self.limit = dropout, gain, limit
        self.register_load_state_dict_post_hook(_read_counts)

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> IncreLoRASite:
        require_rank("IncreLoRA", self.max_rank or self.target_rank, site, (site.dim_out, site.dim_in))
        return IncreLoRASite(site, self.rank, self.limit, self.alpha, self.dropout, self.advance_learn)

    def build(self, backbone) -> None:
        super().build(backbone)
        for name in ("score", "sensitivity", "uncertainty"):  # a value per site; in checkpoints, not in adapter files
            self.register_buffer(name, torch.zeros(len(self.pieces)))

    def losses(self) -> dict[str, Tensor]:
        if not self.penalty:
            return {}
        parts = [part for p in self.pieces.values() for part in (*list(p.a)[: p.born], *list(p.b)[: p.born])]
        return {"orthogonality": self.penalty * orthogonality(parts)}

    def ranks(self) -> dict[str, int]:
        """Active ranks by site key."""
        return {key: self.rank + piece.active - 1 for key, piece in self.pieces.items()}

    def _missing(self) -> int:
        return self.target_rank * len(self.pieces) - sum(self.ranks().values())

    def _candidates(self) -> list[str]:
        """Sites that may still grow; none once the target is reached."""
        return [k for k, rank in self.ranks().items() if rank + self.gain <= self.limit] if self._missing() > 0 else []

    def on_step(self, progress: Progress) -> None:
        """Growth that the scores of the last step decide; nothing before this forward pass would notice it."""
        _read_counts(self)
        past, growing = progress.step - 1 - self.warmup, self._candidates()
        if progress.step == 0:
            self._check_length(progress)
        if progress.step == 1 and growing:
            self._grow(self.pieces, 0)
        if past > 0 and past % self.interval == 0 and growing:
            self._grow(self._chosen(growing), self.gain)
            if not self._candidates():
                self.finalize()
        _read_counts(self)

    def _grow(self, keys: Iterable[str], parts: int) -> None:
        for piece in (self.pieces[key] for key in keys):
            active = piece.active + parts
            piece.set_counts(active, min(active + self.gain * self.advance_learn, len(piece.e)))

    def _chosen(self, candidates: list[str]) -> list[str]:
        importance = dict(zip(self.pieces, (self.sensitivity * self.uncertainty).tolist()))
        ordered = sorted((importance[key] for key in candidates), reverse=True)
        threshold = ordered[min(self.top, self._missing(), len(ordered)) - 1]
        return [key for key in candidates if importance[key] >= threshold]

    def _check_length(self, progress: Progress) -> None:
        needed = self.warmup + self.interval * math.ceil(self._missing() / (self.top * self.gain)) + 2
        if self._missing() > 0 and needed > progress.total:
            raise InputError(
                f"IncreLoRA: it needs {needed} steps to grow to target_rank {self.target_rank} and the run has "
                f"{progress.total}; lower warmup or interval, or raise top"
            )

    def on_gradients(self, progress: Progress) -> None:
        pieces = list(self.pieces.values())
        for p in pieces:
            for part in (*list(p.a)[p.born :], *list(p.b)[p.born :], *list(p.e)[p.active :]):
                part.grad = None  # optimizers leave it alone, as if it were not there yet
        if pieces[0].scoring:
            self.score.copy_(mean_over_processes(torch.stack([p.score for p in pieces])))
            self.sensitivity.lerp_(self.score, 1 - self.betas[0])
            self.uncertainty.lerp_((self.score - self.sensitivity).abs(), 1 - self.betas[1])

    def finalize(self) -> None:
        for piece in self.pieces.values():
            piece.drop_reserve()


def _read_counts(adapter: IncreLoRA, *_) -> None:
    """Bring Python's numbers in line with a state that was loaded; a resume may be in the middle of a step."""
    pieces = list(adapter.pieces.values())
    for piece, counts in zip(pieces, torch.stack([p.counts for p in pieces]).tolist()):
        piece.active, piece.born = counts
    scoring = bool(adapter._candidates())
    for piece in pieces:
        piece.scoring = scoring
