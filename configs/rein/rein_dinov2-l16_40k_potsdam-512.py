"""Rein (arXiv 2312.04265) as published, for Potsdam: 100 tokens of rank 16, linked to the queries of Mask2Former.

The authors train on street scenes; the schedule is theirs, the data are those of Earth-Adapter's comparison. Tokens and
strength have no weight decay, as published.
2,990,081 trainable parameters and the head's 20,576,455.
"""

from mmengine.config import read_base
from mmengine.optim import PolyLR

from visadapt.adapters.rein import Rein
from visadapt.heads.mask2former import Mask2FormerHead
from visadapt.hooks.files import Checkpoints
from visadapt.tasks.segment import Segmenter

with read_base():
    from .._base_.domains_512 import *
    from .._base_.runtime import *

model = dict(
    type=Segmenter,
    backbone=dict(vit_l16, arch=dict(patch_size=16, img_size=512)),
    neck=pyramid,
    adapters=dict(main=dict(type=Rein)),
    head=dict(type=Mask2FormerHead, num_classes=6, linked_queries=True),
)
train_dataloader = dict(loaders["train"], dataset=domains["potsdam"]["train"])
val_dataloader = dict(loaders["val"], dataset=domains["potsdam"]["val"])
optim_wrapper.update(
    paramwise_cfg=dict(no_decay=["*.level_embed.*", "adapted.adapters.*.pieces.*", "*.refiner.strength"])
)
train_cfg = dict(by_epoch=False, max_iters=40000, val_interval=2000)
param_scheduler = dict(type=PolyLR, power=0.9, eta_min=0.0, begin=0, end=40000, by_epoch=False)
default_hooks = dict(checkpoint=dict(type=Checkpoints, interval=2000, by_epoch=False, keep=2))
