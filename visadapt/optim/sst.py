"""Sparse spectral training: a weight trains as its own singular value decomposition."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from mmengine.registry import OPTIMIZERS
from torch import Tensor

from ..core.decompose import one_core_each, svd
from ..errors import InputError
from ._adamw import AdamWBase, adam_ratio


@OPTIMIZERS.register_module()
class SST(AdamWBase):
    """Sparse spectral training of weights W (o, i) = U diag(sigma) V', m = min(o, i), with Adam.

    From the paper (Sparse Spectral Training, 2024): all singular values learn in every step; of the singular vectors r
    learn at a time, drawn with probabilities proportional to the singular values; W is decomposed anew from time to
    time; the gradient of vectors leaves out their singular value and their own direction. With G the gradient of W and
    S the drawn indices:
        sigma: diag(U' G V);  U_S: G V_S less its part along U_S;  V_S: G' U_S less its part along V_S, by columns.

    Our design where the paper is not at hand (there is no official code): the model keeps W as its parameter, G comes
    from it, and U, sigma, V are state. W is written back after every step; with that a step costs two products, each
    that of the layer itself for m tokens. Adam has the update of all three, after which the drawn vectors are given
    length 1. A draw stays for `update_gap` steps; then r others are drawn, and the moments of vectors start afresh,
    with their learning rate rising linearly over `warmup` steps. After ceil(m / r) draws, about all vectors, W is
    decomposed anew and the moments of sigma start afresh too. Weight decay acts on sigma. Draws depend on the seed, the
    weight and the step alone: equal on every process and after a resume. Convolutions are worked on as (o, weights per
    output).

    Trains what `FullFineTune` trains; biases, norms, embeddings of one row and heads learn by AdamW.

    Args:
        params: groups with matrices, from `TrainableGroups`.
        lr: learning rate of vectors, singular values and all other parameters.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        rank: r; a twelfth of m where None, and at most m.
        update_gap: steps for which a draw stays.
        warmup: steps.
        seed: of the draws.

    Raises:
        InputError: a number out of range, or no matrices.
    """

    own = "matrices"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int | None = None,
        update_gap: int = 200,
        warmup: int = 20,
        seed: int = 0,
    ) -> None:
        for name, value in (("rank", 1 if rank is None else rank), ("update_gap", update_gap), ("warmup", warmup)):
            if value < 1:
                raise InputError(f"SST: {name} must be at least 1, got {value}")
        settings = {"rank": rank, "update_gap": update_gap, "warmup": warmup, "seed": seed}
        super().__init__(params, lr, betas, eps, weight_decay, settings)

    def update(self, group: dict[str, Any]) -> None:
        weights = [p for p in group["params"] if p.grad is not None]
        self._decompose(group, weights)
        for p in weights:
            if self.state[p]["step"] % group["update_gap"] == 0:
                self._draw(group, p)
            self._step(group, p)
            self.state[p]["step"] += 1

    def _decompose(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        """Factors of the weights that are at the beginning of a round."""
        new = [p for p in weights if not self.state[p]]
        again = [p for p in weights if self.state[p] and self.state[p]["step"] % self._round(group, p) == 0]
        for due, keep in (pair for pair in ((new, True), (again, False)) if pair[0]):
            found = one_core_each(partial(svd, keep=keep), [p.flatten(1) for p in due])
            for p, (u, sigma, vt) in zip(due, found):
                self.state[p] = {"step": self.state[p].get("step", 0), "u": u, "sigma": sigma, "vt": vt}

    @staticmethod
    def _rank(group: dict[str, Any], size: int) -> int:
        return max(size // 12, 1) if group["rank"] is None else min(group["rank"], size)

    def _round(self, group: dict[str, Any], p: Tensor) -> int:
        """Steps from one decomposition to the next."""
        size = min(p.flatten(1).shape)
        return group["update_gap"] * math.ceil(size / self._rank(group, size))

    def _draw(self, group: dict[str, Any], p: Tensor) -> None:
        state, sigma = self.state[p], self.state[p]["sigma"]
        number = [id(q) for g in self.param_groups for q in g["params"]].index(id(p))
        seed = (group["seed"] * 1_000_003 + number) * 1_000_003 + state["step"]
        generator = torch.Generator().manual_seed(seed % 2**63)
        chances = sigma.cpu().double().abs().clamp(min=1e-30)  # all can be drawn, also those at zero
        index = torch.multinomial(chances, self._rank(group, len(sigma)), generator=generator)
        state["index"] = index.to(sigma.device)
        for key in [k for k in state if k.startswith(("u_", "vt_"))]:
            del state[key]

    def _step(self, group: dict[str, Any], p: Tensor) -> None:
        state, grad = self.state[p], p.grad.flatten(1)
        u, sigma, vt, index = (state[key] for key in ("u", "sigma", "vt", "index"))
        index = index.long()  # loading an optimizer's state turns whole numbers into those of the parameter
        image = grad @ vt.T  # (o, m)
        slopes = (u * image).sum(0)
        old_u, old_vt = u[:, index], vt[index]
        grad_u = image[:, index] - old_u * slopes[index]
        grad_vt = old_u.T @ grad - slopes[index, None] * old_vt
        in_draw, in_round = (state["step"] % steps for steps in (group["update_gap"], self._round(group, p)))
        lr = group["lr"]
        rate = lr * min(1.0, (in_draw + 1) / group["warmup"])
        u[:, index] = _unit(old_u - rate * adam_ratio(state, grad_u, in_draw + 1, group, "u_"), 0)
        vt[index] = _unit(old_vt - rate * adam_ratio(state, grad_vt, in_draw + 1, group, "vt_"), 1)
        sigma.mul_(1 - lr * group["weight_decay"])
        sigma.sub_(lr * adam_ratio(state, slopes, in_round + 1, group, "sigma_"))
        p.copy_(((u * sigma) @ vt).view_as(p))


def _unit(vectors: Tensor, dim: int) -> Tensor:
    return vectors / vectors.norm(dim=dim, keepdim=True)
