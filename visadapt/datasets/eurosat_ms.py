"""EuroSAT with all 13 bands of Sentinel-2 (Helber et al. 2019), and what sets of named patches and bands share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import InputError, hint
from ..registry import DATASETS
from .base import ClassificationDataset, data_root, find_list, read_image, read_lines

CLASSES = (
    *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"),
    *("Pasture", "PermanentCrop", "Residential", "River", "SeaLake"),
)
BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A")
"""In the order of the files, which have B8A last."""
SPLITS = ("train", "val", "test")


def choose_bands(name: str, wanted: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """The bands of a data set that were asked for, in that order; all where None.

    Raises:
        InputError: none, an unknown or a repeated one.
    """
    chosen = tuple(known if wanted is None else wanted)
    for band in chosen:
        if band not in known:
            raise InputError(f"{name} has no band '{band}'{hint(band, known)}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"{name}: bands are names, each once, got {list(chosen)}")
    return chosen


def split_list(name: str, split: str, list_file: str | Path | None, base: Path, suffix: str = ".txt") -> Path:
    """The list file of a split, or the one that stands in for it.

    Raises:
        InputError: an unknown split, or no such file.
    """
    if split not in SPLITS:
        raise InputError(f"{name} has no split '{split}'{hint(split, SPLITS)}")
    if list_file is None and not (base / f"{split}{suffix}").is_file():
        raise InputError(
            f"{name}: no list {base / f'{split}{suffix}'}; put the list of that split there, or give list_file"
        )
    return find_list(list_file or f"{split}{suffix}", base)


def named_patches(source: Path, base: Path, classes: Sequence[str], suffix: str) -> tuple[list[Path], list[int]]:
    """Paths `<base>/<class>/<class>_<n><suffix>` and class indices of a list of such names.

    Folders and suffixes of the lines are left out of account, as published lists lack them or name other versions.

    Raises:
        InputError: a line whose name does not begin with a class.
    """
    paths, labels = [], []
    for n, line in read_lines(source):
        stem = Path(line).stem
        name = stem.rpartition("_")[0]
        if name not in classes:
            raise InputError(f"{source}:{n}: '{line}' is not named <class>_<number>{hint(name, classes)}")
        paths.append(base / name / f"{stem}{suffix}")
        labels.append(classes.index(name))
    return paths, labels


@DATASETS.register_module()
class EuroSATMS(ClassificationDataset):
    """EuroSAT with 13 bands: 64x64 uint16 patches in `<root>/<Class>/<Class>_<n>.tif`, values 10000 times reflectance.

    The archive has no splits: `<root>/train.txt`, `val.txt` and `test.txt` are lists of the user's, one patch per line,
    such as `River/River_7.tif`. Lists of the RGB version fit too, since patches of both have the same numbers: of a
    line only the name without suffix counts. Reading needs rasterio.

    Args:
        split: train, val or test.
        bands: names among B01 to B12 and B8A, in the order in which the model gets them; None takes all, B8A last.
        list_file: another list, in place of the split's own.
        root: folder of the class folders, see `data_root`.
        transform: see ClassificationDataset, as are the arguments below.
        strict: raise at the first unreadable image.
        seed: of the augmentation.
        training: what stands in for an unreadable image.

    Raises:
        InputError: an unknown split or band, no such folder, no list, or one that names what is not there.
    """

    extra = "geo"

    def __init__(
        self,
        split: str = "train",
        bands: Sequence[str] | None = None,
        list_file: str | Path | None = None,
        root: str | Path = "eurosat_ms",
        transform: list[dict] | None = None,
        strict: bool = False,
        seed: int = 0,
        training: bool = False,
    ):
        self.bands = choose_bands("EuroSATMS", bands, BANDS)
        base = data_root(root)
        paths, labels = named_patches(split_list("EuroSATMS", split, list_file, base), base, CLASSES, ".tif")
        super().__init__(paths, labels, CLASSES, transform, len(self.bands), strict, seed, training)

    def load(self, index: int) -> np.ndarray:
        """(H, W, bands) as stored.

        Raises:
            UnreadableImage: it is missing or damaged.
        """
        return read_image(self.paths[index], len(BANDS))[..., [BANDS.index(band) for band in self.bands]]
