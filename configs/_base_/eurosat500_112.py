"""EuroSAT at 112 px: 500 training patches of a fixed list, the 500 test patches, top-1."""

from visadapt.datasets.base import collate
from visadapt.datasets.eurosat import EuroSAT
from visadapt.datasets.sampler import EpochSampler
from visadapt.metrics.classify import ClassificationMetric

train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    dataset=dict(
        type=EuroSAT,
        split="train",
        list_file="data/lists/eurosat_train500.txt",
        transform=[dict(type="Resize", height=112, width=112)],
        training=True,
    ),
    sampler=dict(type=EpochSampler, shuffle=True),
    collate_fn=dict(type=collate),
)
val_dataloader = dict(
    batch_size=50,
    num_workers=0,
    dataset=dict(type=EuroSAT, split="test", transform=[dict(type="Resize", height=112, width=112)]),
    sampler=dict(type=EpochSampler, shuffle=False, round_up=False),
    collate_fn=dict(type=collate),
)
val_evaluator = dict(type=ClassificationMetric)
val_cfg = dict()
