"""What the training loop adds to a hand-written one, and what cached features save."""

from __future__ import annotations

import tempfile
import time
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from torch.utils.data import DataLoader

from ..datasets.base import collate
from ..datasets.digits import Digits
from ..datasets.sampler import EpochSampler
from ..engine import build_runner
from ..hooks.cache import cached
from ..hooks.prefix import Start, first_block
from ..tasks.classify import ImageClassifier
from .setup import Setup, adamw

STEPS = 12
"""Steps per round of the runner's comparison."""


def _model(setup: Setup, adapters: dict | None) -> dict[str, Any]:
    backbone = {"type": "TimmViT", "name": setup.model}
    head = {"type": "visadapt.heads.linear.LinearHead", "num_classes": 10}
    return {"type": "visadapt.tasks.classify.ImageClassifier", "backbone": backbone, "adapters": adapters, "head": head}


def _digits(setup: Setup, size: int) -> DataLoader:
    data = Digits(transform=[{"type": "Resize", "height": size, "width": size}], training=True)
    sampler = EpochSampler(data, seed=0, endless=True)
    return DataLoader(data, setup.batch, sampler=sampler, collate_fn=collate)


class StepTimes(Hook):
    """Seconds from the end of one step to the end of the next, data loading included."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.ends: list[float] = []

    def after_train_iter(self, runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        return median(b - a for a, b in pairwise(self.ends))


def _by_runner(setup: Setup, size: int) -> float:
    """Median seconds per step under the runner with its usual hooks."""
    times = StepTimes()
    resize = [{"type": "Resize", "height": size, "width": size}]
    loader = {
        "batch_size": setup.batch,
        "dataset": {"type": "visadapt.datasets.digits.Digits", "transform": resize, "training": True},
        "sampler": {"type": "visadapt.datasets.sampler.EpochSampler", "endless": True},
        "collate_fn": {"type": "visadapt.datasets.base.collate"},
    }
    with tempfile.TemporaryDirectory() as folder:
        cfg = Config(
            {
                "model": _model(setup, {"main": {"type": "LoRA"}}),
                "train_dataloader": loader,
                "train_cfg": {"by_epoch": False, "max_iters": STEPS + 1},
                "optim_wrapper": {
                    "type": "visadapt.optim.wrapper.AutocastOptimWrapper",
                    "constructor": "visadapt.optim.groups.TrainableGroups",
                    "optimizer": {"type": "torch.optim.AdamW", "lr": 1e-3},
                },
                "custom_hooks": [times],
                "default_hooks": {"checkpoint": None},
                "visualizer": {"type": "mmengine.visualization.Visualizer", "vis_backends": []},
                "work_dir": folder,
                "experiment_name": f"bench{time.time_ns()}",
                "randomness": {"seed": 0},
            }
        )
        build_runner(cfg).train()
    return times.seconds()


def _by_hand(setup: Setup, task: ImageClassifier, size: int) -> float:
    """Median seconds per step of the shortest loop that does the same."""
    optimizer = adamw(task, lr=1e-3)
    ends = []
    task.train()
    for _, batch in zip(range(STEPS + 1), _digits(setup, size)):
        data = task.data_preprocessor(batch)
        loss = task.loss(data["inputs"], data["labels"])["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter())
    return median(b - a for a, b in pairwise(ends))


def runner_cost(setup: Setup) -> dict[str, float]:
    """Runner over hand-written loop: LoRA on real digits at half the image size, in turns."""
    size = setup.size // 2
    task = ImageClassifier(**{k: v for k, v in _model(setup, {"main": {"type": "LoRA"}}).items() if k != "type"})
    task.to(setup.device)
    ratios = [_by_runner(setup, size) / _by_hand(setup, task, size) for _ in range(max(3, setup.rounds // 3))]
    return {"runner_over_loop": median(ratios)}


def cached_epochs(setup: Setup) -> dict[str, float]:
    """Epoch with the backbone in the loop over an epoch on what its frozen part gives.

    The latter is the pooled vector for a head, and the tokens before the last block for LoRA in that block.
    """
    late = {"main": {"type": "LoRA", "layers": [-1]}}
    return {"cached_epoch_speedup": _speedup(setup, None), "prefix_epoch_speedup": _speedup(setup, late)}


def _speedup(setup: Setup, adapters: dict | None) -> float:
    task = ImageClassifier(**{k: v for k, v in _model(setup, adapters).items() if k != "type"}).to(setup.device)
    optimizer = adamw(task, lr=1e-3)
    size, block = setup.size // 2, first_block(task.adapted)
    start = None if block is None else Start(task.adapted, block)
    data = Digits(transform=[{"type": "Resize", "height": size, "width": size}], training=True)
    images = DataLoader(torch.utils.data.Subset(data, range(64)), setup.batch, collate_fn=collate)
    images.dataset.classes = data.classes
    features = DataLoader(cached(task, images, start=start), setup.batch, collate_fn=collate)

    def epoch(loader: DataLoader) -> float:
        began = time.perf_counter()
        for batch in loader:
            if start is not None:
                start.begin(batch, loader.dataset)
            data = task.data_preprocessor(batch)
            task.loss(data.get("inputs"), data["labels"], data.get("features"))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            if start is not None:
                start.end()
        return time.perf_counter() - began

    epoch(features)
    return median(epoch(images) / min(epoch(features) for _ in range(3)) for _ in range(3))
