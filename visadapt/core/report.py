"""What trains, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .adapted import Adapted


@dataclass(frozen=True)
class TrainableReport:
    """Rows (name, what, pieces, trainable, frozen) and the size of the base."""

    rows: list[tuple[str, str, int, int, int]]
    base: int

    @property
    def trainable(self) -> int:
        return sum(row[3] for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{'part':<16}{'type':<16}{'pieces':>8}{'trainable':>14}{'frozen':>14}{'of base':>10}"]
        for name, what, pieces, trainable, frozen in [*self.rows, ("total", "", 0, self.trainable, self.base)]:
            share = 100 * trainable / max(self.base, 1)
            lines.append(f"{name:<16}{what:<16}{pieces or '':>8}{trainable:>14,}{frozen:>14,}{share:>9.3f}%")
        return "\n".join(lines)


def _counts(module: nn.Module) -> tuple[int, int]:
    parameters = list(module.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return trainable, sum(p.numel() for p in parameters) - trainable


def trainable_report(adapted: Adapted, heads: dict[str, nn.Module]) -> TrainableReport:
    """Count the parameters of every adapter and head."""
    rows = []
    for name, adapter in adapted.adapters.items():
        trainable, frozen = _counts(adapter)
        in_place = adapted.base_values.parameters(name, adapted.backbone.body)
        trainable += sum(p.numel() for p in in_place if p.requires_grad)
        rows.append((name, type(adapter).__name__, len(adapter.pieces) + len(in_place), trainable, frozen))
    for name, head in heads.items():
        rows.append((f"head {name}".strip(), type(head).__name__, 1, *_counts(head)))
    return TrainableReport(rows, sum(p.numel() for p in adapted.backbone.parameters()))
