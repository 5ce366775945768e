"""ZeroI2V in CLIP's ViT-B/16 for Kinetics-400 with 8 frames: the authors' setting, not run here.

14,208,000 trainable parameters, all but 6,144 of them in linear adapters that merge away; 1,536 in the last norm,
and the head's 307,600.
"""

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR, LinearLR
from torch.optim import AdamW

from visadapt.adapters.layernorm import LayerNormTuning
from visadapt.adapters.zeroi2v import ZeroI2V
from visadapt.backbones.timm_vit import TimmViT
from visadapt.datasets.clips import collate_clips
from visadapt.datasets.sampler import EpochSampler
from visadapt.datasets.video_sets import Kinetics
from visadapt.heads.linear import LinearHead
from visadapt.losses.classify import CrossEntropy
from visadapt.metrics.classify import ClassificationMetric
from visadapt.optim.groups import TrainableGroups
from visadapt.optim.wrapper import AutocastOptimWrapper
from visadapt.tasks.video import VideoClassifier

with read_base():
    from .._base_.runtime import *

model = dict(
    type=VideoClassifier,
    backbone=dict(type=TimmViT, name="vit_base_patch16_clip_quickgelu_224", weights="timm:openai"),
    num_frames=8,
    adapters=dict(
        main=dict(type=ZeroI2V, num_frames=8, offsets="base", scaling=0.5, dropout=0.1),
        norm=dict(type=LayerNormTuning, targets=["norm"]),
    ),
    head=dict(type=LinearHead, num_classes=400, dropout=0.5),
    loss=dict(type=CrossEntropy),
    pool="cls",
)
sampling = dict(num_frames=8, sampling="dense", stride=16)
train_dataloader = dict(
    batch_size=64,
    num_workers=8,
    dataset=dict(
        type=Kinetics,
        split="train",
        transform=[
            dict(type="SmallestMaxSize", max_size=256),
            dict(type="RandAugment", m=7, n=4),
            dict(type="RandomResizedCrop", size=(224, 224)),
        ],
        flip=0.5,
        training=True,
        **sampling,
    ),
    sampler=dict(type=EpochSampler, shuffle=True),
    collate_fn=dict(type=collate_clips),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=8,
    dataset=dict(type=Kinetics, split="val", size=224, clips=3, **sampling),
    sampler=dict(type=EpochSampler, shuffle=False, round_up=False),
    collate_fn=dict(type=collate_clips),
)
val_evaluator = dict(type=ClassificationMetric)
val_cfg = dict()
train_cfg = dict(by_epoch=True, max_epochs=40)
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    constructor=TrainableGroups,
    optimizer=dict(type=AdamW, lr=3e-4, weight_decay=0.05),  # for 64 clips per step over all processes
    paramwise_cfg=dict(no_decay=["*.trunk_xx_stem.*", "*.trunk_xx_norm.*"]),
)
param_scheduler = [
    dict(type=LinearLR, start_factor=0.1, begin=0, end=2.5, by_epoch=True, convert_to_iter_based=True),
    dict(type=CosineAnnealingLR, T_max=40, begin=0, end=40, by_epoch=True, convert_to_iter_based=True),
]
