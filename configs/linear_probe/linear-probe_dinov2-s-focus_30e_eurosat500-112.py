"""A linear probe on the frozen DINOv2 ViT-S/14 (saliency-tuned), on EuroSAT.

500 training patches of a fixed list, 500 test patches. The head's 7,690 parameters train, on features computed once.
"""

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR
from torch.optim import AdamW

from visadapt.backbones.timm_vit import TimmViT
from visadapt.heads.linear import LinearHead
from visadapt.optim.groups import TrainableGroups
from visadapt.optim.wrapper import AutocastOptimWrapper
from visadapt.tasks.classify import ImageClassifier

with read_base():
    from .._base_.eurosat500_112 import *
    from .._base_.runtime import *

model = dict(
    type=ImageClassifier,
    backbone=dict(type=TimmViT, name="vit_small_patch14_dinov2", weights="dinov2_vits14_focus"),
    head=dict(type=LinearHead, num_classes=10),
    pool="cls_avg",  # pool and lr by 5-fold cross-validation on the training patches
)
train_cfg = dict(by_epoch=True, max_epochs=30)
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    constructor=TrainableGroups,
    optimizer=dict(type=AdamW, lr=3e-3, weight_decay=0.0),
)
param_scheduler = dict(type=CosineAnnealingLR, T_max=30, by_epoch=True, convert_to_iter_based=True)
cache_features = True
