"""Omniglot (Lake et al. 2015): handwritten characters of many alphabets, each drawn by 20 people."""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np

from ..errors import InputError, hint
from ..registry import DATASETS
from .base import ClassificationDataset, data_root
from .files import decode
from .folder import images_below

PART = "images_background_small1"
DRAWERS = 20
SPLITS = {
    "train800": range(1, 7),
    "val200": range(7, 9),
    "train800val200": range(1, 9),
    "test": range(9, DRAWERS + 1),
}
"""Numbers of the drawers."""


@DATASETS.register_module()
class Omniglot(ClassificationDataset):
    """The 136 characters of five alphabets of "background small 1", black on white, 105x105, repeated to three bands.

    Read from `<root>/images_background_small1.zip`, or from the folder `<root>/images_background_small1` where the
    archive is unpacked: `<alphabet>/<character>/<number>_<drawer>.png`. A class is `<alphabet>/<character>`. No hand is
    in two splits: drawers 1 to 6 are train800 (816 images), 7 and 8 val200 (272), 1 to 8 train800val200 (1088) and 9 to
    20 test (1632). The names are those of VTAB-1k, which these splits stand in for.

    Args:
        split: train800, val200, train800val200 or test.
        root: folder of the archive, see `data_root`.
        transform: see ClassificationDataset, as are the arguments below.
        strict: raise at the first unreadable image.
        seed: of the augmentation.
        training: what stands in for an unreadable image.

    Raises:
        InputError: an unknown split, no such archive, a damaged one, or a character that not all have drawn.
    """

    def __init__(
        self,
        split: str = "train800val200",
        root: str | Path = "omniglot_small1/python",
        transform: list[dict] | None = None,
        strict: bool = False,
        seed: int = 0,
        training: bool = False,
    ):
        if split not in SPLITS:
            raise InputError(f"Omniglot has no split '{split}'{hint(split, SPLITS)}")
        folder = data_root(root) / PART
        self._packed: dict[str, bytes] | None = None
        if folder.is_dir():
            names = [str(path.relative_to(folder)) for path in images_below(folder)]
        else:
            folder = folder.with_suffix(".zip")
            self._packed = unpacked(folder)  # all of it: workers would share the place in an open file
            names = list(self._packed)
        drawn = by_drawer(folder, names)
        self._names = [found[drawer] for found in drawn.values() for drawer in SPLITS[split]]
        paths, labels = [folder / name for name in self._names], np.repeat(range(len(drawn)), len(SPLITS[split]))
        super().__init__(paths, labels, list(drawn), transform, 3, strict, seed, training)

    def _check_files(self) -> None:
        """All were found by name."""

    def load(self, index: int) -> np.ndarray:
        if self._packed is None:
            return super().load(index)
        return decode(Path(self.paths[index]), self._packed[self._names[index]], cv2.IMREAD_COLOR_RGB)


def by_drawer(base: Path, names: list[str]) -> dict[str, dict[int, str]]:
    """The files of each character, in alphabetical order, by drawer.

    Raises:
        InputError: a file of another name, or a character that not all have drawn.
    """
    drawn: dict[str, dict[int, str]] = {}
    for name in sorted(names):
        found = re.fullmatch(r"([^/]+/[^/]+)/\d+_(\d+)\.png", name)
        if found is None:
            raise InputError(f"Omniglot: {base / name} is not <alphabet>/<character>/<number>_<drawer>.png")
        drawn.setdefault(found[1], {})[int(found[2])] = name
    for character, found in drawn.items():
        if sorted(found) != list(range(1, DRAWERS + 1)):
            raise InputError(
                f"Omniglot: {base / character} has {len(found)} images, one of each of {DRAWERS} drawers is due"
            )
    return drawn


def unpacked(path: Path) -> dict[str, bytes]:
    """What the pictures of the archive hold, by their names below its one folder.

    Raises:
        InputError: no such file, or it is damaged.
    """
    if not path.is_file():
        raise InputError(f"Omniglot: neither {path} nor an unpacked {path.stem} is there; see data/README.md")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.startswith(f"{PART}/") and n.endswith(".png")]
            return {name.removeprefix(f"{PART}/"): archive.read(name) for name in names}
    except (zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"Omniglot: {path} is damaged or not a zip ({error}); fetch it again") from error
