"""Your own clips with a label each: ZeroI2V in a DINOv2 ViT-S/14. Copy this file; it needs no other.

    data/mine/train/wave/a.mp4    data/mine/train/clap/b/0001.jpg, 0002.jpg, ...
    data/mine/val/wave/c.mp4      data/mine/val/clap/d/0001.jpg, 0002.jpg, ...

A clip is a video (mp4, avi, mkv, webm, mov) or a folder with one picture per frame, in the folder of its class; the
classes are the folders in alphabetical order. Where a list gives the labels, take
`dict(type=ClipList, list_file="mine/train.txt", root="mine", classes=[...], ...)` with lines `path label`.
`visadapt data check` reads all clips before anything is trained.
"""

from mmengine.optim import CosineAnnealingLR
from mmengine.visualization import TensorboardVisBackend, Visualizer
from torch.optim import AdamW

from visadapt.adapters.zeroi2v import ZeroI2V
from visadapt.backbones.timm_vit import TimmViT
from visadapt.datasets.clips import collate_clips
from visadapt.datasets.sampler import EpochSampler
from visadapt.datasets.video_lists import ClipFolder
from visadapt.heads.linear import LinearHead
from visadapt.hooks.files import AdapterFiles, Checkpoints
from visadapt.metrics.classify import ClassificationMetric
from visadapt.optim.groups import TrainableGroups
from visadapt.optim.wrapper import AutocastOptimWrapper
from visadapt.tasks.video import VideoClassifier

num_classes = 2
num_frames = 8  # that the model sees at once: model, adapter and both data sets take the same number
epochs = 20
files = dict(
    root="mine",  # without the split
    num_frames=num_frames,
    sampling="uniform",  # over the whole clip; "dense" with stride=... where it is long and any part of it tells
    # short="refuse",  # clips with fewer frames are an error; else their last frame is repeated
)

model = dict(
    type=VideoClassifier,
    backbone=dict(
        type=TimmViT,
        name="vit_small_patch14_dinov2",
        weights="dinov2_vits14_focus",  # or a file, or "timm" to download the model's own
    ),
    num_frames=num_frames,
    # offsets: how far off a frame is, and by how many of the six heads it is seen
    adapters=dict(main=dict(type=ZeroI2V, num_frames=num_frames, offsets=[[1, 1], [-1, 1]])),
    head=dict(type=LinearHead, num_classes=num_classes),
    pool="avg",
)

train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(
        type=ClipFolder,
        split="train",
        transform=[dict(type="RandomResizedCrop", size=(224, 224), scale=(0.5, 1.0))],  # one draw for all frames
        flip=0.5,  # 0 where mirrored clips are of no class, as with letters
        # flip_labels={"left": "right", "right": "left"},  # classes that are each other's mirror image
        training=True,
        **files,
    ),
    sampler=dict(type=EpochSampler, shuffle=True),
    collate_fn=dict(type=collate_clips),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    # size: the square that is cut from each frame; clips=3, crops=3: nine views of a clip, whose scores are averaged
    dataset=dict(type=ClipFolder, split="val", size=224, **files),
    sampler=dict(type=EpochSampler, shuffle=False, round_up=False),
    collate_fn=dict(type=collate_clips),
)
val_evaluator = dict(type=ClassificationMetric)
val_cfg = dict()
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=5)
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    constructor=TrainableGroups,
    optimizer=dict(type=AdamW, lr=5e-4, weight_decay=0.05),
)
param_scheduler = dict(type=CosineAnnealingLR, T_max=epochs, by_epoch=True, convert_to_iter_based=True)
default_hooks = dict(checkpoint=dict(type=Checkpoints, interval=5, by_epoch=True, keep=2))
custom_hooks = [dict(type=AdapterFiles, monitor="top1")]
visualizer = dict(type=Visualizer, vis_backends=[dict(type=TensorboardVisBackend)])
randomness = dict(seed=0)
