"""Earth-Adapter (arXiv 2504.06220), official setting: trained on rural LoveDA, tested on urban LoveDA.

Published: mIoU 59.02, chosen on the test images. 512 px, 4 images in a batch on one GPU.
4,776,234 trainable parameters and the head's 20,562,120.
"""

from mmengine.config import read_base
from mmengine.optim import PolyLR

from visadapt.adapters.earth_adapter import EarthAdapter
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
    adapters=dict(main=dict(type=EarthAdapter, width=64, fft_layers=[0, 1, 2, 3, 4, 5], cutoff=0.3)),
    head=dict(type=Mask2FormerHead, num_classes=7),
)
train_dataloader = dict(loaders["train"], dataset=domains["rural"]["train"])
val_dataloader = dict(loaders["val"], dataset=domains["urban"]["val"])
train_cfg = dict(by_epoch=False, max_iters=20000, val_interval=2000)
param_scheduler = dict(type=PolyLR, power=0.9, eta_min=0.0, begin=0, end=20000, by_epoch=False)
default_hooks = dict(checkpoint=dict(type=Checkpoints, interval=2000, by_epoch=False, keep=2))
