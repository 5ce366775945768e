"""Image classification with any number of classes per image."""

from __future__ import annotations

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

    def scores(self, logits: Tensor) -> tuple[str, Tensor]:
        return "probabilities", logits.sigmoid()
