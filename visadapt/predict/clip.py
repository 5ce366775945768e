"""Labels of clips, from nothing but an adapter file (and the base weights that it names)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core.io import read_manifest
from ..datasets.clips import ClipDataset
from ..errors import InputError, refusals
from ..visualization.picture import enlarge, four_frames
from .image import Predictor

STRIP = 1024
"""Pixels to which strips of small frames are enlarged."""


class ClipPredictor(Predictor):
    """An adapted classifier of clips, rebuilt from its file; it takes frames from clips as its evaluation did.

    Args:
        path: see FromFile, as is everything that follows.

    Raises:
        InputError: as FromFile; a file that does not say how frames are taken.
    """

    def __init__(self, path: str | os.PathLike, **arguments: Any) -> None:
        super().__init__(path, **arguments)
        self.path, self.views = path, read_manifest(path).get("views_of_clips")
        if self.views is None:
            raise InputError(
                f"{path} does not say how frames are taken from clips; it needs a run with an evaluation set of clips "
                "(ClipFolder, ClipList, ...)"
            )

    @torch.inference_mode()
    def predict_files(
        self, paths: Iterable[Path], strict: bool = False
    ) -> Iterator[tuple[Path, np.ndarray | None, dict[str, Any]]]:
        """Predictions for videos and folders of frames, one at a time, with a picture of four frames each.

        Args:
            paths: clips.
            strict: stop at the first clip that cannot be read; otherwise it gives (path, None, {"error": reason}).
        """
        for path in paths:
            with refusals(f"{self.path}: views_of_clips"):
                one = ClipDataset([path], [0], self.classes, **self.views, strict=True)
            try:
                clip = one[0]["inputs"]
            except InputError as error:
                if strict:
                    raise
                yield path, None, {"error": str(error)}
                continue
            batch = self.task.data_preprocessor.normalize(clip[None].to(self.device))
            tasks = None if self.task_number is None else torch.tensor([self.task_number], device=self.device)
            _, scores = self.task.scores(self.task(batch, task=tasks).float())
            answer = self._answer(scores[0].cpu().numpy(), several=False)
            yield path, enlarge(four_frames(clip[: one.num_frames].numpy()), STRIP), answer
