"""Poly (arXiv 2202.13914), 4 skills of rank 4 on all linears of a DINOv2 ViT-S/14 (saliency-tuned), on two tasks.

Task 0 is EuroSAT (500 training patches of a fixed list, 500 test patches), task 1 is scikit-learn's digits (500
training scans, 500 held-out scans); one head for the 20 classes. Learning rates of skills and logits, and no weight
decay, after the paper; scaling 2, since the mean of 4 random skills is half as long as one. 1,327,680 trainable
parameters and the head's 7,700.
"""

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR
from torch.optim import AdamW

from visadapt.adapters.poly import Poly
from visadapt.backbones.timm_vit import TimmViT
from visadapt.datasets.base import collate
from visadapt.datasets.digits import Digits
from visadapt.datasets.eurosat import EuroSAT
from visadapt.datasets.joint import Joint
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
    adapters=dict(main=dict(type=Poly, n_tasks=2, n_skills=4, rank=4, alpha=8.0, targets=["all-linear"])),
    head=dict(type=LinearHead, num_classes=20),
)
resize = [dict(type="Resize", height=56, width=56)]
train500 = "data/lists/eurosat_train500.txt"
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    dataset=dict(
        type=Joint,
        parts=[
            dict(type=EuroSAT, split="train", list_file=train500, transform=resize, training=True),
            dict(type=Digits, split="train", transform=resize, training=True),
        ],
    ),
    sampler=dict(type=EpochSampler, shuffle=True),
    collate_fn=dict(type=collate),
)
val_dataloader = dict(
    batch_size=50,
    num_workers=0,
    dataset=dict(
        type=Joint,
        parts=[
            dict(type=EuroSAT, split="test", transform=resize),
            dict(type=Digits, split="test", transform=resize),
        ],
    ),
    sampler=dict(type=EpochSampler, shuffle=False, round_up=False),
    collate_fn=dict(type=collate),
)
val_evaluator = dict(type=ClassificationMetric)
train_cfg = dict(by_epoch=True, max_epochs=4)
val_cfg = dict()
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    constructor=TrainableGroups,
    optimizer=dict(type=AdamW, lr=1e-3, weight_decay=0.0),
)
param_scheduler = dict(type=CosineAnnealingLR, T_max=4, by_epoch=True, convert_to_iter_based=True)
