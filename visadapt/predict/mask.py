"""Class maps of images and scenes, from nothing but an adapter file (and the base weights that it names)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..datasets.files import RESIZABLE, UnreadableImage, read_image
from ..datasets.masks import RESIZING
from ..datasets.raster_files import cleaned, read_bands, read_header
from ..errors import InputError
from ..ignored import IGNORED
from ..tasks.segment import best_class
from .bands import UnsuitableImage
from .from_file import FromFile


class MaskPredictor(FromFile):
    """An adapted segmentation model, rebuilt from its file.

    Raises:
        InputError: see FromFile; or images were evaluated after transforms that do more than resize.
    """

    def check_transform(self, path: str | os.PathLike) -> None:
        """Refuse what moves or hides pixels: the scores of what is left would be stretched over the image."""
        if self.transform is None:
            return
        other = [name for name in self.transform.names if name not in RESIZING]
        if other or self.transform.is_random:
            raise InputError(
                f"{path}: images were evaluated after {', '.join(other) or 'random resizing'}, and a class map is of a "
                f"whole image; evaluate with no transforms but {', '.join(RESIZING)}, always alike"
            )

    def read(self, path: Path) -> np.ndarray:
        """One picture or npy (H, W, C), whose bands are found as those of scenes where the data set was told of them.

        Raises:
            UnreadableImage: it is missing or damaged.
            UnsuitableImage: it has other bands, or is of an unknown format.
        """
        try:
            if not self.reading.given:
                return read_image(path, self.channels)
            header = read_header(path)
            places, _ = self.reading.places(path, header.names or [None] * header.count)
            image = read_bands(path, [place for place in places if place is not None])
            image = np.moveaxis(self.reading.filled(np.moveaxis(image, -1, 0), places), 0, -1)
        except (UnreadableImage, UnsuitableImage):
            raise
        except InputError as error:
            raise UnsuitableImage(str(error)) from error
        return image if image.dtype in RESIZABLE else image.astype(np.float32)

    @torch.inference_mode()
    def predict(self, images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """Class maps of images (H, W, C) of any sizes.

        Returns:
            Per image: mask (H, W) uint8 of class indices, 255 where there are no data, see `cleaned`; and shares, the
            part of the pixels of each class that occurs, by its name. Or error, where the scores are not finite.
        """
        answers: list[dict[str, Any]] = [{}] * len(images)
        ready, empty = zip(*map(self._cleaned, images)) if images else ((), ())
        for places, batch in self.batches(ready):
            for i, scores in zip(places, self.task.scores(batch).float()):
                answers[i] = self._answer(scores, empty[i])
        return answers

    def _cleaned(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """An image with 0 for what is no data, and its empty pixels (H, W)."""
        real, nodata = self.reading.real, self.reading.nodata
        values, empty = cleaned(image[..., real], False if nodata is None else image[..., real] == nodata)
        image = image.copy()
        image[..., real] = values
        return image, empty

    def _answer(self, scores: Tensor, empty: np.ndarray) -> dict[str, Any]:
        if not scores.isfinite().all():
            return {"error": "the scores are not finite; the image holds values far out of range"}
        mask = best_class(scores, empty.shape).cpu().numpy().astype(np.uint8)
        shares = np.bincount(mask[~empty], minlength=len(self.classes)) / mask.size
        mask[empty] = IGNORED
        named = {name: round(share, 6) for name, share in zip(self.classes, shares.tolist()) if share}
        return {"mask": mask, "shares": named}

    def score(self, tiles: Tensor) -> Tensor:
        """Scores (B, K, t, t) of raw tiles (B, C, t, t)."""
        return self.task.scores(self.task.data_preprocessor.normalize(tiles.to(self.device)))

    def predict_scene(self, source: str | os.PathLike, out: str | os.PathLike, tile: int | None = None, **options: Any):
        """Write the class map of a GeoTIFF of any size; see `visadapt.predict.scene.predict_scene` for the options.

        Scenes are not resized. Where images were, to a square, tiles have its side unless `tile` says otherwise: the
        model then sees images of the size that it was evaluated on. The report says so.

        Raises:
            InputError: what `predict_scene` refuses.
        """
        from .scene import predict_scene

        side = self._square()
        fixed = {"classes": self.classes, "channels": self.channels, "bands": self.bands, "colors": self.palette}
        fixed |= {key: getattr(self.reading, key) for key in ("file_bands", "nodata", "fill")}
        report = predict_scene(source, out, self.score, tile=tile or side, **fixed, **options)
        if self.transform is not None:
            how = f"resized to {side} x {side}" if side else f"after {', '.join(self.transform.names)}"
            report.notes.insert(
                0,
                f"the model was evaluated on images {how}; the scene is read in tiles of {report.tile} px at its own "
                "resolution",
            )
        return report

    def _square(self) -> int | None:
        """The side of the squares that images were resized to; None where they were not, or in another way."""
        entries = [] if self.transform is None else self.transform.to_json()
        if [entry["type"] for entry in entries] != ["Resize"] or entries[0].get("p", 1) != 1:
            return None
        height, width = entries[0]["height"], entries[0]["width"]
        return height if height == width else None
