"""Class maps of images and scenes, from nothing but an adapter file (and the base weights that it names)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..tasks.segment import best_class
from .from_file import FromFile


class MaskPredictor(FromFile):
    """An adapted segmentation model, rebuilt from its file."""

    @torch.inference_mode()
    def predict(self, images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """Class maps of images (H, W, C) of any sizes.

        Returns:
            Per image: mask (H, W) uint8 of class indices, and shares, the part of the pixels of each class that occurs,
            by its name; or error, where the scores are not finite.
        """
        answers: list[dict[str, Any]] = [{}] * len(images)
        for places, batch in self.batches(images):
            for i, scores in zip(places, self.task.scores(batch).float()):
                answers[i] = self._answer(scores, images[i].shape[:2])
        return answers

    def _answer(self, scores: Tensor, size: tuple[int, int]) -> dict[str, Any]:
        if not scores.isfinite().all():
            return {"error": "the scores are not finite; the image holds values far out of range"}
        mask = best_class(scores, size).cpu()
        shares = torch.bincount(mask.flatten(), minlength=len(self.classes)) / mask.numel()
        named = {name: round(share, 6) for name, share in zip(self.classes, shares.tolist()) if share}
        return {"mask": mask.numpy().astype(np.uint8), "shares": named}

    def score(self, tiles: Tensor) -> Tensor:
        """Scores (B, K, t, t) of raw tiles (B, C, t, t)."""
        return self.task.scores(self.task.data_preprocessor.normalize(tiles.to(self.device)))

    def predict_scene(self, source: str | os.PathLike, out: str | os.PathLike, **options: Any):
        """Write the class map of a GeoTIFF of any size; see `visadapt.predict.scene.predict_scene` for the options.

        Raises:
            InputError: images went through transforms in training that a scene does not go through, or what
                `predict_scene` refuses.
        """
        from .scene import predict_scene

        if self.transform is not None:
            names = ", ".join(entry["type"] for entry in self.transform.to_json())
            raise InputError(
                f"{Path(source).name}: the model was evaluated on images after {names}, which scenes do not go "
                "through; for scenes evaluate it on images as they are, without transforms and with tile=..."
            )
        fixed = {"classes": self.classes, "channels": self.channels, "bands": self.bands, "colors": self.palette}
        return predict_scene(source, out, self.score, **fixed, **options)
