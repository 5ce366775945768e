"""Classification of clips with an adapted image backbone."""

from __future__ import annotations

from typing import Any

from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from ..errors import InputError, hint
from ..registry import TASKS
from .classify import ImageClassifier

FRAME_POOLS = ("mean", "attention")


@TASKS.register_module()
class VideoClassifier(ImageClassifier):
    """One label per clip: the backbone sees all frames as images, their vectors are pooled over time, head.

    Adapters that look into other frames read the length of clips from `ctx.num_frames`; all others work frame by frame.
    In evaluation a clip may be seen several times, "inputs" holding all frames of the first view, then those of the
    next: the softmax of all views is averaged.

    Args:
        backbone: config of a backbone.
        head: config of a head; its input width is filled in.
        num_frames: T, frames per view, as in the data sets.
        adapters: configs by adapter name; the frozen backbone alone where None.
        loss: config of a loss; cross-entropy where None.
        pool: one vector per frame: native, cls, avg or cls_avg.
        frame_pool: "mean" over the frames, which knows nothing of their order, or "attention": one learned query over
            frames with learned positions and an MLP (timm's AttentionPoolLatent), trained with the head.
        pool_heads: heads of the attention.
        base_mode: "eval", or "train" for recipes with stochastic depth in the backbone.
        checkpointing: recompute block activations in the backward pass instead of keeping them.

    Raises:
        InputError: an unknown pool, no frames, heads that do not divide the width, a loss that compares views.
    """

    def __init__(
        self,
        backbone: dict,
        head: dict,
        num_frames: int = 8,
        adapters: dict[str, dict] | None = None,
        loss: dict | None = None,
        pool: str = "native",
        frame_pool: str = "mean",
        pool_heads: int = 8,
        base_mode: str = "eval",
        checkpointing: bool = False,
    ) -> None:
        if frame_pool not in FRAME_POOLS:
            raise InputError(f"VideoClassifier: unknown frame_pool '{frame_pool}'{hint(frame_pool, FRAME_POOLS)}")
        if not isinstance(num_frames, int) or num_frames < 1:
            raise InputError(f"VideoClassifier: num_frames must be a whole number of at least 1, got {num_frames!r}")
        super().__init__(backbone, head, adapters, loss, pool, base_mode=base_mode, checkpointing=checkpointing)
        if getattr(self.criterion, "views", 1) > 1:
            raise InputError(f"VideoClassifier: {type(self.criterion).__name__} compares views of images; take another")
        self.num_frames, self.frame_pool, self.pool_heads = num_frames, frame_pool, pool_heads
        self.adapted.ctx.num_frames = num_frames
        self.pooling = self._pooling() if frame_pool == "attention" else None
        self.adapted.set_trainable(*self.adapted.adapters, heads=self.heads.values())

    def _pooling(self) -> nn.Module:
        width = self.adapted.backbone.pooled_dim(self.pool)
        if self.pool_heads < 1 or width % self.pool_heads:
            raise InputError(f"VideoClassifier: pool_heads={self.pool_heads} does not divide the width {width}")
        return AttentionPoolLatent(
            width, num_heads=self.pool_heads, feat_size=self.num_frames, pos_embed="abs", mlp_ratio=1.0
        )

    @property
    def heads(self) -> dict[str, nn.Module]:
        return {"main": self.head} | ({} if self.pooling is None else {"frames": self.pooling})

    def card(self) -> dict[str, Any]:
        kept = {key: getattr(self, key) for key in ("pool", "num_frames", "frame_pool", "pool_heads")}
        return {"task": {"type": type(self).__name__, **kept}}

    def encode(self, inputs: Tensor, views: int = 1, task: Tensor | None = None) -> Tensor:
        """(B, V * T, C, H, W) normalised clips to one vector per frame (B, V * T, D).

        Raises:
            InputError: images, or another number of frames.
        """
        if inputs.ndim != 5 or inputs.shape[1] % self.num_frames:
            raise InputError(
                f"VideoClassifier takes clips (B, {self.num_frames} frames or a multiple, C, H, W), got "
                f"{tuple(inputs.shape)}; give model and data sets the same num_frames"
            )
        clips, frames = inputs.shape[:2]
        tasks = None if task is None else task.repeat_interleave(frames)
        return super().encode(inputs.flatten(0, 1), task=tasks).unflatten(0, (clips, frames))

    def logits(self, features: Tensor) -> Tensor:
        """Logits (B, K) of frames (B, T, D), or (B, V, K) where there are several views."""
        views = features.unflatten(1, (-1, self.num_frames))
        pooled = views.mean(2) if self.pooling is None else self.pooling(views.flatten(0, 1)).view(*views.shape[:2], -1)
        return self.head(pooled).squeeze(1)

    def scores(self, logits: Tensor) -> tuple[str, Tensor]:
        return "scores", logits.softmax(-1) if logits.ndim == 2 else logits.softmax(-1).mean(1)

    def loss(
        self, inputs: Tensor | None, labels: Tensor, features: Tensor | None = None, task: Tensor | None = None
    ) -> dict[str, Tensor]:
        given = inputs if features is None else features
        if inputs is not None and inputs.ndim != 5:
            raise InputError(f"VideoClassifier takes clips (B, T, C, H, W), got images {tuple(inputs.shape)}")
        if given.shape[1] != self.num_frames:
            raise InputError(
                f"VideoClassifier: training clips have {given.shape[1]} frames, the model takes {self.num_frames}; "
                "give model and data set the same num_frames, and several views to evaluation sets only"
            )
        return super().loss(inputs, labels, features, task)
