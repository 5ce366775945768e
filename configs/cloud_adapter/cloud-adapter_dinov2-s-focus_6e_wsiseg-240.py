"""Cloud-Adapter (arXiv 2411.13127) on a DINOv2 ViT-S/14 (saliency-tuned), for clouds.

WSISEG: whole-sky photographs from the ground. 140 training images, 40 test images.
Behind the last six blocks, where the stream is large enough for the random start of the method to leave it useful;
behind all twelve it changes the early maps of a ViT-S by two thirds, and 210 steps do not mend that.
489,033 trainable parameters and the head's 6,146.
"""

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR
from torch.optim import AdamW

from visadapt.adapters.cloud_adapter import CloudAdapter
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
    adapters=dict(main=dict(type=CloudAdapter, layers=[6, 7, 8, 9, 10, 11])),
    head=dict(type=LinearSegHead, num_classes=2),
)
train_cfg = dict(by_epoch=True, max_epochs=6, val_interval=6)
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    constructor=TrainableGroups,
    optimizer=dict(type=AdamW, lr=1e-4, weight_decay=0.01),  # as published; the head trains as on the frozen backbone
    paramwise_cfg=dict(head_lr_mult=10.0),
)
param_scheduler = dict(type=CosineAnnealingLR, T_max=6, by_epoch=True, convert_to_iter_based=True)
custom_hooks = [dict(type=AdapterFiles, monitor="miou")]
