"""Segmentation of rasters with any number of bands, which are told apart by their names."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..registry import DATASETS
from .base import data_root
from .files import RESIZABLE, UnreadableImage
from .masks import Pixels, SegmentationDataset, find_pairs
from .raster_files import Header, cleaned, constant, read_bands, read_header


@DATASETS.register_module()
class RasterSegDataset(SegmentationDataset):
    """Rasters in one folder and masks in another: GeoTIFF, npy (height, width, bands) or pictures.

    Values without data, which are those equal to `nodata` and those that are not finite, become 0 in the image. A pixel
    is ignored in the mask where all bands of a file have no data, or any value is not finite.

    Args:
        image_dir: folder of images, at any depth, see `data_root`.
        mask_dir: folder of masks, laid out alike.
        classes: class names; their order gives the class index.
        bands: names of the bands that the model gets, in its order; None takes those of the first file.
        file_bands: names of the bands in the files; None takes the descriptions in a tif.
        nodata: the value without data; None takes what a tif says of itself.
        fill: the value of bands that a file does not have; None makes such a file an error.
        list_file: names of images below `image_dir`, one per line, with or without their suffix; None takes all.
        image_suffix: how the names of images end, such as ".tif" or "_S2Hand.tif".
        mask_suffix: what stands in its place in the names of masks.
        transform: see SegmentationDataset, as are the arguments below.
        strict: raise at the first unreadable image or mask.
        seed: of the augmentation.
        training: what stands in for an unreadable image or mask.
        label_map: what the numbers in masks stand for.
        colors: of each class, where masks hold colours.
        ignore: numbers or colours of pixels that are ignored.
        reduce_zero: 0 is ignored and every other number is one above its class index.
        native_masks: masks keep the size they have on disk.
        tile: side of the windows that images are cut into, 0 for none; of a tif or an npy nothing else is read.

    Attributes:
        bands: names of the image's bands, None where neither the files nor the arguments name them.

    Raises:
        InputError: no such folders, images without masks, bands that are named twice, or not named where `bands` asks
            for them.
    """

    extra = "geo"  # for tif, which it reads by default

    def __init__(
        self,
        image_dir: str | Path,
        mask_dir: str | Path,
        classes: Sequence[str],
        bands: Sequence[str] | None = None,
        file_bands: Sequence[str] | None = None,
        nodata: float | None = None,
        fill: float | None = None,
        list_file: str | Path | None = None,
        image_suffix: str = ".tif",
        mask_suffix: str = ".tif",
        transform: list[dict] | None = None,
        strict: bool = False,
        seed: int = 0,
        training: bool = False,
        label_map: Mapping[Any, int] | None = None,
        colors: Sequence[Any] | None = None,
        ignore: Sequence[Any] = (),
        reduce_zero: bool = False,
        native_masks: bool = False,
        tile: int = 0,
    ):
        images, masks = find_pairs(data_root(image_dir), data_root(mask_dir), image_suffix, mask_suffix, list_file)
        for names in (bands or (), file_bands or ()):
            if len(set(names)) != len(names):
                raise InputError(f"{type(self).__name__}: a band is named twice in {', '.join(names)}")
        self.file_bands, self.nodata, self.fill, self.mask_suffix = file_bands, nodata, fill, mask_suffix
        first, header = _first_header(images)
        bands = bands or self._names(first, header)
        super().__init__(
            images,
            masks,
            classes,
            transform,
            channels=len(bands) if bands else header.count,
            strict=strict,
            seed=seed,
            training=training,
            label_map=label_map,
            colors=colors,
            ignore=ignore,
            reduce_zero=reduce_zero,
            native_masks=native_masks,
            tile=tile,
        )
        self.bands = tuple(bands) if bands else None
        self._places(self.paths.index(first))  # what is wrong with the first file is most often wrong with all

    def _about_missing(self, mask: Path) -> str:
        stem = mask.name.removesuffix(self.mask_suffix)
        near = sorted(p.name.removeprefix(stem) for p in mask.parent.glob(f"{glob.escape(stem)}[._-]*"))
        # a subclass knows how its masks are called
        if near and type(self) is RasterSegDataset and not any(Path(p).is_file() for p in self.masks):
            return f"set mask_suffix='{near[0]}'"
        return super()._about_missing(mask)

    def _names(self, path: str, header: Header) -> Sequence[str] | None:
        if self.file_bands is not None and len(self.file_bands) != header.count:
            raise InputError(f"{path} has {header.count} bands, but file_bands names {len(self.file_bands)}")
        return self.file_bands or header.names

    def _sources(self, index: int) -> list[str]:
        """The files that hold the bands of a sample; the first is `paths[index]`."""
        return [self.paths[index]]

    def _places(self, index: int) -> list[tuple[str, Header, dict[str | int, int]]]:
        """Each file of a sample, its header, and where in it the bands are that the model gets, by name.

        Bands without names are told apart by their number.

        Raises:
            InputError: a band is in no file and there is no `fill`, or bands have no names.
        """
        sources = [(path, read_header(path)) for path in self._sources(index)]
        names = [self._names(path, header) for path, header in sources]
        if self.bands is None:
            (path, header), *_ = sources
            if header.count != self.channels:
                raise InputError(f"{path} has {header.count} bands, {self.channels} are needed as in the first file")
            return [(path, header, {i: i for i in range(header.count)})]
        for (path, header), known in zip(sources, names):
            if known is None:
                raise InputError(f"{path} does not name its {header.count} bands; give file_bands=[...]")
        offered = [name for known in names for name in known]
        missing = [band for band in self.bands if band not in offered]
        if missing and (self.fill is None or len(missing) == len(self.bands)):
            raise InputError(
                f"{' and '.join(path for path, _ in sources)} has no band {', '.join(missing)}: it has "
                f"{', '.join(offered)}, the model gets {', '.join(self.bands)}; change bands, or give fill=<value>"
            )
        return [
            (path, header, {band: known.index(band) for band in self.bands if band in known})
            for (path, header), known in zip(sources, names)
        ]

    def pixels(self, index: int) -> Pixels:
        planes, empty, size = {}, False, None
        for path, header, rows in self._places(index):
            size = size or header.size
            if header.size != size:
                raise InputError(
                    f"{path} is {header.size}, {self.paths[index]} is {size} (height, width); both need one size"
                )
            pixels = read_bands(path, list(rows.values()), self.windows[index])
            nodata = header.nodata if self.nodata is None else self.nodata
            pixels, without = cleaned(pixels, False if nodata is None else pixels == nodata)
            planes.update(zip(rows, np.moveaxis(pixels, -1, 0)))
            empty = empty | without
        wanted = range(self.channels) if self.bands is None else self.bands
        missing = None if len(planes) == len(wanted) else constant(self.fill, pixels.shape[:2], pixels.dtype)
        image = np.stack([planes.get(band, missing) for band in wanted], -1)
        return Pixels(image if image.dtype in RESIZABLE else image.astype(np.float32), size, empty)


def _first_header(images: Sequence[Path]) -> tuple[str, Header]:
    """The first image that can be read, and its header.

    Raises:
        UnreadableImage: there is none.
    """
    for path in images[:-1]:
        try:
            return str(path), read_header(path)
        except UnreadableImage:  # told when its turn comes
            continue
    return str(images[-1]), read_header(images[-1])
