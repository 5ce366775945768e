"""Synthetic motion over real frames: 139 pictures of two videos and a room to train, 48 of two other videos to test."""

from visadapt.datasets.clips import collate_clips
from visadapt.datasets.moving_crop import MovingCrop
from visadapt.datasets.sampler import EpochSampler
from visadapt.metrics.classify import ClassificationMetric

train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    dataset=dict(
        type=MovingCrop,
        folders=[
            "davis/DAVIS/JPEGImages/480p/car-shadow",
            "davis/DAVIS/JPEGImages/480p/libby",
            "rgbd_7scenes",
        ],
        shuffled=False,
        training=True,
    ),
    sampler=dict(type=EpochSampler, shuffle=True),
    collate_fn=dict(type=collate_clips),
)
val_dataloader = dict(
    batch_size=24,
    num_workers=0,
    dataset=dict(
        type=MovingCrop,
        folders=["davis/DAVIS/JPEGImages/480p/blackswan", "davis/DAVIS/JPEGImages/480p/dog"],
        shuffled=False,
    ),
    sampler=dict(type=EpochSampler, shuffle=False, round_up=False),
    collate_fn=dict(type=collate_clips),
)
val_evaluator = dict(type=ClassificationMetric)
val_cfg = dict()
