"""A linear head on the mean of frozen frames of a DINOv2 ViT-S/14 (saliency-tuned), for the motion of a window.

Synthetic motion over real frames: a window moves over a picture to the left, to the right, grows, shrinks or stays.
139 training pictures, 48 test pictures of other videos, five clips of 4 frames each. The head's 1,925
parameters train.
"""

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR, LinearLR
from torch.optim import AdamW

from visadapt.backbones.timm_vit import TimmViT
from visadapt.heads.linear import LinearHead
from visadapt.optim.groups import TrainableGroups
from visadapt.optim.wrapper import AutocastOptimWrapper
from visadapt.tasks.video import VideoClassifier

with read_base():
    from .._base_.moving_crop import *
    from .._base_.runtime import *

model = dict(
    type=VideoClassifier,
    backbone=dict(type=TimmViT, name="vit_small_patch14_dinov2", weights="dinov2_vits14_focus"),
    num_frames=4,
    head=dict(type=LinearHead, num_classes=5),
    pool="avg",
)
train_cfg = dict(by_epoch=True, max_epochs=9, val_interval=9)
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    constructor=TrainableGroups,
    optimizer=dict(type=AdamW, lr=5e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type=LinearLR, start_factor=0.1, begin=0, end=1, by_epoch=True, convert_to_iter_based=True),
    dict(type=CosineAnnealingLR, T_max=8, begin=1, end=9, by_epoch=True, convert_to_iter_based=True),
]
