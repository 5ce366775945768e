"""LoRA-Pro: gradients of the factors that change the weight as its own Adam would."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from mmengine.registry import OPTIMIZERS
from torch import Tensor

from ..errors import InputError, hint
from ._adamw import AdamWBase, adam_ratio

VARIANTS = ("paper", "official")
CUTOFF = torch.finfo(torch.float32).eps
"""Eigenvalues below r times this, relative to the largest, count as zero: gradients have no more digits."""

Spectrum = tuple[Tensor, Tensor]


@OPTIMIZERS.register_module()
class LoRAPro(AdamWBase):
    """LoRA-Pro with Adam (Wang et al., 2024) for pairs A (r, i), B (o, r) of updates s B A of W (o, i).

    With the gradients gA, gB of the factors, d = `delta`, ^+ the pseudoinverse and P = I - B (B'B + dI)^+ B':
        a = s^-2 (B'B + dI)^+ gA,  b = s^-2 P gB (AA' + dI)^+,  g = s (B a + b A)
    is the change of W nearest to its gradient that the factors can make. Adam's moments are those of g, (o, i); from
    their ratio h come gA' = s B' h and gB' = s h A', X solves (B'B) X + X (AA') = -s^-2 (B'B + dI)^+ gA' A', and
        A -= lr (s^-2 (B'B + dI)^+ gA' + X A),  B -= lr (s^-2 P gB' (AA' + dI)^+ - B X).
    Where B = 0 the same formulas give X = 0, an A that stays and B -= lr s^-2 gB' (AA')^+.

    The state of a pair is 2 o i values, as if W itself trained. P is never formed. All other parameters train by AdamW.
    Our design, as the source has no weight decay: it is decoupled and acts on both factors.

    Args:
        params: groups with pairs, from `TrainableGroups`.
        lr: learning rate; the paper's recipe has 2e-5 for language models.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        delta: d.
        variant: "official" corrects the moments at step t as if it were step t + 1, as the published code does.

    Raises:
        InputError: an unknown variant, a number out of range, a scale of 0, or no pairs.
    """

    own = "pairs"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 1e-8,
        variant: str = "paper",
    ) -> None:
        if variant not in VARIANTS:
            raise InputError(f"LoRAPro: unknown variant '{variant}'{hint(variant, VARIANTS)}")
        if not delta > 0:
            raise InputError(f"LoRAPro: delta must be above 0, got {delta}")
        super().__init__(params, lr, betas, eps, weight_decay, {"delta": delta, "variant": variant})
        if not all(scale for group in self.param_groups for scale in group.get("pairs", ())):
            raise InputError("LoRAPro: an adapter has the scale 0, so that nothing of it can train; set its alpha")

    def update(self, group: dict[str, Any]) -> None:
        whole = zip(group["params"][0::2], group["params"][1::2], group["pairs"])
        pairs = [(a, b, s) for a, b, s in whole if a.grad is not None and b.grad is not None]
        grams = [gram for a, b, _ in pairs for gram in (_gram(b.T), _gram(a))]
        spectra = eigh_all(grams)
        for (a, b, s), of_b, of_a in zip(pairs, spectra[0::2], spectra[1::2]):
            moves = self._adjusted(group, a, b, s, of_a, of_b)
            for p, move in zip((a, b), moves):
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * move.to(p.dtype))

    def _adjusted(
        self, group: dict[str, Any], a: Tensor, b: Tensor, s: float, of_a: Spectrum, of_b: Spectrum
    ) -> tuple[Tensor, Tensor]:
        """The gradients of A and B that are stepped along. What has a side of r is in float64, for 1 / d is large."""
        wide_a, wide_b = a.double(), b.double()
        inverse_a, inverse_b = (pseudoinverse(*spectrum, group["delta"]) for spectrum in (of_a, of_b))

        def solved(grad_a: Tensor, grad_b: Tensor) -> tuple[Tensor, Tensor]:
            grad_a, grad_b = grad_a.double(), grad_b.double()
            beyond = grad_b - wide_b @ (inverse_b @ (wide_b.T @ grad_b))
            return inverse_b @ grad_a / s**2, beyond @ inverse_a / s**2

        move_a, move_b = solved(a.grad, b.grad)
        nearest = s * torch.cat([b, move_b.to(b.dtype)], 1) @ torch.cat([move_a.to(a.dtype), a])
        state = self.state[b]
        state["step"] = state.get("step", 0) + 1
        ratio = adam_ratio(state, nearest, state["step"] + (group["variant"] == "official"), group)
        move_a, move_b = solved(s * (b.T @ ratio), s * (ratio @ a.T))
        x = sylvester(of_b, of_a, -move_a @ wide_a.T)
        return move_a + x @ wide_a, move_b - wide_b @ x


def _gram(a: Tensor) -> Tensor:
    a = a.double()
    return a @ a.T


def eigh_all(matrices: list[Tensor]) -> list[Spectrum]:
    """Eigenvalues (n,) and vectors (n, n) of positive semidefinite matrices; equal sizes in one call."""
    found: dict[int, Spectrum] = {}
    for size in {len(m) for m in matrices}:
        where = [n for n, m in enumerate(matrices) if len(m) == size]
        values, vectors = torch.linalg.eigh(torch.stack([matrices[n] for n in where]))
        found |= dict(zip(where, zip(values, vectors)))
    return [found[n] for n in range(len(matrices))]


def _reciprocal(values: Tensor, size: int) -> Tensor:
    """1 / values, 0 where a value is small beside the largest."""
    small = values <= size * CUTOFF * values.max()
    return torch.where(small, 0.0, 1 / values.masked_fill(small, 1.0))


def pseudoinverse(values: Tensor, vectors: Tensor, delta: float) -> Tensor:
    """(M + delta I)^+ of the matrix with this spectrum."""
    return vectors * _reciprocal(values + delta, len(values)) @ vectors.T


def sylvester(left: Spectrum, right: Spectrum, constant: Tensor) -> Tensor:
    """The X with L X + X R = constant for L, R given by their spectra; 0 in directions that neither has."""
    (values, u), (others, v) = left, right
    sums = values[:, None] + others
    return u @ (u.T @ constant @ v * _reciprocal(sums, len(values))) @ v.T
