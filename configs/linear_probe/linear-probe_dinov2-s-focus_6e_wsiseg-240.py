"""A linear head per pixel on the frozen DINOv2 ViT-S/14 (saliency-tuned), for clouds.

WSISEG: whole-sky photographs from the ground. 140 training images, 40 test images.
The head's 6,146 parameters train.
"""

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR
from torch.optim import AdamW

from visadapt.backbones.timm_vit import TimmViT
from visadapt.heads.segment import LinearSegHead
from visadapt.hooks.files import AdapterFiles
from visadapt.optim.groups import TrainableGroups
from visadapt.optim.wrapper import AutocastOptimWrapper
from visadapt.tasks.segment import Segmenter

with read_base():
    from .._base_.runtime import *
    from .._base_.wsiseg import *

model = dict(
    type=Segmenter,
    backbone=dict(
        type=TimmViT,
        name="vit_small_patch14_dinov2",
        weights="dinov2_vits14_focus",
        out_indices=[2, 5, 8, 11],
    ),
    head=dict(type=LinearSegHead, num_classes=2),
)
train_cfg = dict(by_epoch=True, max_epochs=6, val_interval=6)
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    constructor=TrainableGroups,
    optimizer=dict(type=AdamW, lr=1e-3, weight_decay=0.01),
)
param_scheduler = dict(type=CosineAnnealingLR, T_max=6, by_epoch=True, convert_to_iter_based=True)
custom_hooks = [dict(type=AdapterFiles, monitor="miou")]
