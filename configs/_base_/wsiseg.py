"""WSISEG whole-sky clouds: 140 training images, 40 test images, whole and at their own size of 240 x 225 px, mIoU."""

from visadapt.datasets.masks import collate_masks
from visadapt.datasets.sampler import EpochSampler
from visadapt.datasets.wsiseg import WSISEG
from visadapt.metrics.segment import SegmentationMetric

train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(
        type=WSISEG,
        split="train",
        transform=[dict(type="HorizontalFlip", p=0.5), dict(type="VerticalFlip", p=0.5)],
        training=True,
    ),
    sampler=dict(type=EpochSampler, shuffle=True),
    collate_fn=dict(type=collate_masks),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(type=WSISEG, split="test"),
    sampler=dict(type=EpochSampler, shuffle=False, round_up=False),
    collate_fn=dict(type=collate_masks),
)
val_evaluator = dict(type=SegmentationMetric)
val_cfg = dict()
