"""The cloud sets that Cloud-Adapter (Zou et al. 2025) is measured on, in its layout: RGB png and masks of indices."""

from __future__ import annotations

from ..registry import DATASETS
from .masks import SplitFolders


class _TwoClasses(SplitFolders):
    CLASSES = ("clear sky", "cloud")
    PALETTE = ((128, 192, 128), (255, 255, 255))


@DATASETS.register_module()
class HRC_WHU(_TwoClasses):
    """HRC_WHU (Li et al. 2019): Google Earth scenes at 0.5 to 15 m; the splits are train (120) and test (30)."""

    ROOT = "hrc_whu"


@DATASETS.register_module()
class GF12MS_WHU(_TwoClasses):
    """GF12MS_WHU (Zhu et al. 2024): crops of 250x250 of Gaofen; for Gaofen-2 give `root="gf12ms_whu_gf2"`.

    Red, green and blue are bands 3, 2 and 1, scaled to 8 bits.
    """

    ROOT = "gf12ms_whu_gf1"


@DATASETS.register_module()
class CloudSEN12(SplitFolders):
    """CloudSEN12, high-quality labels (Aybar et al. 2022): B4, B3 and B2 of Sentinel-2, 512x512.

    Splits are train (8490), val (535) and test (975). For level 2A give `root="cloudsen12_high_l2a"`.
    """

    ROOT = "cloudsen12_high_l1c"
    CLASSES = ("clear", "thick cloud", "thin cloud", "cloud shadow")
    PALETTE = ((128, 192, 128), (255, 255, 255), (192, 192, 255), (64, 64, 64))


@DATASETS.register_module()
class L8Biome(SplitFolders):
    """L8 Biome (Foga et al. 2017): crops of 512x512 of Landsat 8.

    Masks hold class indices, or the numbers of the original: 64 shadow, 128 clear, 192 thin cloud, 255 cloud, 0 outside
    of the scene, which counts as clear as it does for Cloud-Adapter.
    """

    ROOT = "l8_biome"
    CLASSES = ("Clear", "Cloud Shadow", "Thin Cloud", "Cloud")
    PALETTE = ((128, 192, 128), (64, 64, 64), (192, 192, 255), (255, 255, 255))
    LABEL_MAP = {0: 0, 1: 1, 2: 2, 3: 3, 64: 1, 128: 0, 192: 2, 255: 3}
