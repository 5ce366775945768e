"""Aerial images of Dubai: crops of 140 px of tiles 1 to 5 to train, tile 6 in windows of 256 px to test, mIoU."""

from visadapt.datasets.dubai_aerial import DubaiAerial
from visadapt.datasets.masks import collate_masks
from visadapt.datasets.sampler import EpochSampler
from visadapt.metrics.segment import SegmentationMetric

train_dataloader = dict(
    batch_size=5,
    num_workers=0,
    dataset=dict(
        type=DubaiAerial,
        split="train",
        transform=[dict(type="RandomCrop", height=140, width=140), dict(type="D4", p=1.0)],
        training=True,
    ),
    sampler=dict(type=EpochSampler, shuffle=True),
    collate_fn=dict(type=collate_masks),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(type=DubaiAerial, split="test", tile=256),
    sampler=dict(type=EpochSampler, shuffle=False, round_up=False),
    collate_fn=dict(type=collate_masks),
)
val_evaluator = dict(type=SegmentationMetric)
val_cfg = dict()
