"""GaLore (arXiv 2403.03507): all weights of a DINOv2 ViT-S/14 (saliency-tuned), on EuroSAT.

Their gradients are projected to rank 8. 500 training patches of a fixed list, 500 test patches.
22,056,192 trainable parameters and the head's 3,850.
"""

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR

from visadapt.adapters.full import FullFineTune
from visadapt.backbones.timm_vit import TimmViT
from visadapt.heads.linear import LinearHead
from visadapt.optim.galore import GaLore
from visadapt.optim.groups import TrainableGroups
from visadapt.optim.wrapper import AutocastOptimWrapper
from visadapt.tasks.classify import ImageClassifier

with read_base():
    from .._base_.eurosat500_112 import *
    from .._base_.runtime import *

model = dict(
    type=ImageClassifier,
    backbone=dict(type=TimmViT, name="vit_small_patch14_dinov2", weights="dinov2_vits14_focus"),
    adapters=dict(main=dict(type=FullFineTune)),
    head=dict(type=LinearHead, num_classes=10),
)
train_cfg = dict(by_epoch=True, max_epochs=4)
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    constructor=TrainableGroups,
    optimizer=dict(type=GaLore, lr=5e-5, rank=8, scale=4.0, update_proj_gap=50),
    paramwise_cfg=dict(head_lr_mult=20.0),
)
param_scheduler = dict(type=CosineAnnealingLR, T_max=4, by_epoch=True, convert_to_iter_based=True)
