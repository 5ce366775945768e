"""Your own images with a class for every pixel: a LoRA on a DINOv2 ViT-S/14. Copy this file; it needs no other.

    data/mine/images/train/a.jpg    data/mine/masks/train/a.png
    data/mine/images/val/b.jpg      data/mine/masks/val/b.png

A mask has its image's size and name, and holds the index of the class of every pixel: 0, 1, ..., and 255 where nothing
is to be learnt. Images may differ in size. `visadapt data check` reads all of them before anything is trained.
"""

from mmengine.optim import CosineAnnealingLR
from mmengine.visualization import TensorboardVisBackend, Visualizer
from torch.optim import AdamW

from visadapt.adapters.lora import LoRA
from visadapt.backbones.timm_vit import TimmViT
from visadapt.datasets.masks import collate_masks
from visadapt.datasets.raster import RasterSegDataset
from visadapt.datasets.sampler import EpochSampler
from visadapt.heads.segment import LinearSegHead
from visadapt.hooks.files import AdapterFiles, Checkpoints
from visadapt.metrics.segment import SegmentationMetric
from visadapt.optim.groups import TrainableGroups
from visadapt.optim.wrapper import AutocastOptimWrapper
from visadapt.tasks.segment import Segmenter

classes = ["background", "object"]  # in the order of their indices in the masks
epochs = 40
files = dict(
    classes=classes,
    image_suffix=".jpg",  # .tif and .npy may have any number of bands
    mask_suffix=".png",
    # label_map={0: 0, 255: 1},  # of each number, where masks hold other numbers than indices
    # colors=["#000000", "#ff0000"],  # of each class, where masks hold colours in place of indices
    # bands=["B02", "B03", "B04", "B08"],  # of rasters with named bands: those that the model gets, in its order
)

model = dict(
    type=Segmenter,
    backbone=dict(
        type=TimmViT,
        name="vit_small_patch14_dinov2",
        weights="dinov2_vits14_focus",  # or a file, or "timm" to download the model's own
        # in_chans=4, mean=[...], std=[...],  # for other images than 8-bit RGB; `data check` prints mean and std
        out_indices=[2, 5, 8, 11],
    ),
    adapters=dict(main=dict(type=LoRA, rank=8, alpha=16.0, targets=["all-linear"])),
    head=dict(type=LinearSegHead, num_classes=len(classes)),
)

train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(
        type=RasterSegDataset,
        image_dir="mine/images/train",
        mask_dir="mine/masks/train",
        transform=[
            dict(type="RandomCrop", height=224, width=224, pad_if_needed=True),  # what is filled up takes no part
            dict(type="D4", p=1.0),  # flips and quarter turns; dict(type="HorizontalFlip", p=0.5) where up is up
        ],
        training=True,
        **files,
    ),
    sampler=dict(type=EpochSampler, shuffle=True),
    collate_fn=dict(type=collate_masks),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    # windows of 224 px, as images of different sizes make no batch
    dataset=dict(type=RasterSegDataset, image_dir="mine/images/val", mask_dir="mine/masks/val", tile=224, **files),
    sampler=dict(type=EpochSampler, shuffle=False, round_up=False),
    collate_fn=dict(type=collate_masks),
)
val_evaluator = dict(type=SegmentationMetric)
val_cfg = dict()
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=5)
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    constructor=TrainableGroups,
    optimizer=dict(type=AdamW, lr=1e-3, weight_decay=0.01),
)
param_scheduler = dict(type=CosineAnnealingLR, T_max=epochs, by_epoch=True, convert_to_iter_based=True)
default_hooks = dict(checkpoint=dict(type=Checkpoints, interval=5, by_epoch=True, keep=2))
custom_hooks = [dict(type=AdapterFiles, monitor="miou")]
visualizer = dict(type=Visualizer, vis_backends=[dict(type=TensorboardVisBackend)])
randomness = dict(seed=0)
