"""The frozen blocks in front of all that trains: where they end, and a pass without them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.adapted import Adapted
from ..errors import InputError


def first_block(adapted: Adapted) -> int | None:
    """The first block that something is attached to or that trains, their number where that is what follows them.

    Tokens that enter this block are the same in every step. None where the whole backbone is frozen.

    Raises:
        InputError: there are no such tokens, as the first block or what is before it changes, an adapter reads the
            image or the number of its task, or the backbone cannot start at a block.
    """
    backbone, pieces = adapted.backbone, adapted.pieces()
    changed = {piece.site.path for piece in pieces if piece.site is not None} | set(adapted.base_values.originals)
    changed |= {name for name, value in backbone.body.named_parameters() if value.requires_grad}
    if not changed and not any(value.requires_grad for value in adapted.parameters()):
        return None
    try:
        backbone.blocks()
    except InputError as error:
        raise InputError(f"cache_features needs a wholly frozen backbone here: {error}") from error
    first = min((backbone.layer_id(name) for name in changed), default=0) - 1  # layer ids count the stem
    reason = ""
    if any(piece.site is None for piece in pieces):
        reason = "read the image beside it"
    elif any(adapter.n_tasks > 1 for adapter in adapted.adapters.values()):
        reason = "depend on the task of an image"
    elif first < 1:
        reason = "change its features from the first block on; choose later ones, e.g. layers=[-1], or leave it out"
    if reason:
        names = ", ".join(adapted.adapters)
        raise InputError(f"cache_features needs a wholly frozen backbone; the adapters {names} {reason}")
    return first


class Start:
    """Passes of a backbone that start at one of its blocks.

    The network runs as it is, from its images on, but its first blocks do nothing, and the last of these hands over
    tokens that were kept. So positions, grids and the context of a pass are those of a whole pass.

    Args:
        adapted: the network.
        block: the one to start at, 1 or more.
    """

    def __init__(self, adapted: Adapted, block: int) -> None:
        self.adapted, self.block = adapted, block
        self.skipped = adapted.backbone.blocks()[:block]
        self.tokens: Tensor | None = None

    def record(self, images: Tensor) -> Tensor:
        """Tokens (B, L, D) that enter the block for normalised images (B, C, H, W)."""
        found = []
        handle = self.skipped[-1].register_forward_hook(lambda module, args, tokens: found.append(tokens))
        try:
            self.adapted(images)
        finally:
            handle.remove()
        return found[0]

    def begin(self, batch: dict[str, Any], dataset: Any) -> None:
        """Let all passes until `end` start with the tokens of a batch; one of images is left alone.

        Args:
            batch: its "features" (B, L, D) give way to "inputs" (B, C, H, W) that stand in for the images. They are no
                numbers, so that whatever reads them cannot go unnoticed.
            dataset: where it comes from.
        """
        if "features" not in batch:
            return
        self.tokens = batch.pop("features")
        for block in self.skipped:
            block.forward = self._skip
        self.skipped[-1].forward = self._hand_over
        shape = (len(self.tokens), self.adapted.backbone.in_chans, *dataset.size)
        batch["inputs"] = torch.tensor(torch.nan).expand(shape)

    def end(self) -> None:
        """Let passes start at the image again."""
        self.tokens = None
        for block in self.skipped:
            block.__dict__.pop("forward", None)

    @staticmethod
    def _skip(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x

    def _hand_over(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.tokens.to(x).repeat(self.adapted.ctx.views, 1, 1)
