"""Bi-LoRA of 1 bit, rank 32 on q and v of a DINOv2 ViT-S/14 (saliency-tuned), on EuroSAT.

500 training patches of a fixed list, 500 test patches.
589,824 trainable parameters and the head's 3,850; the adapter takes 72 KiB of a file. Recipe of the paper (ICCV 2023).
"""

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR
from torch.optim import AdamW

from visadapt.adapters.bi_lora import BiLoRA
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
    adapters=dict(main=dict(type=BiLoRA, rank=32, bits=1, scale=10.0, targets=["q", "v"])),
    head=dict(type=LinearHead, num_classes=10),
)
train_cfg = dict(by_epoch=True, max_epochs=4)
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    constructor=TrainableGroups,
    optimizer=dict(type=AdamW, lr=1e-3, weight_decay=1e-4),
)
param_scheduler = dict(type=CosineAnnealingLR, T_max=4, by_epoch=True, convert_to_iter_based=True)
