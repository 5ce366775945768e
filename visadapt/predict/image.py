"""Prediction from nothing but an adapter file (and the base weights that it names)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core.io import read_manifest
from ..core.manifest import OF_TASKS
from ..datasets.base import to_tensor
from ..datasets.files import UnreadableImage, read_image
from ..errors import InputError
from ..registry import TASKS
from ..transforms.albu import Albu


def available(device: str | None) -> torch.device:
    """The device of that name; where None, a GPU if there is one.

    Raises:
        InputError: this machine has none of that name.
    """
    count = torch.cuda.device_count()
    names = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if device is None:
        return torch.device("cuda" if count else "cpu")
    if device not in names:
        raise InputError(f"no device '{device}' here; there is {', '.join(names)}")
    return torch.device(device)


class Predictor:
    """An adapted classifier, rebuilt from its file.

    Args:
        path: adapter file of a training run.
        weights: base weights in place of those that the file names, e.g. a local copy.
        merge: fold the adapters into the base, for the speed of the bare backbone, where they fold.
        device: "cpu", "cuda", or None for what there is.

    Raises:
        InputError: the file is damaged, has no task, or belongs to another base; the device is not there.
    """

    def __init__(
        self, path: str | os.PathLike, weights: str | None = None, merge: bool = True, device: str | None = None
    ) -> None:
        manifest = read_manifest(path)
        if "task" not in manifest or "main" not in manifest["heads"]:
            raise InputError(f"{path} holds adapters without a task; predict needs the file of a training run")
        self.device = available(device)
        backbone = {"type": manifest["backbone"]["type"], **manifest["backbone"]["arguments"]}
        if weights is not None:
            backbone["weights"] = weights
        head = manifest["heads"]["main"]
        if head["arguments"] is None:
            raise InputError(f"{path} has the head {head['type']}, which is no registered one; predict cannot build it")
        if missing := [key for key in OF_TASKS if key not in manifest]:
            raise InputError(f"{path} does not say {', '.join(missing)}; predict needs the file of a training run")
        head = {"type": head["type"], **head["arguments"]}
        self.task = TASKS.build({**manifest["task"], "backbone": backbone, "head": head})
        self.report = self.task.adapted.load(path, heads=self.task.heads)
        self.classes: list[str] = manifest["classes"]
        self.channels: int = manifest["channels"]
        self.transform = Albu(manifest["transforms"], self.channels) if manifest["transforms"] else None
        adapted = self.task.adapted
        if merge and any(p.folds and p.on for p in adapted.pieces()):
            adapted.merge()
        self.task.to(self.device).eval()

    @torch.inference_mode()
    def predict(self, images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """Predictions for images (H, W, C) of any sizes.

        Returns:
            Per image: label (class name), index, score, and scores (all classes, summing to 1); or error, where the
            scores are not finite.
        """
        ready = [image if self.transform is None else self.transform(image, 0) for image in images]
        scores: list[np.ndarray | None] = [None] * len(ready)
        for shape in dict.fromkeys(image.shape for image in ready):
            same = [i for i, image in enumerate(ready) if image.shape == shape]
            batch = torch.stack([to_tensor(ready[i]) for i in same]).to(self.device)
            for i, row in zip(same, self.task(self.task.data_preprocessor.normalize(batch)).float().softmax(1)):
                scores[i] = row.cpu().numpy()
        return [self._answer(s) for s in scores]

    def _answer(self, scores: np.ndarray) -> dict[str, Any]:
        if not np.isfinite(scores).all():
            return {"error": "the scores are not finite; the image holds values far out of range"}
        best = int(scores.argmax())
        named = self.classes[best] if best < len(self.classes) else str(best)
        return {"label": named, "index": best, "score": float(scores[best]), "scores": [float(s) for s in scores]}

    def predict_files(
        self, paths: Iterable[Path], batch_size: int = 32, strict: bool = False
    ) -> Iterator[tuple[Path, np.ndarray | None, dict[str, Any]]]:
        """Predictions for image files in their order, a batch at a time.

        Args:
            paths: image files.
            batch_size: images held at once.
            strict: stop at the first unreadable file; otherwise it is given as (path, None, {"error": reason}).
        """
        waiting: list[tuple[Path, np.ndarray | None, str]] = []
        for path in paths:
            try:
                waiting.append((path, read_image(path, self.channels), ""))
            except UnreadableImage as error:
                if strict:
                    raise
                waiting.append((path, None, str(error)))
            if len(waiting) == batch_size:
                yield from self._answers(waiting)
                waiting = []
        yield from self._answers(waiting)

    def _answers(
        self, batch: list[tuple[Path, np.ndarray | None, str]]
    ) -> Iterator[tuple[Path, np.ndarray | None, dict[str, Any]]]:
        answers = iter(self.predict([image for _, image, _ in batch if image is not None]))
        for path, image, reason in batch:
            yield path, image, {"error": reason} if image is None else next(answers)
