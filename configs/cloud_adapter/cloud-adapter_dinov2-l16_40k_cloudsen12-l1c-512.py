"""Cloud-Adapter (arXiv 2411.13127), official setting: CloudSEN12-High, level 1C.

Published: mIoU 74.18. 512 px, batches of 4 on one GPU.
The best file is chosen on the validation images; the published one was chosen on the test images.
1,828,425 trainable parameters and the head's 20,561,349.
"""

from mmengine.config import read_base
from mmengine.optim import PolyLR

from visadapt.adapters.cloud_adapter import CloudAdapter
from visadapt.datasets.cloud_sets import CloudSEN12
from visadapt.heads.mask2former import Mask2FormerHead
from visadapt.hooks.files import Checkpoints
from visadapt.tasks.segment import Segmenter

with read_base():
    from .._base_.mask2former_l16 import *
    from .._base_.runtime import *

model = dict(
    type=Segmenter,
    backbone=dict(vit_l16, arch=dict(patch_size=16, img_size=512)),
    neck=pyramid,
    adapters=dict(main=dict(type=CloudAdapter)),
    head=dict(type=Mask2FormerHead, num_classes=4),
)
train_dataloader = dict(
    loaders["train"],
    dataset=dict(
        type=CloudSEN12,
        root="cloudsen12_high_l1c",
        split="train",
        transform=[
            dict(type="RandomCrop", height=512, width=512),
            dict(type="HorizontalFlip", p=0.5),
            colours,
        ],
        training=True,
    ),
)
val_dataloader = dict(
    loaders["val"],
    dataset=dict(
        type=CloudSEN12,
        root="cloudsen12_high_l1c",
        split="val",
        transform=[dict(type="Resize", height=512, width=512)],
        native_masks=True,
    ),
)
test_dataloader = dict(
    loaders["val"],
    dataset=dict(
        type=CloudSEN12,
        root="cloudsen12_high_l1c",
        split="test",
        transform=[dict(type="Resize", height=512, width=512)],
        native_masks=True,
    ),
)
test_evaluator = val_evaluator
test_cfg = dict()
train_cfg = dict(by_epoch=False, max_iters=40000, val_interval=4000)
param_scheduler = dict(type=PolyLR, power=0.9, eta_min=0.0, begin=0, end=40000, by_epoch=False)
default_hooks = dict(checkpoint=dict(type=Checkpoints, interval=4000, by_epoch=False, keep=2))
randomness = dict(seed=42)
