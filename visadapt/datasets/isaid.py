"""iSAID (Waqas Zamir et al. 2019): the objects of DOTA, pixel by pixel."""

from __future__ import annotations

from ..registry import DATASETS
from .masks import SplitFolders


@DATASETS.register_module()
class iSAID(SplitFolders):
    """iSAID, cut into tiles: background and fifteen sorts of objects; 255 in the masks is ignored.

    `<root>/img_dir/<split>/P0000_0_896_0_896.png` and, with class indices in spite of the name,
    `<root>/ann_dir/<split>/P0000_0_896_0_896_instance_color_RGB.png`.
    """

    ROOT = "iSAID"
    CLASSES = (
        "background",
        "ship",
        "store_tank",
        "baseball_diamond",
        "tennis_court",
        "basketball_court",
        "ground_track_field",
        "bridge",
        "large_vehicle",
        "small_vehicle",
        "helicopter",
        "swimming_pool",
        "roundabout",
        "soccer_ball_field",
        "plane",
        "harbor",
    )
    PALETTE = (
        (0, 0, 0),
        (0, 0, 63),
        (0, 63, 63),
        (0, 63, 0),
        (0, 63, 127),
        (0, 63, 191),
        (0, 63, 255),
        (0, 127, 63),
        (0, 127, 127),
        (0, 0, 127),
        (0, 0, 191),
        (0, 0, 255),
        (0, 191, 127),
        (0, 127, 191),
        (0, 127, 255),
        (0, 100, 155),
    )
    MASK_SUFFIX = "_instance_color_RGB.png"
