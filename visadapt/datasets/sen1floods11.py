"""Sen1Floods11 (Bonafilia et al. 2020): surface water in Sentinel-2 and Sentinel-1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError, hint
from ..registry import DATASETS
from .base import data_root
from .raster import RasterSegDataset

S2 = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12")
S1 = ("VV", "VH")


@DATASETS.register_module()
class Sen1Floods11(RasterSegDataset):
    """The hand-labelled chips of 512x512: `<root>/S2Hand`, `S1Hand` and `LabelHand`, or `S2`, `S1` and `Labels`.

    Reflectance times 10,000 (13 bands) and backscatter in dB (VV, VH); labels are -1, ignored, 0 land and 1 water.

    Args:
        bands: names of the bands that the model gets, in its order; those of both satellites may be mixed.
        list_file: names of chips such as `Spain_7370579`, one per line; None takes all.
        root: folder of the data set, see `data_root`.
        transform: see SegmentationDataset, as are the arguments below.
        strict: raise at the first unreadable image or mask.
        seed: of the augmentation.
        training: what stands in for an unreadable image or mask.
        native_masks: masks keep the size they have on disk.
        tile: side of the windows that chips are cut into, 0 for none.

    Raises:
        InputError: no such folder, list or band, or chips without labels.
    """

    extra = "geo"
    CLASSES = ("land", "water")
    PALETTE = ((160, 130, 90), (0, 90, 200))

    def __init__(
        self,
        bands: Sequence[str] = S2,
        list_file: str | Path | None = None,
        root: str | Path = "sen1floods11",
        transform: list[dict] | None = None,
        strict: bool = False,
        seed: int = 0,
        training: bool = False,
        native_masks: bool = False,
        tile: int = 0,
    ):
        for band in bands:
            if band not in (*S2, *S1):
                raise InputError(f"Sen1Floods11 has no band '{band}'{hint(band, (*S2, *S1))}")
        base = data_root(root)
        hand = "Hand" if (base / "LabelHand").is_dir() else ""
        satellites = [name for name, own in (("S2", S2), ("S1", S1)) if set(own) & set(bands)]
        if not satellites:
            raise InputError("Sen1Floods11: bands names no band")
        self._files = [(base / f"{name}{hand}", f"_{name}Hand.tif") for name in satellites]
        super().__init__(
            self._files[0][0],
            base / ("LabelHand" if hand else "Labels"),
            self.CLASSES,
            bands=bands,
            list_file=list_file,
            image_suffix=self._files[0][1],
            mask_suffix="_LabelHand.tif",
            transform=transform,
            strict=strict,
            seed=seed,
            training=training,
            ignore=(-1,),
            native_masks=native_masks,
            tile=tile,
        )

    def _check_files(self) -> None:
        super()._check_files()
        self._refuse_missing([path for i in range(len(self)) for path in self._sources(i)], "images")

    def _sources(self, index: int) -> list[str]:
        chip = Path(self.paths[index]).name.removesuffix(self._files[0][1])
        return [str(folder / f"{chip}{suffix}") for folder, suffix in self._files]
