"""MoSA (arXiv 2312.02923), width 16 beside every MLP of a DINOv2 ViT-S/14 (saliency-tuned), on EuroSAT.

500 training patches of a fixed list, 500 test patches. Rate and width after the paper's VTAB-1k, for batches of 16.
396,480 trainable parameters and the head's 3,850; the merged adapter that is stored has 161,472.
"""

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR
from torch.optim import AdamW

from visadapt.adapters.mosa import MoSA
from visadapt.backbones.timm_vit import TimmViT
from visadapt.heads.linear import LinearHead
from visadapt.losses.consistency import Consistency
from visadapt.optim.groups import TrainableGroups
from visadapt.optim.wrapper import AutocastOptimWrapper
from visadapt.tasks.classify import ImageClassifier

with read_base():
    from .._base_.eurosat500_112 import *
    from .._base_.runtime import *

model = dict(
    type=ImageClassifier,
    backbone=dict(type=TimmViT, name="vit_small_patch14_dinov2", weights="dinov2_vits14_focus"),
    adapters=dict(main=dict(type=MoSA, width=16)),
    head=dict(type=LinearHead, num_classes=10),
    loss=dict(type=Consistency),
)
train_cfg = dict(by_epoch=True, max_epochs=4)
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    constructor=TrainableGroups,
    optimizer=dict(type=AdamW, lr=2e-3, weight_decay=0.01),
)
param_scheduler = dict(type=CosineAnnealingLR, T_max=4, by_epoch=True, convert_to_iter_based=True)
