"""Potsdam, Vaihingen and LoveDA at 512 px, as Earth-Adapter trains and tests on them.

Of `domains`, "train" is labelled, "target" is adapted to without its labels, and "val" is measured. LoveDA is cut into
windows of 512 px; rural and urban are folders of its archive, "loveda" both in the layout of MMSegmentation.
"""

from mmengine.config import read_base

from visadapt.datasets.isprs import Potsdam, Vaihingen
from visadapt.datasets.loveda import LoveDA

with read_base():
    from .mask2former_l16 import *

resize = dict(type="Resize", height=512, width=512)
scale = dict(type="RandomScale", scale_limit=(-0.5, 1.0), p=1.0)
flip = dict(type="HorizontalFlip", p=0.5)
place = dict(height=512, width=512, pad_if_needed=True, pad_position="top_left", fill=(124, 116, 104))
labelled = [scale, dict(place, type="BalancedCrop", max_share=0.75), flip, colours]
unlabelled = [scale, dict(place, type="RandomCrop"), flip, colours]

rural = dict(type=LoveDA, split=None, tile=512)
urban = dict(rural, image_dir="Train/Urban/images_png", mask_dir="Train/Urban/masks_png")
rural = dict(rural, image_dir="Train/Rural/images_png", mask_dir="Train/Rural/masks_png")
whole = dict(transform=[resize], native_masks=True)
domains = dict(
    potsdam=dict(
        train=dict(type=Potsdam, split="train", transform=[resize, *labelled], training=True),
        target=dict(type=Potsdam, split="train", transform=[resize, *unlabelled], training=True),
        val=dict(whole, type=Potsdam, split="val"),
    ),
    vaihingen=dict(
        train=dict(type=Vaihingen, split="train", transform=[resize, *labelled], training=True),
        target=dict(type=Vaihingen, split="train", transform=[resize, *unlabelled], training=True),
        val=dict(whole, type=Vaihingen, split="val"),
    ),
    rural=dict(
        train=dict(rural, transform=labelled, training=True),
        target=dict(rural, transform=unlabelled, training=True),
        val=dict(rural, image_dir="Val/Rural/images_png", mask_dir="Val/Rural/masks_png"),
    ),
    urban=dict(
        train=dict(urban, transform=labelled, training=True),
        target=dict(urban, transform=unlabelled, training=True),
        val=dict(urban, image_dir="Val/Urban/images_png", mask_dir="Val/Urban/masks_png"),
    ),
    loveda=dict(
        train=dict(type=LoveDA, split="train", tile=512, transform=labelled, training=True),
        val=dict(type=LoveDA, split="val", tile=512),
    ),
)
del resize, scale, flip, place, labelled, unlabelled, rural, urban, whole
del colours  # noqa: F821  (of the other base; a config has no such key)
