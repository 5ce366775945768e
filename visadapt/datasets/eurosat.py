"""EuroSAT (Helber et al. 2019): 64x64 Sentinel-2 patches of ten land uses."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError, hint
from ..registry import DATASETS
from .base import data_root, find_list
from .folder import FolderDataset

SPLITS = ("train", "val", "test")


@DATASETS.register_module()
class EuroSAT(FolderDataset):
    """EuroSAT RGB: images in `<root>/2750/<Class>/`, splits in `<root>/train.txt`, `val.txt` and `test.txt`.

    Args:
        split: train, val or test.
        list_file: another list of `<Class>/<image>` lines, in place of the split's own.
        root: folder of the data set, see `data_root`.
        transform: see ClassificationDataset, as are the arguments below.
        strict: raise at the first unreadable image.
        seed: of the augmentation.
        training: what stands in for an unreadable image.

    Raises:
        InputError: an unknown split, no such folder, or a list that names what is not there.
    """

    def __init__(
        self,
        split: str = "train",
        list_file: str | Path | None = None,
        root: str | Path = "eurosat",
        transform: list[dict] | None = None,
        strict: bool = False,
        seed: int = 0,
        training: bool = False,
    ):
        if split not in SPLITS:
            raise InputError(f"EuroSAT has no split '{split}'{hint(split, SPLITS)}")
        base = data_root(root)
        if not (base / "2750").is_dir():
            raise InputError(f"EuroSAT: {base} has no folder 2750; unpack EuroSAT.zip there, see data/README.md")
        chosen = find_list(list_file, base) if list_file else base / f"{split}.txt"
        super().__init__(base / "2750", chosen, transform, 3, strict, seed, training)
