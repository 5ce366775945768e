"""Time and memory of a training step against the frozen backbone's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..core.adapted import Adapted
from ..registry import BACKBONES, TASKS
from .methods import disturb, stepper
from .timing import interleaved, ratio

ROUNDS = 5


def step_cost(cfg: Config, size: int) -> tuple[float, float]:
    """Step time and peak memory of a config's model over those of the bare backbone, on random images.

    The bare backbone's step is its forward pass and the backward pass of its input. Weights are random, as values do
    not matter. Peaks are of tensors, above what is held between steps.

    Args:
        cfg: of a training run.
        size: side of the images in pixels.

    Returns:
        Two ratios.
    """
    backbone = dict(cfg.model.backbone, weights=None)
    task, floor = TASKS.build(dict(cfg.model, backbone=backbone)).train(), Adapted(BACKBONES.build(backbone))
    batch = cfg.train_dataloader.batch_size
    images = torch.randn(batch, task.adapted.backbone.in_chans, size, size)
    objective = partial(_loss, pixels="Segmenter" in str(cfg.model.type))
    for name, adapter in task.adapted.adapters.items():
        if adapter.calibration is not None:
            task.adapted.calibrate(name, [partial(objective, task, images)])
    disturb(task.adapted.adapters)
    optimizer = build_optim_wrapper(task, cfg.optim_wrapper).optimizer
    steps = {"floor": stepper(floor, images), "ours": stepper(task, images, objective, optimizer)}
    times = interleaved(steps, ROUNDS)
    peaks = {name: _peak(step) for name, step in steps.items()}
    return ratio(times, "ours", "floor"), peaks["ours"] / peaks["floor"]


def _loss(task: Any, images: Tensor, pixels: bool) -> Tensor:
    """The training loss where all images, or all pixels, are of class 0."""
    labels = torch.zeros((len(images), *images.shape[2:]) if pixels else len(images), dtype=torch.int64)
    truth = {"masks": list(labels)} if pixels else {"labels": labels}
    return sum(task(images, **truth, mode="loss").values())


def _peak(step: Callable[[], None]) -> int:
    """Bytes of tensors that a step needs at its peak, above what is held before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
