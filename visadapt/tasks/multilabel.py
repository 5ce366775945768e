"""Image classification with any number of classes per image."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..registry import TASKS
from .classify import ImageClassifier


@TASKS.register_module()
class MultilabelClassifier(ImageClassifier):
    """Any number of labels per image: adapted backbone, pooled vector, head; each class is decided by itself.

    Labels are multi-hot (B, K). Predictions hold "probabilities" (K,), the sigmoid of the logits, in place of "scores".

    Args:
        backbone: see ImageClassifier, as are the arguments below.
        head: config of a head.
        adapters: configs by adapter name.
        loss: config of a loss; MultilabelBCE where None.
        pool: native, cls, avg or cls_avg.
        base_mode: "eval" or "train".
        checkpointing: recompute block activations in the backward pass.
    """

    def __init__(
        self,
        backbone: dict,
        head: dict,
        adapters: dict[str, dict] | None = None,
        loss: dict | None = None,
        pool: str = "native",
        base_mode: str = "eval",
        checkpointing: bool = False,
    ) -> None:
        loss = loss or {"type": "MultilabelBCE"}
        super().__init__(backbone, head, adapters, loss, pool, base_mode=base_mode, checkpointing=checkpointing)

    def forward(
        self,
        inputs: Tensor | None = None,
        labels: Tensor | None = None,
        mode: str = "tensor",
        features: Tensor | None = None,
        path: list[str] | None = None,
        valid: Tensor | None = None,
        index: Tensor | None = None,
        unreadable: list[str] | None = None,
        task: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor] | list[dict[str, Any]]:
        """mmengine's contract: `mode` is "tensor" (logits), "loss" (dict of losses) or "predict" (list of dicts)."""
        if mode == "loss":
            return self.loss(inputs, labels, features, task)
        logits = super().forward(inputs, features=features, task=task)
        if mode == "tensor":
            return logits
        self.adapted.ctx.tasks = None
        probabilities = logits.float().sigmoid()
        given = labels.tolist() if labels is not None else [None] * len(logits)
        paths = path or [""] * len(logits)
        usable = valid.tolist() if valid is not None else [True] * len(logits)
        rows = zip(probabilities, given, paths, usable)
        return [{"probabilities": s, "label": n, "path": p, "valid": v} for s, n, p, v in rows]
