"""Semantic segmentation with an adapted backbone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..ignored import IGNORED
from ..registry import HEADS, LOSSES, NECKS, TASKS, arguments_of
from .base import AdaptedTask


@TASKS.register_module()
class Segmenter(AdaptedTask):
    """One class per pixel: maps of an adapted backbone, neck, head.

    Pixels of the value 255 in the masks take no part in losses and metrics.

    Args:
        backbone: config of a backbone; its `out_indices` say which levels the head sees.
        head: config of a head for maps; its `in_channels` are filled in.
        neck: config of a neck; the maps as they are where None.
        adapters: configs by adapter name; the frozen backbone alone where None.
        loss: config of a loss for logits (B, K, H, W) and masks (B, H, W); PixelCrossEntropy where None. Heads that
            predict sets of masks have a loss of their own and take none here.
        base_mode: "eval", or "train" for recipes with stochastic depth in the backbone.
        checkpointing: recompute block activations in the backward pass instead of keeping them.

    Raises:
        InputError: a backbone without maps, a neck for other levels, a loss beside the head's own, or a head and
            adapters that do not agree on queries.
    """

    def __init__(
        self,
        backbone: dict,
        head: dict,
        neck: dict | None = None,
        adapters: dict[str, dict] | None = None,
        loss: dict | None = None,
        base_mode: str = "eval",
        checkpointing: bool = False,
    ) -> None:
        super().__init__(backbone, adapters, base_mode, checkpointing)
        built = self.adapted.backbone
        if not built.out_indices:
            raise InputError("Segmenter: the backbone gives no maps; name its levels, e.g. out_indices=[2, 5, 8, 11]")
        self.neck = None if neck is None else NECKS.build(neck)
        channels = list(built.embed_dims)
        self.head = HEADS.build(head, in_channels=channels if neck is None else self.neck.out_channels(channels))
        if hasattr(self.head, "loss") and loss is not None:
            raise InputError(f"Segmenter: {type(self.head).__name__} has a loss of its own; leave `loss` out")
        self.criterion = None if hasattr(self.head, "loss") else LOSSES.build(loss or {"type": "PixelCrossEntropy"})
        if adapters is not None:  # else those of a file may follow
            self._check_queries()
        self.adapted.set_trainable(*self.adapted.adapters, heads=[self.head])

    def _check_queries(self) -> None:
        offered, head = self.adapted.queries(), type(self.head).__name__
        linked = getattr(self.head, "linked_queries", False)
        if offered is not None and not linked:
            raise InputError(
                f"Segmenter: an adapter offers queries and {head} takes none; use "
                "Mask2FormerHead(linked_queries=True), or an adapter without them"
            )
        if linked and offered is None:
            raise InputError(
                f"Segmenter: {head}(linked_queries=True) takes the queries of an adapter and none offers any; add one "
                "that does, such as Rein with query_dim, or leave linked_queries out"
            )
        if linked and offered.shape[1] != self.head.width:
            raise InputError(
                f"Segmenter: the adapter's queries have {offered.shape[1]} channels, {head} takes {self.head.width}; "
                "give both one width (query_dim of Rein, width of the head)"
            )

    def card(self) -> dict[str, Any]:
        neck = {} if self.neck is None else {"neck": {"type": type(self.neck).__name__, **arguments_of(self.neck)}}
        return {"task": {"type": type(self).__name__, **neck}}

    def encode(self, inputs: Tensor) -> tuple[list[Tensor], *tuple[Tensor, ...]]:
        """What the head sees of normalised images (B, C, H, W).

        Returns:
            Maps (B, D, h, w) per level, fine to coarse, and behind them the queries (n, d) of an adapter that has some.
        """
        maps, queries = self.adapted(inputs).maps, self.adapted.queries()
        maps = maps if self.neck is None else self.neck(maps)
        return (maps,) if queries is None else (maps, queries)

    def scores(self, inputs: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) to scores (B, K, H, W): logits, or what else the head gives."""
        return self._fit(self.head(*self.encode(inputs)), inputs)

    def _fit(self, scores: Tensor, inputs: Tensor) -> Tensor:
        """Scores (B, K, h, w) resized to the images, without what the backbone padded at the bottom and the right."""
        h, w = inputs.shape[2:]
        padded = self.adapted.backbone.pad(inputs[:1, :1]).shape[2:]
        # in float32: gradients of many pixels meet in one cell
        return F.interpolate(scores.float(), padded, mode="bilinear", align_corners=False)[..., :h, :w]

    def forward(
        self,
        inputs: Tensor,
        masks: list[Tensor] | None = None,
        mode: str = "tensor",
        path: list[str] | None = None,
        valid: Tensor | None = None,
        index: Tensor | None = None,
        unreadable: list[str] | None = None,
    ) -> Tensor | dict[str, Tensor] | list[dict[str, Any]]:
        """mmengine's contract: `mode` is "tensor" (scores), "loss" (dict of losses) or "predict" (list of dicts).

        In "predict" scores are resized to the mask of the image, where it has another size, before the best class of
        every pixel is taken. Per image: "pred" (H, W) int64, "mask" or None, "path" and "valid".
        """
        if mode == "loss":
            return self.loss(inputs, masks)
        scores = self.scores(inputs)
        if mode == "tensor":
            return scores
        given = masks if masks is not None else [None] * len(scores)
        paths = path or [""] * len(scores)
        usable = valid.tolist() if valid is not None else [True] * len(scores)
        preds = [best_class(s, s.shape[1:] if m is None else m.shape) for s, m in zip(scores, given)]
        return [{"pred": p, "mask": m, "path": n, "valid": v} for p, m, n, v in zip(preds, given, paths, usable)]

    def loss(self, inputs: Tensor, masks: list[Tensor]) -> dict[str, Tensor]:
        """Training losses, those of the adapters included.

        Raises:
            InputError: a mask of another size than its image, or no labelled pixel in the whole batch.
        """
        return self.mask_losses(inputs, stacked(masks, inputs)) | self.adapted.losses()

    def mask_losses(self, inputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Losses of images (B, C, H, W) and masks (B, H, W) int64 without those of the adapters."""
        maps, *queries = self.encode(inputs)
        if self.criterion is not None:
            return {"loss_task": self.criterion(self._fit(self.head(maps), inputs), target)}
        height, width = self.adapted.backbone.pad(inputs[:1, :1]).shape[2:]  # what the maps cover
        grown = (0, width - target.shape[2], 0, height - target.shape[1])
        return self.head.loss(maps, F.pad(target, grown, value=IGNORED), *queries)


def stacked(masks: list[Tensor], inputs: Tensor) -> Tensor:
    """Masks (H, W) of a training batch as (B, H, W) int64.

    Raises:
        InputError: one has another size than the images, or no pixel of the batch is labelled.
    """
    h, w = inputs.shape[2:]
    wrong = next((m for m in masks if m.shape != (h, w)), None)
    if wrong is not None:
        raise InputError(f"a mask of {tuple(wrong.shape)} in a batch of {h}x{w} images; train without native_masks")
    target = torch.stack(masks)
    if not (target != IGNORED).any():
        raise InputError(
            f"no pixel of the {len(masks)} masks of a batch is labelled (all are {IGNORED}): the loss is a mean over "
            "nothing; check the label map with `visadapt data check`, or take larger batches or crops"
        )
    return target


def best_class(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Class of the highest score at every pixel: (K, h, w) to (H, W) int64 after bilinear resizing."""
    if scores.shape[1:] != size:
        scores = F.interpolate(scores[None], tuple(size), mode="bilinear", align_corners=False)[0]
    return scores.argmax(0)
