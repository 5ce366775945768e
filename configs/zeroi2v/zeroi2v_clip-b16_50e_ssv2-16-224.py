"""ZeroI2V in CLIP's ViT-B/16 for Something-Something v2 with 16 frames: the authors' setting, not run here.

14,214,144 trainable parameters, all but 12,288 of them in linear adapters that merge away; 1,536 in the last norm,
and the head's 133,806.
"""

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR, LinearLR
from torch.optim import AdamW

from visadapt.adapters.layernorm import LayerNormTuning
from visadapt.adapters.zeroi2v import ZeroI2V
from visadapt.backbones.timm_vit import TimmViT
from visadapt.datasets.clips import collate_clips
from visadapt.datasets.sampler import EpochSampler
from visadapt.datasets.video_sets import SomethingSomethingV2
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
    num_frames=16,
    adapters=dict(
        main=dict(type=ZeroI2V, num_frames=16, offsets="base-long", scaling=1.0, dropout=0.0),
        norm=dict(type=LayerNormTuning, targets=["norm"]),
    ),
    head=dict(type=LinearHead, num_classes=174, dropout=0.5),
    loss=dict(type=CrossEntropy, label_smoothing=0.1),
    pool="cls",
)
sampling = dict(num_frames=16, sampling="uniform")
train_dataloader = dict(
    batch_size=64,
    num_workers=8,
    dataset=dict(
        type=SomethingSomethingV2,
        split="train",
        transform=[
            dict(type="RandomResizedCrop", size=(224, 224)),
            dict(type="RandAugment", m=7, n=4),
            dict(type="Erasing", p=0.25),
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
    dataset=dict(type=SomethingSomethingV2, split="val", size=224, crops=3, **sampling),
    sampler=dict(type=EpochSampler, shuffle=False, round_up=False),
    collate_fn=dict(type=collate_clips),
)
val_evaluator = dict(type=ClassificationMetric)
val_cfg = dict()
train_cfg = dict(by_epoch=True, max_epochs=50)
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    constructor=TrainableGroups,
    optimizer=dict(type=AdamW, lr=3e-4, weight_decay=0.05),  # for 64 clips per step over all processes
    paramwise_cfg=dict(no_decay=["*.trunk_xx_stem.*", "*.trunk_xx_norm.*"]),
)
param_scheduler = [
    dict(type=LinearLR, start_factor=0.1, begin=0, end=2.5, by_epoch=True, convert_to_iter_based=True),
    dict(type=CosineAnnealingLR, T_max=50, begin=0, end=50, by_epoch=True, convert_to_iter_based=True),
]
