"""LoveDA (Wang et al. 2021): land cover of rural and urban China at 0.3 m."""

from __future__ import annotations

from ..registry import DATASETS
from .masks import SplitFolders


@DATASETS.register_module()
class LoveDA(SplitFolders):
    """LoveDA: tiles of 1024x1024, seven classes; 0 in the masks is "no data" and ignored.

    `<root>/img_dir/<split>/*.png` and `<root>/ann_dir/<split>/*.png`. For one domain of the original archive:
    `split=None, image_dir="Train/Rural/images_png", mask_dir="Train/Rural/masks_png"`.
    """

    ROOT = "loveda"
    CLASSES = ("background", "building", "road", "water", "barren", "forest", "agricultural")
    PALETTE = (
        (255, 255, 255),
        (255, 0, 0),
        (255, 255, 0),
        (0, 0, 255),
        (159, 129, 183),
        (0, 255, 0),
        (255, 195, 128),
    )
    REDUCE_ZERO = True
