"""Cloud-Adapter (arXiv 2411.13127), official setting: HRC_WHU.

Published: mIoU 89.05. 256 px, batches of 4 on one GPU.
The best file is chosen on the test images, as published: report adapter_last.
1,828,425 trainable parameters and the head's 20,560,835.
"""

from mmengine.config import read_base
from mmengine.optim import PolyLR

from visadapt.adapters.cloud_adapter import CloudAdapter
from visadapt.datasets.cloud_sets import HRC_WHU
from visadapt.heads.mask2former import Mask2FormerHead
from visadapt.hooks.files import Checkpoints
from visadapt.tasks.segment import Segmenter

with read_base():
    from .._base_.mask2former_l16 import *
    from .._base_.runtime import *

model = dict(
    type=Segmenter,
    backbone=dict(vit_l16, arch=dict(patch_size=16, img_size=256)),
    neck=pyramid,
    adapters=dict(main=dict(type=CloudAdapter)),
    head=dict(type=Mask2FormerHead, num_classes=2),
)
train_dataloader = dict(
    loaders["train"],
    dataset=dict(
        type=HRC_WHU,
        split="train",
        transform=[
            dict(type="RandomCrop", height=256, width=256),
            dict(type="HorizontalFlip", p=0.5),
            colours,
        ],
        training=True,
    ),
)
val_dataloader = dict(
    loaders["val"],
    dataset=dict(
        type=HRC_WHU,
        split="test",
        transform=[dict(type="Resize", height=256, width=256)],
        native_masks=True,
    ),
)
train_cfg = dict(by_epoch=False, max_iters=40000, val_interval=4000)
param_scheduler = dict(type=PolyLR, power=0.9, eta_min=0.0, begin=0, end=40000, by_epoch=False)
default_hooks = dict(checkpoint=dict(type=Checkpoints, interval=4000, by_epoch=False, keep=2))
randomness = dict(seed=42)
