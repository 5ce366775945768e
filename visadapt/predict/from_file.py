"""A trained task, rebuilt from nothing but its adapter file and the base weights that it names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backbones.weights import FOCUS, is_local
from ..core.adapted import Adapted
from ..core.io import read_manifest
from ..core.manifest import OF_TASKS
from ..datasets.base import to_tensor
from ..datasets.files import UnreadableImage, read_image
from ..errors import InputError
from ..registry import TASKS
from ..transforms.albu import Albu
from .bands import Bands, UnsuitableImage, listed
from .tiles import say

NOT_FINITE = {"error": "the scores are not finite; the image holds values far out of range"}


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


def check_task_number(task: int | None, adapted: Adapted, path: str | os.PathLike) -> None:
    """Refuse a task number that adapters need and do not get, that they do not have, or that none of them reads."""
    count = min((a.n_tasks for a in adapted.adapters.values() if a.task is None and a.n_tasks > 1), default=1)
    if count == 1 and task is not None:
        raise InputError(f"{path} has no adapter that chooses by task number; leave out --task (Predictor: task)")
    if count > 1 and (task is None or not 0 <= task < count):
        wrong = "the images have no task number" if task is None else f"there is no task {task}"
        raise InputError(
            f"{path} has an adapter of {count} tasks and {wrong}; give --task (Predictor: task) a number from 0 to "
            f"{count - 1}"
        )


def manifest_of_task(path: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a file that a training run wrote.

    Raises:
        InputError: the file is damaged, or has no task or a head that cannot be built from it.
    """
    manifest = read_manifest(path)
    if "task" not in manifest or "main" not in manifest["heads"]:
        raise InputError(f"{path} holds adapters without a task; predict needs the file of a training run")
    head = manifest["heads"]["main"]
    if head["arguments"] is None:
        raise InputError(f"{path} has the head {head['type']}, which is no registered one; predict cannot build it")
    if missing := [key for key in OF_TASKS if key not in manifest]:
        raise InputError(f"{path} does not say {', '.join(missing)}; predict needs the file of a training run")
    for key in ("bands", "file_bands"):
        names = manifest.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{path} is damaged: its {key} are no list of names")
    for key in ("nodata", "fill"):
        if not isinstance(manifest.get(key, 0), int | float):
            raise InputError(f"{path} is damaged: its {key} is no number")
    return manifest


class FromFile:
    """A trained task in eval mode.

    Args:
        path: adapter file of a training run.
        weights: base weights in place of those that the file names, e.g. a local copy.
        merge: fold the adapters into the base, for the speed of the bare backbone, where they fold.
        device: "cpu", "cuda", or None for what there is.
        task: number of the task that the images belong to, for adapters of several tasks, which stay unmerged then.

    Attributes:
        task: the task.
        report: what was loaded.
        classes: class names.
        channels: bands of the images.
        bands: their names, None where they have none.
        reading: how the bands of files become those of the images.
        palette: (r, g, b) of each class, None where the data set has none.
        key: checksum of the file.
        transform: what images go through first, None for nothing.

    Raises:
        InputError: the file is damaged, has no task, or belongs to another base; the device is not there; a task number
            is missing, out of range, or not asked for.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        weights: str | None = None,
        merge: bool = True,
        device: str | None = None,
        task: int | None = None,
    ) -> None:
        manifest = manifest_of_task(path)
        self.classes: list[str] = manifest["classes"]
        self.channels: int = manifest["channels"]
        self.bands: list[str] | None = manifest.get("bands")
        self.reading = Bands(self.channels, self.bands, *map(manifest.get, ("file_bands", "nodata", "fill")))
        colours = manifest.get("palette")  # JSON has lists for tuples, which PIL refuses
        self.palette = None if colours is None else [tuple(colour) for colour in colours]
        self.transform = Albu(manifest["transforms"], self.channels) if manifest["transforms"] else None
        self.check_transform(path)
        self.device = available(device)
        backbone = {"type": manifest["backbone"]["type"], **manifest["backbone"]["arguments"]}
        if weights is not None:
            backbone["weights"] = weights
        elif (
            (base := backbone.get("weights"))
            and is_local(base)
            and base != FOCUS
            and not Path(base).expanduser().is_file()
        ):
            raise InputError(
                f"{path} has its base weights in '{base}', which is not here; give the file as --weights (Predictor: "
                "weights)"
            )
        head = {"type": manifest["heads"]["main"]["type"], **manifest["heads"]["main"]["arguments"]}
        self.task = TASKS.build({**manifest["task"], "backbone": backbone, "head": head})
        self.report = self.task.eval().adapted.load(path, heads=self.task.heads)
        self.key: str = manifest["sha256"]
        self.task_number = task
        self.said: set[str] = set()
        adapted = self.task.adapted
        check_task_number(task, adapted, path)
        if merge and task is None and any(p.folds and p.on for p in adapted.pieces()):
            adapted.merge()
        self.task.to(self.device)

    def check_transform(self, path: str | os.PathLike) -> None:
        """Refuse a file whose transforms cannot stand before this prediction."""

    def read(self, path: Path) -> np.ndarray:
        """One image (H, W, C), whose bands are those of the model by their place.

        Raises:
            UnreadableImage: it is missing or damaged.
            UnsuitableImage: it is not what the model takes.
        """
        names = f" ({listed(self.bands)})" if self.bands else ""
        try:
            image = read_image(path, self.channels, f"give the model images with the bands it was trained on{names}")
        except UnreadableImage:
            raise
        except InputError as error:
            raise UnsuitableImage(str(error)) from error
        if self.bands:
            self.say_once(f"bands of images are taken by their place to be {listed(self.bands)}")
        return image

    def say_once(self, line: str) -> None:
        """Print a line that holds for many images, on the standard error, when it is new."""
        if line not in self.said:
            self.said.add(line)
            say(line)

    def predict(self, images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """A prediction, as JSON values and arrays, for each image (H, W, C) of any size."""
        raise NotImplementedError

    def batches(self, images: Sequence[np.ndarray]) -> Iterator[tuple[list[int], Tensor]]:
        """Transformed and normalised images in batches of one size, with the places of their images in the list."""
        ready = [image if self.transform is None else self.transform(image, 0) for image in images]
        for shape in dict.fromkeys(image.shape for image in ready):
            same = [i for i, image in enumerate(ready) if image.shape == shape]
            batch = torch.stack([to_tensor(ready[i]) for i in same]).to(self.device)
            yield same, self.task.data_preprocessor.normalize(batch)

    def predict_files(
        self, paths: Iterable[Path], batch_size: int = 32, strict: bool = False, **options: Any
    ) -> Iterator[tuple[Path, np.ndarray | None, dict[str, Any]]]:
        """Predictions for image files in their order, a batch at a time.

        Args:
            paths: image files.
            batch_size: images held at once.
            strict: stop at the first file that cannot be read; otherwise it gives (path, None, {"error": reason}).
            options: of `predict`.
        """
        waiting: list[tuple[Path, np.ndarray | None, str]] = []
        for path in paths:
            try:
                waiting.append((path, self.read(path), ""))
            except (UnreadableImage, UnsuitableImage) as error:
                if strict:
                    raise
                waiting.append((path, None, str(error)))
            if len(waiting) == batch_size:
                yield from self._answers(waiting, options)
                waiting = []
        yield from self._answers(waiting, options)

    def _answers(
        self, batch: list[tuple[Path, np.ndarray | None, str]], options: dict[str, Any]
    ) -> Iterator[tuple[Path, np.ndarray | None, dict[str, Any]]]:
        answers = iter(self.predict([image for _, image, _ in batch if image is not None], **options))
        for path, image, reason in batch:
            yield path, image, {"error": reason} if image is None else next(answers)
