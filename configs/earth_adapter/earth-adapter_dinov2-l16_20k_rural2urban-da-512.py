"""Earth-Adapter (arXiv 2504.06220), official setting: unsupervised adaptation from rural LoveDA to urban LoveDA.

Published: mIoU 55.90, chosen on the test images. 512 px, 2 source and 2 target images in a batch on one GPU.
1,023,489 trainable parameters and the head's 20,562,120.
"""

from mmengine.config import read_base
from mmengine.optim import PolyLR

from visadapt.adapters.earth_adapter import EarthAdapter
from visadapt.datasets.source_target import SourceTarget, collate_source_target
from visadapt.heads.mask2former import Mask2FormerHead
from visadapt.hooks.files import Checkpoints
from visadapt.tasks.self_train import SelfTraining

with read_base():
    from .._base_.domains_512 import *
    from .._base_.runtime import *

model = dict(
    type=SelfTraining,
    backbone=dict(vit_l16, arch=dict(patch_size=16, img_size=512)),
    neck=pyramid,
    adapters=dict(main=dict(type=EarthAdapter, width=16, fft_layers=[21, 22, 23], cutoff=0.3)),
    head=dict(type=Mask2FormerHead, num_classes=7),
)
train_dataloader = dict(
    loaders["train"],
    batch_size=2,
    dataset=dict(type=SourceTarget, source=domains["rural"]["train"], target=domains["urban"]["target"]),
    collate_fn=dict(type=collate_source_target),
)
val_dataloader = dict(loaders["val"], dataset=domains["urban"]["val"])
train_cfg = dict(by_epoch=False, max_iters=20000, val_interval=2000)
param_scheduler = dict(type=PolyLR, power=0.9, eta_min=0.0, begin=0, end=20000, by_epoch=False)
default_hooks = dict(checkpoint=dict(type=Checkpoints, interval=2000, by_epoch=False, keep=2))
