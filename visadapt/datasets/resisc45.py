"""NWPU-RESISC45 (Cheng et al. 2017): 256x256 aerial images of 45 scenes, 700 of each."""

from __future__ import annotations

from pathlib import Path

from ..registry import DATASETS
from .base import ClassificationDataset, data_root
from .eurosat_ms import named_patches, split_list

CLASSES = (
    *("airplane", "airport", "baseball_diamond", "basketball_court", "beach"),
    *("bridge", "chaparral", "church", "circular_farmland", "cloud"),
    *("commercial_area", "dense_residential", "desert", "forest", "freeway"),
    *("golf_course", "ground_track_field", "harbor", "industrial_area", "intersection"),
    *("island", "lake", "meadow", "medium_residential", "mobile_home_park"),
    *("mountain", "overpass", "palace", "parking_lot", "railway"),
    *("railway_station", "rectangular_farmland", "river", "roundabout", "runway"),
    *("sea_ice", "ship", "snowberg", "sparse_residential", "stadium"),
    *("storage_tank", "tennis_court", "terrace", "thermal_power_station", "wetland"),
)


@DATASETS.register_module()
class RESISC45(ClassificationDataset):
    """NWPU-RESISC45: images in `<root>/<class>/<class>_<n>.jpg`.

    The archive has no splits: `<root>/train.txt`, `val.txt` and `test.txt` are lists of the user's, one image per line,
    `<class>_<n>.jpg` with or without its folder, as in the lists of Neumann et al. (2019).

    Args:
        split: train, val or test.
        list_file: another list, in place of the split's own.
        root: folder of the class folders, see `data_root`.
        transform: see ClassificationDataset, as are the arguments below.
        strict: raise at the first unreadable image.
        seed: of the augmentation.
        training: what stands in for an unreadable image.

    Raises:
        InputError: an unknown split, no such folder, no list, or one that names what is not there.
    """

    def __init__(
        self,
        split: str = "train",
        list_file: str | Path | None = None,
        root: str | Path = "NWPU-RESISC45",
        transform: list[dict] | None = None,
        strict: bool = False,
        seed: int = 0,
        training: bool = False,
    ):
        base = data_root(root)
        paths, labels = named_patches(split_list("RESISC45", split, list_file, base), base, CLASSES, ".jpg")
        super().__init__(paths, labels, CLASSES, transform, 3, strict, seed, training)
