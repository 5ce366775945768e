"""SoRA: low-rank updates that lose ranks in training, by gates under a sparsity penalty."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.progress import Progress
from ..core.sites import LINEARS, Site
from ..errors import InputError, hint
from ..registry import ADAPTERS
from ._common.low_rank import LowRankSite

VARIANTS = ("paper", "official")
SCHEDULES = ("linear", "log_linear", "exp_linear")


class SoRASite(LowRankSite):
    """delta = s B diag(gate) A with gate (rank,) drawn from N(0, 1)."""

    def __init__(self, site: Site, rank: int, scaling: float, dropout: float) -> None:
        super().__init__(site, rank, scaling, dropout, "SoRA")
        self.gate = nn.Parameter(torch.randn(rank))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.a * self.gate[:, None], self.b, self.scaling


def shrink(value: Tensor, limit: float, variant: str) -> Tensor:
    """The proximal map of limit * |v|; variant "official" also drops what it has moved below the limit."""
    if variant == "paper":
        return F.softshrink(value, limit)
    moved = torch.where(value.abs() > limit, value - limit * value.sign(), value)
    return torch.where(moved.abs() < limit, 0.0, moved)


def sparsities(schedule: str, first: float, last: float, count: int) -> list[float]:
    """Growing strengths of the penalty: evenly spaced, or so in exp ("log_linear") or log ("exp_linear")."""
    if schedule == "log_linear":
        return np.log(np.linspace(np.exp(first), np.exp(last), count)).tolist()
    if schedule == "exp_linear":
        return np.geomspace(first, last, count).tolist()
    return np.linspace(first, last, count).tolist()


@ADAPTERS.register_module()
class SoRA(Adapter):
    """Low-rank update with a gate per rank; gates that a proximal step sets to zero take their rank out.

    W + s B diag(g) A with A (rank, dim_in), B (dim_out, rank), g (rank,) and s = alpha / rank, i.e.
    rank (dim_in + dim_out + 1) values per site. A and B learn by the run's optimizer; after its step the gates take an
    own Adam step at the run's learning rate lr (as in the authors' code eps is added to the root before its bias is
    corrected), and then the proximal step g <- sign(g) max(|g| - lr * sparsity, 0). The first gradient of the gates is
    zero because B is. Merging folds the gates in; nothing is left of ranks whose gate is zero.

    The official code differs in two ways: it thresholds by `sparsity` itself, not times lr, and sets what it has just
    moved below that threshold to zero, i.e. every gate below 2 * sparsity (variant="official"); and it adds
    `penalty` * mean |g| to the loss. There a training without sparsity is followed by further ones with growing
    sparsity; here `stages` split one run evenly (our design).

    Args:
        rank: inner width r.
        alpha: numerator of the scaling s; equal to the rank where None.
        sparsity: strength lambda of the penalty, in the first stage.
        max_sparsity: strength in the last stage; `sparsity` where None.
        stages: parts of the run with one strength each.
        schedule: "linear", "log_linear" or "exp_linear" spacing of the stages' strengths.
        penalty: factor of an extra loss, the mean of |g| over all gates.
        variant: "paper" or "official".
        betas: of the gates' Adam.
        eps: of the gates' Adam.
        gate_decay: weight decay of the gates.
        dropout: on the input of the update, in training.
        targets: roles of linears.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("all-linear",)
    roles = LINEARS
    paper = "SoRA (Ding et al., 2023)"
    mergeable = True

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        sparsity: float = 1.0,
        max_sparsity: float | None = None,
        stages: int = 1,
        schedule: str = "linear",
        penalty: float = 0.0,
        variant: str = "paper",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        gate_decay: float = 0.0,
        dropout: float = 0.0,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(rank=rank, stages=stages)
        self.require_strength(alpha=alpha)
        self.require_rate(dropout=dropout, beta1=betas[0], beta2=betas[1])
        if variant not in VARIANTS:
            raise InputError(f"SoRA: no variant '{variant}'{hint(variant, VARIANTS)}")
        if schedule not in SCHEDULES:
            raise InputError(f"SoRA: no schedule '{schedule}'{hint(schedule, SCHEDULES)}")
        last = sparsity if max_sparsity is None else max_sparsity
        if not 0 <= sparsity <= last:
            raise InputError(f"SoRA: sparsity must be at least 0 and at most max_sparsity, got {sparsity} and {last}")
        if max_sparsity is not None and stages == 1:
            raise InputError("SoRA: max_sparsity is reached in the last of several stages; set stages above 1")
        if schedule == "exp_linear" and sparsity == 0:
            raise InputError("SoRA: schedule 'exp_linear' cannot start from sparsity 0; give it a small one")
        self.rank, self.alpha, self.dropout, self.penalty, self.variant = rank, alpha, dropout, penalty, variant
        self.sparsity, self.max_sparsity, self.stages, self.schedule = sparsity, max_sparsity, stages, schedule
        self.betas, self.eps, self.gate_decay = tuple(betas), eps, gate_decay
        self.strengths = sparsities(schedule, sparsity, last, stages)
        self._gradients: Tensor | None = None

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> SoRASite:
        return SoRASite(site, self.rank, (self.rank if self.alpha is None else self.alpha) / self.rank, self.dropout)

    def build(self, backbone) -> None:
        super().build(backbone)
        for name in ("mean", "square"):  # Adam's moments, a row per site; in checkpoints, not in adapter files
            self.register_buffer(name, torch.zeros(len(self.pieces), self.rank))
        self.register_buffer("steps", torch.tensor(0))

    def losses(self) -> dict[str, Tensor]:
        if not self.penalty:
            return {}
        return {"sparsity": self.penalty * torch.stack([p.gate for p in self.pieces.values()]).abs().mean()}

    def on_gradients(self, progress: Progress) -> None:
        """Take the gates' gradients away from the run's optimizer, which leaves parameters without one alone."""
        gates = [p.gate for p in self.pieces.values()]
        if all(g.grad is not None for g in gates):
            self._gradients = torch.stack([g.grad for g in gates])
        for gate in gates:
            gate.grad = None

    @torch.no_grad()
    def on_update(self, progress: Progress) -> None:
        if self._gradients is None:
            return
        gradients, self._gradients = self._gradients, None
        beta1, beta2 = self.betas
        self.steps += 1
        self.mean.lerp_(gradients, 1 - beta1)
        self.square.lerp_(gradients.square(), 1 - beta2)
        t = self.steps.item()
        rate = progress.lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        gates = torch.stack([p.gate for p in self.pieces.values()])
        gates -= rate * self.mean / (self.square.sqrt() + self.eps)
        gates *= 1 - progress.lr * self.gate_decay
        limit = self.strength(progress) * (progress.lr if self.variant == "paper" else 1.0)
        for piece, gate in zip(self.pieces.values(), shrink(gates, limit, self.variant)):
            piece.gate.copy_(gate)

    def strength(self, progress: Progress) -> float:
        """The penalty's strength at this step of the run."""
        return self.strengths[min(progress.step * self.stages // progress.total, self.stages - 1)]

    def ranks(self) -> dict[str, int]:
        """Ranks whose gate is not zero, by site key."""
        return {key: int(piece.gate.count_nonzero()) for key, piece in self.pieces.items()}
