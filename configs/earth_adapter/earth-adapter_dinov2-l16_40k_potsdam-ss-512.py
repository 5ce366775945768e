"""Earth-Adapter (arXiv 2504.06220), official setting: trained and tested on Potsdam.

512 px, 4 images in a batch on one GPU.
2,007,009 trainable parameters and the head's 20,561,863.
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
    adapters=dict(main=dict(type=EarthAdapter, width=32, fft_layers=[21, 22, 23], cutoff=0.2)),
    head=dict(type=Mask2FormerHead, num_classes=6),
)
train_dataloader = dict(loaders["train"], dataset=domains["potsdam"]["train"])
val_dataloader = dict(loaders["val"], dataset=domains["potsdam"]["val"])
train_cfg = dict(by_epoch=False, max_iters=40000, val_interval=2000)
param_scheduler = dict(type=PolyLR, power=0.9, eta_min=0.0, begin=0, end=40000, by_epoch=False)
default_hooks = dict(checkpoint=dict(type=Checkpoints, interval=2000, by_epoch=False, keep=2))
