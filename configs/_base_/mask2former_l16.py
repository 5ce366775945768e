"""How Cloud-Adapter, Rein and Earth-Adapter train: a frozen DINOv2 ViT-L with patches of 16 pixels, and Mask2Former.

`data/weights/dinov2_vitl14_pretrain.pth` is the authors' own file (patches of 14 pixels); it is resampled as theirs.
AdamW without warm-up, clipping and mixed precision; norms, and embeddings of queries and levels, have no weight decay.
`colours` is MMSegmentation's photometric distortion: brightness, contrast, saturation, hue, each in every second one.
"""

from torch.optim import AdamW

from visadapt.backbones.timm_vit import TimmViT
from visadapt.datasets.masks import collate_masks
from visadapt.datasets.sampler import EpochSampler
from visadapt.hooks.files import AdapterFiles
from visadapt.metrics.segment import SegmentationMetric
from visadapt.necks.pyramid import Pyramid
from visadapt.optim.groups import TrainableGroups
from visadapt.optim.wrapper import AutocastOptimWrapper

vit_l16 = dict(
    type=TimmViT,
    name="vit_large_patch14_dinov2",
    weights="data/weights/dinov2_vitl14_pretrain.pth",
    out_indices=[7, 11, 15, 23],
)
pyramid = dict(type=Pyramid)
colours = dict(
    type="Sequential",
    transforms=[
        dict(type="RandomBrightnessContrast", brightness_limit=32 / 255, contrast_limit=0.0, p=0.5),
        dict(type="RandomBrightnessContrast", brightness_limit=0.0, contrast_limit=0.5, p=0.5),
        dict(type="ColorJitter", brightness=(1, 1), contrast=(1, 1), saturation=(0.5, 1.5), hue=(0, 0), p=0.5),
        dict(type="HueSaturationValue", hue_shift_limit=18, sat_shift_limit=0, val_shift_limit=0, p=0.5),
    ],
    p=1.0,
)

loaders = dict(
    train=dict(
        batch_size=4,
        num_workers=4,
        sampler=dict(type=EpochSampler, shuffle=True, endless=True),
        collate_fn=dict(type=collate_masks),
    ),
    val=dict(
        batch_size=4,
        num_workers=4,
        sampler=dict(type=EpochSampler, shuffle=False, round_up=False),
        collate_fn=dict(type=collate_masks),
    ),
)

optim_wrapper = dict(
    type=AutocastOptimWrapper,
    constructor=TrainableGroups,
    optimizer=dict(type=AdamW, lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(no_decay=["*.query_embed.*", "*.level_embed.*"]),
)
val_evaluator = dict(type=SegmentationMetric)
val_cfg = dict()
custom_hooks = [dict(type=AdapterFiles, monitor="miou")]
