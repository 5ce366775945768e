"""How Cloud-Adapter, Rein and Earth-Adapter train: a frozen DINOv2 ViT-L with patches of 16 pixels, and Mask2Former.

`data/weights/dinov2_vitl14_pretrain.pth` is the authors' own file (patches of 14 pixels); it is resampled as theirs.
AdamW without warm-up, clipping and mixed precision. Norms, biases and scales have no weight decay; in the official code
biases have it.
"""

from torch.optim import AdamW

from visadapt.backbones.timm_vit import TimmViT
from visadapt.hooks.files import AdapterFiles
from visadapt.metrics.segment import SegmentationMetric
from visadapt.necks.pyramid import Pyramid
from visadapt.optim.groups import TrainableGroups
from visadapt.optim.wrapper import AutocastOptimWrapper

vit_l16 = dict(
    type=TimmViT,
    name="vit_large_patch14_dinov2",
    weights="data/weights/dinov2_vitl14_pretrain.pth",
    out_indices=[7, 11, 15, 23],
)
pyramid = dict(type=Pyramid)
colours = dict(
    type="ColorJitter", brightness=(0.875, 1.125), contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=0.05, p=0.5
)

optim_wrapper = dict(
    type=AutocastOptimWrapper,
    constructor=TrainableGroups,
    optimizer=dict(type=AdamW, lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(decay_vectors=False),
)
val_evaluator = dict(type=SegmentationMetric)
val_cfg = dict()
custom_hooks = [dict(type=AdapterFiles, monitor="miou")]
