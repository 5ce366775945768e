"""Earth-Adapter (arXiv 2504.06220), official setting: trained on Potsdam, tested on Vaihingen.

Published: mIoU 64.93, chosen on the test images. 512 px, 4 images in a batch on one GPU.
1,825,674 trainable parameters and the head's 20,561,863.
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
    adapters=dict(main=dict(type=EarthAdapter, width=24, fft_layers=[18, 19, 20, 21, 22, 23], cutoff=0.3)),
    head=dict(type=Mask2FormerHead, num_classes=6),
)
train_dataloader = dict(loaders["train"], dataset=domains["potsdam"]["train"])
val_dataloader = dict(loaders["val"], dataset=domains["vaihingen"]["val"])
train_cfg = dict(by_epoch=False, max_iters=20000, val_interval=2000)
param_scheduler = dict(type=PolyLR, power=0.9, eta_min=0.0, begin=0, end=20000, by_epoch=False)
default_hooks = dict(checkpoint=dict(type=Checkpoints, interval=2000, by_epoch=False, keep=2))
