"""Labels of images, from nothing but an adapter file (and the base weights that it names)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .from_file import NOT_FINITE, FromFile


class Predictor(FromFile):
    """An adapted classifier, rebuilt from its file."""

    @torch.inference_mode()
    def predict(self, images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """Predictions for images (H, W, C) of any sizes.

        Returns:
            Per image: label (class name), index, score, and scores (all classes, summing to 1); or error, where the
            scores are not finite. Where images have several labels: label (joined names), labels (those above 0.5),
            score (the highest) and scores, each between 0 and 1.
        """
        answers: list[dict[str, Any]] = [{}] * len(images)
        for places, batch in self.batches(images):
            number = self.task_number
            tasks = None if number is None else torch.full((len(places),), number, device=self.device)
            name, scores = self.task.scores(self.task(batch, task=tasks).float())
            for i, row in zip(places, scores):
                answers[i] = self._answer(row.cpu().numpy(), several=name == "probabilities")
        return answers

    def _answer(self, scores: np.ndarray, several: bool) -> dict[str, Any]:
        if not np.isfinite(scores).all():
            return dict(NOT_FINITE)
        if several:
            chosen = [n for n, score in zip(self.classes, scores) if score > 0.5]
            named = {"label": ", ".join(chosen) or "none", "labels": chosen, "score": float(scores.max())}
            return {**named, "scores": [float(s) for s in scores]}
        best = int(scores.argmax())
        named = self.classes[best] if best < len(self.classes) else str(best)
        return {"label": named, "index": best, "score": float(scores[best]), "scores": [float(s) for s in scores]}
