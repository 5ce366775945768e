"""Image classification with an adapted backbone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backbones.base import POOLS
from ..errors import InputError, hint
from ..registry import HEADS, LOSSES, TASKS, TRANSFORMS
from .base import AdaptedTask


@TASKS.register_module()
class ImageClassifier(AdaptedTask):
    """One label per image: adapted backbone, pooled vector, head.

    Args:
        backbone: config of a backbone.
        head: config of a head; its input width is filled in.
        adapters: configs by adapter name; the frozen backbone alone where None.
        loss: config of a loss; cross-entropy where None. One with an attribute `views` is given the logits of that
            many passes of every image.
        pool: native, cls, avg or cls_avg.
        mix: mixup and cutmix on training batches.
        base_mode: "eval", or "train" for recipes with stochastic depth in the backbone.
        checkpointing: recompute block activations in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        backbone: dict,
        head: dict,
        adapters: dict[str, dict] | None = None,
        loss: dict | None = None,
        pool: str = "native",
        mix: dict | None = None,
        base_mode: str = "eval",
        checkpointing: bool = False,
    ) -> None:
        if pool not in POOLS:
            raise InputError(f"unknown pool '{pool}'{hint(pool, POOLS)}")
        super().__init__(backbone, adapters, base_mode, checkpointing)
        self.pool = pool
        self.head = HEADS.build(head, in_dim=self.adapted.backbone.pooled_dim(pool))
        self.criterion = LOSSES.build(loss or {"type": "CrossEntropy"})
        self.mix = None if mix is None else TRANSFORMS.build({"type": "BatchMix", **mix})
        self.adapted.set_trainable(*self.adapted.adapters, heads=[self.head])

    def card(self) -> dict[str, Any]:
        """What an adapter file must say to rebuild this task."""
        return {"task": {"type": type(self).__name__, "pool": self.pool}}

    def encode(self, inputs: Tensor, views: int = 1, task: Tensor | None = None) -> Tensor:
        """(B, C, H, W) normalised images to pooled vectors (views * B, D), all images once and then again.

        `task` (B,) int64 says which task each image belongs to, for adapters with several tasks.
        """
        self.adapted.ctx.tasks = task  # it stays until the next batch, for blocks that run again in the backward pass
        return self.adapted(inputs, views).pooled(self.pool)

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
        """mmengine's contract: `mode` is "tensor" (logits), "loss" (dict of losses) or "predict" (list of dicts).

        `features` are pooled vectors from a cache that stand in for `inputs`; `task` as in `encode`.
        """
        if mode == "loss":
            return self.loss(inputs, labels, features, task)
        logits = self.logits(self.encode(inputs, task=task) if features is None else features)
        if mode == "tensor":
            return logits
        self.adapted.ctx.tasks = None
        name, scores = self.scores(logits.float())
        given = labels.tolist() if labels is not None else [-1] * len(scores)
        paths = path or [""] * len(scores)
        usable = valid.tolist() if valid is not None else [True] * len(scores)
        return [{name: s, "label": n, "path": p, "valid": v} for s, n, p, v in zip(scores, given, paths, usable)]

    def logits(self, features: Tensor) -> Tensor:
        """Logits (B, K) of what `encode` gave."""
        return self.head(features)

    def scores(self, logits: Tensor) -> tuple[str, Tensor]:
        """What predictions say of logits (B, K): its name in them, and the values (B, K)."""
        return "scores", logits.softmax(1)

    def loss(
        self, inputs: Tensor | None, labels: Tensor, features: Tensor | None = None, task: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Training losses; images and labels are mixed first where the recipe asks for it."""
        target = labels
        if self.mix is not None and features is None:
            if task is not None:
                raise InputError("mix would blend images of different tasks; leave it out where batches have a 'task'")
            inputs, target = self.mix(inputs, labels, self.head.num_classes)
        views = getattr(self.criterion, "views", 1)
        logits = self.logits(self.encode(inputs, views, task) if features is None else features.repeat(views, 1))
        loss, regularisers = self.criterion(logits, target), self.adapted.losses()
        return {"loss_task": loss, **regularisers} if regularisers else {"loss": loss}
