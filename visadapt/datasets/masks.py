"""Images with a class for every pixel, and how they become a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, hint
from ..ignored import IGNORED
from .base import ImageDataset, common, data_root, find_list, read_image, read_lines, stack, to_tensor
from .files import UnreadableImage
from .folder import images_below
from .labels import Labels
from .raster_files import Window, read_header, read_mask

RESIZING = ("LongestMaxSize", "Resize", "SmallestMaxSize")
SPLITS = ("train", "val", "test")


class Pixels(NamedTuple):
    """What is read of an image.

    Attributes:
        image: (H, W, C), the whole image or that part of a window which lies inside of it.
        size: (height, width) of the whole image.
        empty: (H, W) bool, where it has no data; None where it has data everywhere.
    """

    image: np.ndarray
    size: tuple[int, int]
    empty: np.ndarray | None = None


class SegmentationDataset(ImageDataset):
    """Images with a mask each.

    Args:
        images: image files.
        masks: mask files, in the same order: png, bmp, tif or npy of the image's height and width.
        classes: class names; their order gives the class index.
        transform: albumentations entries, which move image and mask alike; see ImageDataset, as are the arguments down
            to `training`.
        channels: bands of every image.
        strict: raise at the first unreadable image or mask.
        seed: of the augmentation.
        training: what stands in for an unreadable image or mask.
        label_map: what the numbers in masks stand for, see Labels, as are the three arguments below.
        colors: of each class, where masks hold colours.
        ignore: numbers or colours of pixels that are ignored.
        reduce_zero: 0 is ignored and every other number is one above its class index.
        native_masks: masks keep the size they have on disk while images are resized, as published scores are measured;
            for evaluation, and with resizing transforms only.
        tile: cut images into windows of this many pixels a side, each a sample of its own, before the transform. The
            last ones of a row and a column are moved back into the image, and what they share with their neighbours is
            ignored, so that every pixel counts once. Smaller images are filled up with 0, their masks with 255. 0
            leaves images whole.

    Attributes:
        labels: turns what is in mask files into class indices.
        bands: names of the image's bands, None where they have none.
        palette: (r, g, b) of each class for pictures, or None; also in `metainfo` where it is known.

    Raises:
        InputError: as ImageDataset; another number of masks than images, arguments that exclude each other.
    """

    PALETTE: ClassVar[Sequence[Any] | None] = None

    def __init__(
        self,
        images: Sequence[str | Path],
        masks: Sequence[str | Path],
        classes: Sequence[str],
        transform: list[dict] | None = None,
        channels: int = 3,
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
        self.masks = [str(p) for p in masks]
        self.labels = Labels(classes, label_map, colors, ignore, reduce_zero)
        self.native_masks, self.tile = native_masks, tile
        self.bands: tuple[str, ...] | None = None
        self.palette = self.labels.colors or self.PALETTE
        super().__init__(images, classes, transform, channels, strict, seed, training)
        if self.palette is not None:
            self.metainfo["palette"] = self.palette
        self.windows: list[Window | None] = [None] * len(self.paths)
        if tile:
            self._cut()

    def _check(self) -> None:
        super()._check()
        name = type(self).__name__
        if len(self.paths) != len(self.masks):
            raise InputError(f"{name}: {len(self.paths)} images but {len(self.masks)} masks")
        if self.tile < 0:
            raise InputError(f"{name}: tile must be 0 or a number of pixels, got {self.tile}")
        if not self.native_masks:
            return
        if self.training:
            raise InputError(f"{name}: native_masks is for evaluation; leave it out where training=True")
        other = [n for n in (self.transform.names if self.transform else ()) if n not in RESIZING]
        if other or (self.transform and self.transform.is_random):
            raise InputError(
                f"{name}: with native_masks the mask stays as it is, so images may only be resized, by "
                f"{', '.join(RESIZING)} and always alike; {', '.join(other) or 'these transforms are random'}"
            )

    def _check_files(self) -> None:
        super()._check_files()
        missing = [p for p in self.masks if not Path(p).is_file()]
        if missing:
            more = ", …" if len(missing) > 3 else ""
            raise InputError(
                f"{type(self).__name__}: {len(missing)} of {len(self.paths)} images have no mask: "
                f"{', '.join(missing[:3])}{more} not found; {self._about_missing(Path(missing[0]))}"
            )

    def _about_missing(self, mask: Path) -> str:
        """What to do about masks that are not there, of which this is the first."""
        if any(Path(p).is_file() for p in self.masks):
            return "add them, or leave their images out"
        there = sorted(p.name for p in mask.parent.iterdir()) if mask.parent.is_dir() else []
        return f"{mask.parent} holds {', '.join(there[:3]) or 'nothing'}{', …' if len(there) > 3 else ''}"

    def _cut(self) -> None:
        """One sample for each window. A mask without a readable header stays whole, and is told when it is read."""
        whole = list(zip(self.paths, self.masks))
        windows = [(image, mask, window) for image, mask in whole for window in self._windows(mask)]
        self.paths, self.masks, self.windows = (list(column) for column in zip(*windows))
        self.unit = "tile"

    def _windows(self, mask: str) -> list[Window | None]:
        try:
            height, width = self.mask_size(mask)
        except UnreadableImage:
            return [None]
        side = self.tile
        tops, lefts = ([min(at, max(n - side, 0)) for at in range(0, n, side)] for n in (height, width))
        return [Window(top, left, side, side) for top in tops for left in lefts]

    def mask_size(self, mask: str) -> tuple[int, int]:
        """(height, width) of a mask file."""
        return read_header(mask).size

    def raw_mask(self, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        """What the mask file of a sample holds, or its window; and the (height, width) of the whole mask."""
        return read_mask(self.masks[index], self.labels.colors is not None, self.windows[index])

    def name(self, index: int) -> str:
        """The image's path, and of a window its upper left corner: "<path>#<column>,<row>"."""
        window = self.windows[index]
        return self.paths[index] + ("" if window is None else f"#{window.left},{window.top}")

    def load(self, index: int) -> np.ndarray:
        """The raw image (H, W, C), or its window.

        Raises:
            UnreadableImage: it is missing or damaged.
        """
        return _filled(self.pixels(index).image, self.windows[index], 0)

    def pixels(self, index: int) -> Pixels:
        """What is in the image file of a sample, or in its window."""
        image = read_image(self.paths[index], self.channels)
        window = self.windows[index]
        return Pixels(image if window is None else image[window.slices], image.shape[:2])

    def read(self, index: int) -> tuple[Pixels, np.ndarray]:
        """What is in the image file of a sample or in its window, and the mask (H, W) uint8 of the whole window."""
        pixels = self.pixels(index)
        path, window = self.masks[index], self.windows[index]
        raw, size = self.raw_mask(index)
        if size != pixels.size:
            raise InputError(
                f"{self.paths[index]} is {pixels.size}, its mask {path} is {size} (height, width); both need one size"
            )
        mask = self.labels(raw, path)
        if pixels.empty is not None:
            mask[pixels.empty] = IGNORED
        if window is not None and not self.training:  # the window above has these rows, the one beside it these columns
            mask[: -window.top % self.tile] = IGNORED
            mask[:, : -window.left % self.tile] = IGNORED
        return pixels, _filled(mask, window, IGNORED)

    def _sample(self, index: int, content: tuple[Pixels, np.ndarray], seed: int) -> dict[str, Any]:
        pixels, mask = content
        image = _filled(pixels.image, self.windows[index], 0)
        if self.transform is not None and self.native_masks:
            image = self.transform(image, seed)
        elif self.transform is not None:
            image, mask = self.transform(image, seed, mask)
        return {"inputs": to_tensor(image), "mask": torch.from_numpy(mask.astype(np.int64))}

    def _blank(self, index: int, like: dict[str, Any]) -> dict[str, Any]:
        return {**super()._blank(index, like), "mask": torch.full_like(like["mask"], IGNORED)}


def _filled(array: np.ndarray, window: Window | None, value: int) -> np.ndarray:
    """Fill an array (h, w, ...) up to the size of its window."""
    if window is None:
        return array
    below, beside = window.height - array.shape[0], window.width - array.shape[1]
    return np.pad(array, [(0, below), (0, beside), (0, 0)][: array.ndim], constant_values=value)


def find_pairs(
    images: Path, masks: Path, image_suffix: str, mask_suffix: str, list_file: str | Path | None = None
) -> tuple[list[Path], list[Path]]:
    """Image files and the mask of each.

    Args:
        images: folder of images, at any depth.
        masks: folder of masks, laid out alike.
        image_suffix: how the names of images end, such as ".png" or "_S2Hand.tif".
        mask_suffix: what stands in its place in the names of masks.
        list_file: names below `images`, with or without the suffix, one per line; None takes all images.

    Raises:
        InputError: no such folder or list, or no image.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise InputError(f"no folder {folder}; put the data there, or say where they are")
    if list_file is None:
        found = images_below(images)
        names = [str(p.relative_to(images)) for p in found if p.name.endswith(image_suffix)]
        if not names:
            seen = ", ".join(sorted({p.suffix for p in found})) or "no image at all"
            raise InputError(f"no image below {images} ends with '{image_suffix}'; found {seen}")
    else:
        names = [line for _, line in read_lines(find_list(list_file, images))]
    stems = [name.removesuffix(image_suffix) for name in names]
    return [images / f"{s}{image_suffix}" for s in stems], [masks / f"{s}{mask_suffix}" for s in stems]


class SplitFolders(SegmentationDataset):
    """A published data set as MMSegmentation lays it out; a subclass names its classes and colours.

    Images are in `<root>/<image_dir>/<split>/`, masks of the same names in `<root>/<mask_dir>/<split>/`.

    Args:
        split: train, val or test; None leaves that folder out of both paths.
        root: folder of the data set, see `data_root`; None takes the usual one.
        image_dir: folder of images.
        mask_dir: folder of masks.
        list_file: names of images, one per line, in place of all.
        transform: see SegmentationDataset, as are the arguments below.
        strict: raise at the first unreadable image or mask.
        seed: of the augmentation.
        training: what stands in for an unreadable image or mask.
        native_masks: masks keep the size they have on disk.
        tile: side of the windows that images are cut into, 0 for none.

    Raises:
        InputError: an unknown split, no such folder, images without masks.
    """

    ROOT: ClassVar[str]
    CLASSES: ClassVar[tuple[str, ...]]
    IMAGE_SUFFIX: ClassVar[str] = ".png"
    MASK_SUFFIX: ClassVar[str] = ".png"
    LABEL_MAP: ClassVar[dict[int, int] | None] = None
    REDUCE_ZERO: ClassVar[bool] = False

    def __init__(
        self,
        split: str | None = "train",
        root: str | Path | None = None,
        image_dir: str = "img_dir",
        mask_dir: str = "ann_dir",
        list_file: str | Path | None = None,
        transform: list[dict] | None = None,
        strict: bool = False,
        seed: int = 0,
        training: bool = False,
        native_masks: bool = False,
        tile: int = 0,
    ):
        if split is not None and split not in SPLITS:
            raise InputError(f"{type(self).__name__} has no split '{split}'{hint(split, SPLITS)}")
        base = data_root(root or self.ROOT)
        folders = [base / folder / (split or "") for folder in (image_dir, mask_dir)]
        images, masks = find_pairs(*folders, self.IMAGE_SUFFIX, self.MASK_SUFFIX, list_file)
        super().__init__(
            images,
            masks,
            self.CLASSES,
            transform,
            strict=strict,
            seed=seed,
            training=training,
            label_map=self.LABEL_MAP,
            reduce_zero=self.REDUCE_ZERO,
            native_masks=native_masks,
            tile=tile,
        )


def collate_masks(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples with masks into a batch.

    Returns:
        "inputs" (B, C, H, W), "masks": list of B tensors (H', W') int64, 255 where they are ignored, and what
        `visadapt.datasets.base.common` adds.

    Raises:
        InputError: images of different size.
    """
    masks: list[Tensor] = [s["mask"] for s in samples]
    return {"inputs": stack(samples), "masks": masks, **common(samples)}
