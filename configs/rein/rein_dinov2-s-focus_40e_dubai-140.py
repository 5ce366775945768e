"""Rein (arXiv 2312.04265) on a DINOv2 ViT-S/14 (saliency-tuned), for aerial images of Dubai.

45 training images of tiles 1 to 5, 9 of tile 6 to test. 388,609 trainable parameters and the head's 10,757.
"""

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR
from torch.optim import AdamW

from visadapt.adapters.rein import Rein
from visadapt.backbones.timm_vit import TimmViT
from visadapt.heads.segment import LinearSegHead
from visadapt.hooks.files import AdapterFiles
from visadapt.optim.groups import TrainableGroups
from visadapt.optim.wrapper import AutocastOptimWrapper
from visadapt.tasks.segment import Segmenter

with read_base():
    from .._base_.dubai import *
    from .._base_.runtime import *

model = dict(
    type=Segmenter,
    backbone=dict(
        type=TimmViT,
        name="vit_small_patch14_dinov2",
        weights="dinov2_vits14_focus",
        out_indices=[2, 5, 8, 11],
    ),
    adapters=dict(main=dict(type=Rein, query_dim=None)),
    head=dict(type=LinearSegHead, num_classes=5),
)
train_cfg = dict(by_epoch=True, max_epochs=40, val_interval=40)
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    constructor=TrainableGroups,
    optimizer=dict(type=AdamW, lr=1e-4, weight_decay=0.01),  # as published; the head trains as on the frozen backbone
    paramwise_cfg=dict(head_lr_mult=10.0),
)
param_scheduler = dict(type=CosineAnnealingLR, T_max=40, by_epoch=True, convert_to_iter_based=True)
custom_hooks = [dict(type=AdapterFiles, monitor="miou")]
