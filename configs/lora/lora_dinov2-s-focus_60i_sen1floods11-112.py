"""LoRA of rank 8 in all linears of a DINOv2 ViT-S/14 (saliency-tuned), for water in 13 bands of Sentinel-2.

One chip: crops of 112 px of its lower half to train, the whole to test. It shows that 13 named bands go through, not
how well floods are found.
663,552 trainable parameters and the head's 6,146.
"""

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR
from torch.optim import AdamW

from visadapt.adapters.lora import LoRA
from visadapt.backbones.timm_vit import TimmViT
from visadapt.datasets.masks import collate_masks
from visadapt.datasets.sampler import EpochSampler
from visadapt.datasets.sen1floods11 import Sen1Floods11
from visadapt.heads.segment import LinearSegHead
from visadapt.hooks.files import AdapterFiles, Checkpoints
from visadapt.metrics.segment import SegmentationMetric
from visadapt.optim.groups import TrainableGroups
from visadapt.optim.wrapper import AutocastOptimWrapper
from visadapt.tasks.segment import Segmenter

with read_base():
    from .._base_.runtime import *

model = dict(
    type=Segmenter,
    backbone=dict(
        type=TimmViT,
        name="vit_small_patch14_dinov2",
        weights="dinov2_vits14_focus",
        in_chans=13,
        mean=[1483, 1270, 1270, 1260, 1436, 1777, 2057, 1887, 2130, 344, 11, 1468, 903],
        std=[168, 275, 354, 491, 469, 705, 837, 825, 964, 141, 1, 895, 638],
        out_indices=[2, 5, 8, 11],
    ),
    adapters=dict(main=dict(type=LoRA, rank=8, alpha=16.0, targets=["all-linear"])),
    head=dict(type=LinearSegHead, num_classes=2),
)

train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(
        type=Sen1Floods11,
        transform=[
            dict(type="Crop", x_min=0, y_min=256, x_max=512, y_max=512),
            dict(type="RandomCrop", height=112, width=112),
            dict(type="D4", p=1.0),
        ],
        training=True,
    ),
    sampler=dict(type=EpochSampler, shuffle=True, endless=True),
    collate_fn=dict(type=collate_masks),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(type=Sen1Floods11, tile=256),
    sampler=dict(type=EpochSampler, shuffle=False, round_up=False),
    collate_fn=dict(type=collate_masks),
)
val_evaluator = dict(type=SegmentationMetric)
val_cfg = dict()
train_cfg = dict(by_epoch=False, max_iters=60, val_interval=60)
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    constructor=TrainableGroups,
    optimizer=dict(type=AdamW, lr=1e-3, weight_decay=0.01),
)
param_scheduler = dict(type=CosineAnnealingLR, T_max=60, by_epoch=False)
default_hooks = dict(checkpoint=dict(type=Checkpoints, interval=60, by_epoch=False))
custom_hooks = [dict(type=AdapterFiles, monitor="miou")]
