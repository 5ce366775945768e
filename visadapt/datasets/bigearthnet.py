"""BigEarthNet (Sumbul et al. 2019): 1.2 km Sentinel-2 patches with several land covers each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from ..errors import InputError, hint
from ..registry import DATASETS
from .base import ClassificationDataset, data_root, read_image, read_lines
from .eurosat_ms import choose_bands, split_list
from .files import UnreadableImage

SIDE = 120
BANDS = {
    **{"B01": 20, "B02": 120, "B03": 120, "B04": 120, "B05": 60, "B06": 60},
    **{"B07": 60, "B08": 120, "B8A": 60, "B09": 20, "B11": 60, "B12": 60},
}
"""Bands in the order of wavelengths, with the side of their files in pixels (of 10, 20 or 60 m)."""

NOMENCLATURE: dict[str, tuple[str, ...]] = {
    "Urban fabric": ("Continuous urban fabric", "Discontinuous urban fabric"),
    "Industrial or commercial units": ("Industrial or commercial units",),
    "Arable land": ("Non-irrigated arable land", "Permanently irrigated land", "Rice fields"),
    "Permanent crops": (
        *("Vineyards", "Fruit trees and berry plantations", "Olive groves"),
        "Annual crops associated with permanent crops",
    ),
    "Pastures": ("Pastures",),
    "Complex cultivation patterns": ("Complex cultivation patterns",),
    "Land principally occupied by agriculture, with significant areas of natural vegetation": (
        "Land principally occupied by agriculture, with significant areas of natural vegetation",
    ),
    "Agro-forestry areas": ("Agro-forestry areas",),
    "Broad-leaved forest": ("Broad-leaved forest",),
    "Coniferous forest": ("Coniferous forest",),
    "Mixed forest": ("Mixed forest",),
    "Natural grassland and sparsely vegetated areas": ("Natural grassland", "Sparsely vegetated areas"),
    "Moors, heathland and sclerophyllous vegetation": ("Moors and heathland", "Sclerophyllous vegetation"),
    "Transitional woodland, shrub": ("Transitional woodland/shrub",),
    "Beaches, dunes, sands": ("Beaches, dunes, sands",),
    "Inland wetlands": ("Inland marshes", "Peatbogs"),
    "Coastal wetlands": ("Salt marshes", "Salines"),
    "Inland waters": ("Water courses", "Water bodies"),
    "Marine waters": ("Coastal lagoons", "Estuaries", "Sea and ocean"),
}
"""The 19 classes of Sumbul et al. (2021), each with the CORINE classes that it joins."""

LEFT_OUT = (
    *("Road and rail networks and associated land", "Port areas", "Airports", "Mineral extraction sites", "Dump sites"),
    *("Construction sites", "Green urban areas", "Sport and leisure facilities", "Bare rock", "Burnt areas"),
    "Intertidal flats",
)
"""CORINE classes that have no place in the 19."""

CLASSES = tuple(NOMENCLATURE)
OF_CORINE = {
    **{corine: i for i, joined in enumerate(NOMENCLATURE.values()) for corine in joined},
    **dict.fromkeys(LEFT_OUT),
}


def multi_hot(path: Path) -> list[int]:
    """19 values, 1 for each class that a patch has, from its `labels_metadata.json`; all 0 where none of the 19 is.

    Raises:
        InputError: no such file, no JSON with labels, or a label that is no CORINE class of the set.
    """
    try:
        names = json.loads(path.read_bytes())["labels"]
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror.lower()}; mend the list or the data folder"
        ) from error
    except (ValueError, KeyError, TypeError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path} is no JSON object with a list 'labels'; unpack the patch again")
    values = [0] * len(CLASSES)
    for name in names:
        if name not in OF_CORINE:
            raise InputError(f"{path}: '{name}' is no class of BigEarthNet{hint(name, OF_CORINE)}")
        if OF_CORINE[name] is not None:
            values[OF_CORINE[name]] = 1
    return values


@DATASETS.register_module()
class BigEarthNet(ClassificationDataset):
    """BigEarthNet-S2 v1.0 with the 19 classes: `<root>/<patch>/<patch>_B02.tif` and so on, one file per band.

    Labels are multi-hot, from `<patch>_labels_metadata.json`: "label" of a sample is a list of 19 values 0 or 1, so
    that "labels" of a batch is (B, 19). Bands of 20 and 60 m are resized bilinearly to the 120x120 pixels of those of
    10 m. Splits are `<root>/train.csv`, `val.csv` and `test.csv`, as published: one patch per line, of which what is
    before the first comma counts. Reading needs rasterio.

    Args:
        split: train, val or test.
        bands: names among B01 to B09, B8A, B11 and B12, in the order in which the model gets them; None takes all 12.
        list_file: another list, in place of the split's own.
        root: folder of the patch folders, see `data_root`.
        transform: see ClassificationDataset, as are the arguments below.
        strict: raise at the first unreadable image.
        seed: of the augmentation.
        training: what stands in for an unreadable image.

    Attributes:
        labels: multi-hot, one list of 19 values per patch.

    Raises:
        InputError: an unknown split or band, no such folder, no list, or a patch without labels.
    """

    extra = "geo"

    def __init__(
        self,
        split: str = "train",
        bands: Sequence[str] | None = None,
        list_file: str | Path | None = None,
        root: str | Path = "BigEarthNet-v1.0",
        transform: list[dict] | None = None,
        strict: bool = False,
        seed: int = 0,
        training: bool = False,
    ):
        self.bands = choose_bands("BigEarthNet", bands, tuple(BANDS))
        base = data_root(root)
        lines = read_lines(split_list("BigEarthNet", split, list_file, base, ".csv"))
        paths = [base / line.partition(",")[0].strip() for _, line in lines]
        labels = [multi_hot(path / f"{path.name}_labels_metadata.json") for path in paths]
        super().__init__(paths, [0] * len(paths), CLASSES, transform, len(self.bands), strict, seed, training)
        self.labels = labels  # the base class takes one index per sample

    def _check_files(self) -> None:
        """Nothing is left to look for: a patch is a folder, and its labels have been read."""

    def load(self, index: int) -> np.ndarray:
        """(120, 120, bands) float32.

        Raises:
            UnreadableImage: a band is missing or damaged, or has another size than all its files have.
        """
        return np.stack([self._load_band(Path(self.paths[index]), band) for band in self.bands], axis=-1)

    def _load_band(self, folder: Path, band: str) -> np.ndarray:
        path = folder / f"{folder.name}_{band}.tif"
        image, side = read_image(path, 1)[..., 0], BANDS[band]
        if image.shape != (side, side):
            raise UnreadableImage(f"{path} is {image.shape}, band {band} is {side}x{side}; unpack the patch again")
        return cv2.resize(image.astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)
