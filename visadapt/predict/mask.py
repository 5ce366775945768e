"""Class maps of images and scenes, from nothing but an adapter file (and the base weights that it names)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..datasets.files import PICTURES, RESIZABLE, UnreadableImage
from ..datasets.masks import RESIZING
from ..datasets.raster_files import cleaned, read_bands, read_header
from ..errors import InputError
from ..ignored import IGNORED
from ..tasks.segment import best_class
from .arrays import map_picture
from .bands import UnsuitableImage, listed
from .from_file import NOT_FINITE, FromFile
from .tiles import MEMORY, PIXEL, named_shares


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
        """One picture or npy (H, W, C).

        Where the model's bands have names or the data set was told of its files, bands are found as those of scenes, as
        in training: those of files that do not name them by their place, which is said once.

        Raises:
            UnreadableImage: it is missing or damaged.
            UnsuitableImage: it has other bands, or is of an unknown format.
        """
        if not (self.bands or self.reading.given):
            return super().read(path)
        try:
            header = read_header(path)
            shape = f" (height {header.size[0]}, width {header.size[1]})" if path.suffix.lower() == ".npy" else ""
            alpha = [3] if header.count == 4 and path.suffix.lower() in PICTURES else []
            names = header.names or [None] * header.count
            places, taken = self.reading.places(f"{path}{shape}", names, alpha)
            image = read_bands(path, [place for place in places if place is not None])
            image = np.moveaxis(self.reading.filled(np.moveaxis(image, -1, 0), places), 0, -1)
        except (UnreadableImage, UnsuitableImage):
            raise
        except InputError as error:
            raise UnsuitableImage(str(error)) from error
        if taken:
            self.say_once(f"images that do not name their bands are taken to have {listed(taken)}, in this order")
        return image if image.dtype in RESIZABLE else image.astype(np.float32)

    def takes_tiles(self, height: int, width: int, tile: int | None = None, memory: int = MEMORY) -> bool:
        """True for a picture that is scored in tiles, as scenes are, and not as a whole.

        It is where it is larger than a tile that was asked for; and without one, where it needs more than the memory at
        `PIXEL` bytes per pixel, by default beyond 1024 x 1024 pixels. Models that were evaluated on resized images see
        it resized, whatever its size.
        """
        if tile is not None:
            return max(height, width) > tile
        return self.transform is None and height * width * PIXEL > memory

    @torch.inference_mode()
    def predict(
        self,
        images: Sequence[np.ndarray],
        tile: int | None = None,
        overlap: float = 0.25,
        batch: int | None = None,
        memory: int = MEMORY,
    ) -> list[dict[str, Any]]:
        """Class maps of images (H, W, C) of any sizes.

        Args:
            images: in memory.
            tile: side of tiles, see `takes_tiles`; None lets the memory decide, see `visadapt.predict.tiles.plan`.
            overlap: share of a tile's side that neighbours have in common.
            batch: tiles at once; None lets the memory decide.
            memory: bytes for all but the model's weights and the images.

        Returns:
            Per image: mask (H, W) uint8 of class indices, 255 where there are no data, see `cleaned`; shares, the part
            of the pixels of each class that occurs, by its name; and tile, their side, for an image that was scored in
            tiles. Or error, where the scores are not finite.

        Raises:
            InputError: tiles that do not fit the memory, or values out of range.
        """
        answers: list[dict[str, Any]] = [{}] * len(images)
        ready, empty = zip(*map(self._cleaned, images)) if images else ((), ())
        tiled = [i for i, image in enumerate(ready) if self.takes_tiles(*image.shape[:2], tile, memory)]
        for i in tiled:
            answers[i] = self._tiled(ready[i], empty[i], tile, overlap, batch, memory)
        whole = [i for i in range(len(images)) if i not in tiled]
        for places, inputs in self.batches([ready[i] for i in whole]):
            for place, scores in zip(places, self.task.scores(inputs).float()):
                answers[whole[place]] = self._whole(scores, empty[whole[place]])
        return answers

    def _cleaned(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """An image with 0 for what is no data, and its empty pixels (H, W)."""
        real, nodata = self.reading.real, self.reading.nodata
        values, empty = cleaned(image[..., real], False if nodata is None else image[..., real] == nodata)
        image = image.copy()
        image[..., real] = values
        return image, empty

    def _whole(self, scores: Tensor, empty: np.ndarray) -> dict[str, Any]:
        if not scores.isfinite().all():
            return dict(NOT_FINITE)
        mask = best_class(scores, empty.shape).cpu().numpy().astype(np.uint8)
        mask[empty] = IGNORED
        return self._answer(mask)

    def _tiled(self, image: np.ndarray, empty: np.ndarray, tile: int | None, *options: Any) -> dict[str, Any]:
        mask, side = map_picture(image, empty, self.score, len(self.classes), tile, *options)
        if mask.unscored:
            return dict(NOT_FINITE)
        if self.transform is not None:
            self.say_once(self._seen("a picture", side))
        elif tile is None:
            self.say_once("large pictures are scored in tiles; with more --memory (predict: memory) as a whole")
        return {**self._answer(mask.labels), "tile": side}

    def _answer(self, mask: np.ndarray) -> dict[str, Any]:
        counts = np.bincount(mask.ravel(), minlength=IGNORED + 1)[: len(self.classes)]
        return {"mask": mask, "shares": named_shares(counts, mask.size, self.classes)}

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

        fixed = {"classes": self.classes, "channels": self.channels, "bands": self.bands, "colors": self.palette}
        fixed |= {key: getattr(self.reading, key) for key in ("file_bands", "nodata", "fill")}
        report = predict_scene(source, out, self.score, tile=tile or self._square(), **fixed, **options)
        if self.transform is not None:
            report.notes.insert(0, self._seen("the scene", report.tile))
        return report

    def _seen(self, what: str, tile: int) -> str:
        """A line about what is mapped in tiles by a model that was evaluated on resized images."""
        side = self._square()
        how = f"resized to {side} x {side}" if side else f"after {', '.join(self.transform.names)}"
        return f"the model was evaluated on images {how}; {what} is read in tiles of {tile} px at its own resolution"

    def _square(self) -> int | None:
        """The side of the squares that images were resized to; None where they were not, or in another way."""
        entries = [] if self.transform is None else self.transform.to_json()
        if [entry["type"] for entry in entries] != ["Resize"] or entries[0].get("p", 1) != 1:
            return None
        height, width = entries[0]["height"], entries[0]["width"]
        return height if height == width else None
