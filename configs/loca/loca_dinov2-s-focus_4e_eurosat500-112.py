"""LoCA (ICLR 2025), 3000 coefficients on the queries and values of a DINOv2 ViT-S/14 (saliency-tuned), on EuroSAT.

500 training patches of a fixed list, 500 test patches. Places are learned in the first half of the run.
216,000 trainable parameters, a third of them coefficients and the rest their places, and the head's 3,850.
"""

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR
from torch.optim import AdamW

from visadapt.adapters.loca import LoCA
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
    adapters=dict(main=dict(type=LoCA, coefficients=3000, search=0.5)),
    head=dict(type=LinearHead, num_classes=10),
)
train_cfg = dict(by_epoch=True, max_epochs=4)
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    constructor=TrainableGroups,
    optimizer=dict(type=AdamW, lr=2e-3, weight_decay=0.05),
)
param_scheduler = dict(type=CosineAnnealingLR, T_max=4, by_epoch=True, convert_to_iter_based=True)
