"""A linear probe on the frozen DINOv2 ViT-S/14 (saliency-tuned), on scikit-learn's digits.

500 training scans, 500 held-out scans. The head's 3,850 parameters train, on features that are computed once.
"""

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR
from torch.optim import AdamW

from visadapt.backbones.timm_vit import TimmViT
from visadapt.datasets.base import collate
from visadapt.datasets.digits import Digits
from visadapt.datasets.sampler import EpochSampler
from visadapt.heads.linear import LinearHead
from visadapt.metrics.classify import ClassificationMetric
from visadapt.optim.groups import TrainableGroups
from visadapt.optim.wrapper import AutocastOptimWrapper
from visadapt.tasks.classify import ImageClassifier

with read_base():
    from .._base_.runtime import *

model = dict(
    type=ImageClassifier,
    backbone=dict(type=TimmViT, name="vit_small_patch14_dinov2", weights="dinov2_vits14_focus"),
    head=dict(type=LinearHead, num_classes=10),
    pool="avg",  # pool and lr by 5-fold cross-validation on the training scans
)
resize = [dict(type="Resize", height=56, width=56)]
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    dataset=dict(type=Digits, split="train", transform=resize, training=True),
    sampler=dict(type=EpochSampler, shuffle=True),
    collate_fn=dict(type=collate),
)
val_dataloader = dict(
    batch_size=50,
    num_workers=0,
    dataset=dict(type=Digits, split="test", transform=resize),
    sampler=dict(type=EpochSampler, shuffle=False, round_up=False),
    collate_fn=dict(type=collate),
)
val_evaluator = dict(type=ClassificationMetric)
train_cfg = dict(by_epoch=True, max_epochs=30)
val_cfg = dict()
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    constructor=TrainableGroups,
    optimizer=dict(type=AdamW, lr=1e-2, weight_decay=0.0),
)
param_scheduler = dict(type=CosineAnnealingLR, T_max=30, by_epoch=True, convert_to_iter_based=True)
cache_features = True
