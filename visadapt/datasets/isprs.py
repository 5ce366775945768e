"""The two cities of the ISPRS 2D semantic labelling benchmark: Potsdam at 5 cm and Vaihingen at 9 cm."""

from __future__ import annotations

from ..registry import DATASETS
from .masks import SplitFolders


class _ISPRS(SplitFolders):
    """Six classes; 0 in the masks, the eroded boundary between objects, is ignored."""

    CLASSES = ("impervious_surface", "building", "low_vegetation", "tree", "car", "clutter")
    PALETTE = ((255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0))
    REDUCE_ZERO = True


@DATASETS.register_module()
class Potsdam(_ISPRS):
    """ISPRS Potsdam, cut into tiles: `<root>/img_dir/<split>/*.png` and `<root>/ann_dir/<split>/*.png`."""

    ROOT = "potsdam"


@DATASETS.register_module()
class Vaihingen(_ISPRS):
    """ISPRS Vaihingen (near infrared, red, green), cut into tiles: laid out as Potsdam is."""

    ROOT = "vaihingen"
