"""GID (Tong et al. 2020): land cover of China seen by Gaofen-2, five classes."""

from __future__ import annotations

from ..registry import DATASETS
from .masks import SplitFolders


@DATASETS.register_module()
class GID(SplitFolders):
    """GID with five classes, cut into tiles; 0 in the masks, which belongs to none of them, is ignored.

    `<root>/img_dir/<split>/*.png` and `<root>/ann_dir/<split>/*.png` with 1 to 5. The uncut tifs with coloured masks
    are a RasterSegDataset with `colors=GID.PALETTE`, `ignore=["#000000"]` and a `tile`.
    """

    ROOT = "gid"
    CLASSES = ("built_up", "farmland", "forest", "meadow", "water")
    PALETTE = ((255, 0, 0), (0, 255, 0), (0, 255, 255), (255, 255, 0), (0, 0, 255))
    REDUCE_ZERO = True
