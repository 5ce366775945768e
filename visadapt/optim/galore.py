"""GaLore: Adam in a low-rank subspace of each weight's gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from mmengine.registry import OPTIMIZERS
from torch import Tensor

from ..core.decompose import one_core_each, svd
from ..errors import InputError, hint
from ._adamw import AdamWBase, moments

PROJECTIONS = ("std", "reverse_std", "left", "right", "full")


@OPTIMIZERS.register_module()
class GaLore(AdamWBase):
    """Gradient low-rank projection (Zhao et al., arXiv 2403.03507), with AdamW.

    Every `update_proj_gap` steps, from the first on, the leading singular vectors U (o, r), V' (r, i) of the gradient
    G (o, i) of a weight are taken anew. Adam's moments are those of R = U' G or G V or U' G V; they are kept as they
    are when the subspace changes. With m, v of R at step t:
        W -= lr sqrt(1 - beta2^t) / (1 - beta1^t) scale (m / (sqrt(v) + eps) projected back);  W -= lr weight_decay W.
    Convolutions are worked on as (o, weights per output). Moments take r (o or i) values, for "full" r^2, instead of
    o i, and the vectors r times the side that was projected, for "full" both. Biases, norms and heads train by the same
    rule in full.

    Trains what `FullFineTune` trains; two or more dimensions make a weight, embeddings of one row (class tokens,
    positions) do not. Vectors have the signs of `core.decompose.svd`, so that every process has the same.

    Args:
        params: groups with matrices, from `TrainableGroups`.
        lr: learning rate; of the projected weights it is `scale` times as much.
        betas: decay rates of the moments.
        eps: added to the root of the second moment, before its correction.
        weight_decay: decoupled, after the update.
        rank: r; of a smaller weight, its smaller side.
        update_proj_gap: steps from one projection to the next.
        scale: factor on the projected update; recipes for fine-tuning have 4 with a small lr.
        proj_type: "std" projects the smaller side of G, "reverse_std" the larger one; "left" and "right" its outputs
            or inputs, "full" both.

    Raises:
        InputError: an unknown projection, a number out of range, or no matrices.
    """

    own = "matrices"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
    ) -> None:
        if proj_type not in PROJECTIONS:
            raise InputError(f"GaLore: unknown proj_type '{proj_type}'{hint(proj_type, PROJECTIONS)}")
        for name, value in (("rank", rank), ("update_proj_gap", update_proj_gap)):
            if value < 1:
                raise InputError(f"GaLore: {name} must be at least 1, got {value}")
        settings = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
        super().__init__(params, lr, betas, eps, weight_decay, settings)

    def update(self, group: dict[str, Any]) -> None:
        weights = [p for p in group["params"] if p.grad is not None]
        due = [p for p in weights if self.state[p].get("step", 0) % group["update_proj_gap"] == 0]
        if due:
            made = partial(singular_vectors, rank=group["rank"], proj_type=group["proj_type"])
            for p, vectors in zip(due, one_core_each(made, [p.grad.flatten(1) for p in due])):
                self.state[p].update(vectors)
        for p in weights:
            self._step(group, p, group["scale"])

    def plain(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            if p.grad is not None:
                self._step(group, p, 1.0)

    def _step(self, group: dict[str, Any], p: Tensor, scale: float) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        left, right = state.get("left"), state.get("right")
        low = p.grad if left is None and right is None else project(p.grad.flatten(1), left, right)
        state["step"] = step = state.get("step", 0) + 1
        first, second = moments(state, low, group)
        update = project_back(first / (second.sqrt().add_(group["eps"])), left, right)
        rate = group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        p.sub_(update.reshape(p.shape), alpha=scale * rate)
        p.mul_(1 - group["lr"] * group["weight_decay"])


def singular_vectors(grad: Tensor, rank: int, proj_type: str) -> dict[str, Tensor]:
    """The leading singular vectors of a gradient (o, i) that are projected on: left (o, r), right (r, i), or both."""
    smaller = "right" if grad.shape[0] >= grad.shape[1] else "left"
    larger = "left" if smaller == "right" else "right"
    sides = {"std": (smaller,), "reverse_std": (larger,), "full": ("left", "right")}.get(proj_type, (proj_type,))
    u, _, vt = svd(grad, lambda s: min(rank, len(s)), keep=False)  # a function: twice as fast as a number
    return {side: u if side == "left" else vt for side in sides}


def project(grad: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    low = grad if left is None else left.T @ grad
    return low if right is None else low @ right.T


def project_back(low: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    high = low if left is None else left @ low
    return high if right is None else high @ right
