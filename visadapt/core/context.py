"""What attached modules may know about the image that is passing through."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import InputError


class Context:
    """State of one forward pass, shared by an `Adapted` and everything attached to it.

    Attributes:
        image: (B, C, H, W), normalised and padded.
        views: how many times every image stands in the batch. All images follow each other once, then all of them
            again; pieces that draw may draw for every view.
        grid: patch rows and columns.
        prefix: tokens before the patches (class, registers).
        prompts: how many tokens each prompt has between prefix and patches at this moment. By name, so that a block
            that runs again for its gradients counts them once.
        num_frames: frames per clip; images are frame-major within a clip.
        tasks: (B,) task number per image, None where there is one task only.
        ids: adapter name per image, None for the bare base; None where the batch is not mixed.
        values: free results, keyed "<adapter>.<name>".
    """

    def __init__(self) -> None:
        self.num_frames = 1
        self.ids: list[str | None] | None = None
        self.tasks: Tensor | None = None
        self.clear()

    def clear(self) -> None:
        """Forget the last image; clip length, routing and tasks stay."""
        self.image: Tensor | None = None
        self.views = 1
        self.grid: tuple[int, int] = (0, 0)
        self.prefix = 0
        self.prompts: dict[str, int] = {}
        self.values: dict[str, Any] = {}

    @property
    def inserted(self) -> int:
        """Number of prompt tokens that stand between prefix and patches at this moment."""
        return sum(self.prompts.values())

    def begin(self, image: Tensor, grid: tuple[int, int], prefix: int, views: int = 1) -> None:
        self.clear()
        self.image, self.grid, self.prefix, self.views = image, grid, prefix, views

    def clips(self, owner: str) -> int:
        """Number of clips in the batch.

        Raises:
            InputError: the images are no whole number of clips; `owner` is who asks.
        """
        images = self.image.shape[0]
        if images % self.num_frames:
            raise InputError(f"{owner}: {images} images are no whole number of clips of {self.num_frames} frames")
        return images // self.num_frames

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, D) into what stands before the patches and the patches (B, h*w, D)."""
        lead = self.prefix + self.inserted
        return x[:, :lead], x[:, lead:]

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle carries the settings, not the tensors of the last image."""
        return {"num_frames": self.num_frames, "ids": self.ids, "tasks": self.tasks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.clear()
