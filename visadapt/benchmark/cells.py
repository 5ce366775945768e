"""One cell of a benchmark table: a method on a task under a seed, from its config to its result."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import cv2
import torch
from mmengine.config import Config

from .. import __version__, config, engine
from ..checkpoint import unwrap
from ..datasets.inspect import inspect
from ..errors import InputError
from ..hooks.cache import CacheFeatures
from ..registry import ADAPTERS, DATASETS
from ..run_folder import RunFolder
from .cost import step_cost
from .recipes import HEAD_LR, Recipe, adapter_config, recipe
from .results import config_hash, measured
from .suites import SUITES, BenchTask, Protocol, Suite

HYPERPARAMETERS = ("lr", "weight_decay", "scale")
"""What may be chosen per task."""


@dataclass(frozen=True)
class Cell:
    """What one run is about.

    Attributes:
        suite: whose protocol holds.
        task: what is learnt.
        method: name of a recipe.
        seed: of everything that is drawn.
        hyperparameters: values of HYPERPARAMETERS that were chosen; a search gives all of them.
        select: train on "train" and measure on "val", to choose hyperparameters; else on "trainval" and "test".
    """

    suite: Suite
    task: BenchTask
    method: str
    seed: int
    hyperparameters: Mapping[str, float] = field(default_factory=dict)
    select: bool = False

    @property
    def protocol(self) -> Protocol:
        """That of the suite, with the task's own values."""
        return self.suite.protocol_of(self.task)

    @property
    def config(self) -> Config:
        """Of the run, as `visadapt train` takes it."""
        return Config(cell_config(self))

    @property
    def key(self) -> str:
        """Identity of the run: a hash of its config."""
        return config_hash(self.config)

    @property
    def name(self) -> str:
        chosen = "".join(f", {key} {value:g}" for key, value in self.hyperparameters.items())
        return f"{'trial of ' * self.select}{self.method} {self.task.name} seed {self.seed}{chosen}"

    @property
    def config_file(self) -> Path:
        """Where the config of a finished cell is kept, below the folder of results."""
        method = re.sub(r"\W+", "-", self.method.replace("+", "-plus").lower())
        chosen = "".join(f"_{key}-{value:g}" for key, value in sorted(self.hyperparameters.items()))
        mine, usual = self.protocol, SUITES.get(self.suite.name)
        if usual is not None and mine != usual().protocol_of(self.task):
            chosen += re.sub(r"\W+", "-", f"_{mine.model}_{mine.size}px_{mine.epochs}e_b{mine.batch}")
        return Path("configs") / self.suite.name / f"{method}_{self.task.name}{chosen}.py"


def cell_config(cell: Cell) -> dict[str, Any]:
    """The settings of a cell.

    Raises:
        InputError: the method has no such hyperparameter.
    """
    found, protocol, task = recipe(cell.method), cell.protocol, cell.task
    train, test = ("train", "val") if cell.select else ("trainval", "test")
    cls = ADAPTERS.get(found.adapter)
    frozen = "layers" in found.arguments or not (cls.kinds or cls.trains_base)  # the blocks before these layers, or all
    changing = task.pixels or protocol.seen != "whole" or not frozen
    return {
        "model": _model(cell, found, train),
        "train_dataloader": _loader(cell, train, training=True),
        "val_dataloader": _loader(cell, test, training=False),
        "val_evaluator": {"type": "SegmentationMetric" if task.pixels else "ClassificationMetric"},
        "train_cfg": {"by_epoch": True, "max_epochs": protocol.epochs, "val_interval": protocol.epochs},
        "val_cfg": {},
        "optim_wrapper": _optimizer(cell, found),
        "param_scheduler": {
            "type": "CosineAnnealingLR",
            "T_max": protocol.epochs,
            "by_epoch": True,
            "convert_to_iter_based": True,
        },
        "default_hooks": {"checkpoint": None, "logger": {"type": "LoggerHook", "interval": 10}},
        "custom_hooks": [{"type": "visadapt.hooks.files.AdapterFiles", "monitor": "miou" if task.pixels else "top1"}],
        "randomness": {"seed": cell.seed},
        **({} if changing else {"cache_features": True}),
    }


def _model(cell: Cell, found: Recipe, train: str) -> dict[str, Any]:
    task, protocol = cell.task, cell.protocol
    adapter = adapter_config(found)
    if "scale" in cell.hyperparameters:
        if found.scale_argument is None:
            raise InputError(f"{cell.method} has no scale to choose; leave out scale")
        adapter[found.scale_argument] = cell.hyperparameters["scale"]
    backbone: dict[str, Any] = {"type": "TimmViT", "name": protocol.model, "weights": protocol.weights}
    if task.channels != 3:
        backbone |= {"in_chans": task.channels, "bands": "mean", **statistics(json.dumps(task.data[train]))}
    if task.pixels:
        backbone["out_indices"] = [-10, -7, -4, -1]
    return {
        "type": "Segmenter" if task.pixels else "ImageClassifier",
        "backbone": backbone,
        "adapters": {"main": adapter},
        "head": {"type": "LinearSegHead" if task.pixels else "LinearHead", "num_classes": task.classes},
        **({} if found.loss is None else {"loss": {"type": found.loss}}),
    }


@cache
def statistics(data: str) -> dict[str, list[float]]:
    """ "mean" and "std" of each band over all images of a data set, whose config is given as JSON; to six digits."""
    bands = inspect(DATASETS.build(json.loads(data))).bands.rows(None)
    return {key: [band[key] for band in bands] for key in ("mean", "std")}


def _loader(cell: Cell, split: str, training: bool) -> dict[str, Any]:
    task, protocol = cell.task, cell.protocol
    dataset = dict(task.data[split], training=training)
    if task.seeded is not None:
        dataset[task.seeded] = cell.seed
    if task.pixels:
        dataset |= _windows(task.tile, protocol.size, training)
    else:
        dataset["transform"] = _views(protocol, training)
    return {
        "batch_size": protocol.batch if training else protocol.test_batch,
        "num_workers": 0,
        "drop_last": training,
        "dataset": dataset,
        "sampler": {"type": "visadapt.datasets.sampler.EpochSampler", "shuffle": training, "round_up": training},
        "collate_fn": {"type": f"visadapt.datasets.{'masks.collate_masks' if task.pixels else 'base.collate'}"},
    }


def _windows(tile: int, size: int, training: bool) -> dict[str, Any]:
    """Windows of images with masks, without augmentation; figures are those of the masks as they are."""
    if tile == size:
        return {"tile": tile}
    resize = {"type": "Resize", "height": size, "width": size}
    return {"tile": tile, "transform": [resize], **({} if training else {"native_masks": True})}


AREA = {"area_for_downscale": "image"}
"""Shrinking by means over areas, which is nearer to Pillow's smoothing than four points are: by 1 grey level of 255 on
a photograph of twice the size, where OpenCV's bilinear is off by 2."""


def _views(protocol: Protocol, training: bool) -> list[dict[str, Any]]:
    """Transforms of images with labels, see `visadapt.benchmark.suites.Seen`."""
    size, seen = protocol.size, protocol.seen
    square, flip = {"height": size, "width": size}, {"type": "HorizontalFlip", "p": 0.5}
    if seen == "whole":
        return [{"type": "BicubicResize", **square}]
    if seen == "zoomed" and training:
        part = {"type": "RandomResizedCrop", "size": [size, size], "scale": [0.08, 1.0]}
        return [{**part, "interpolation": cv2.INTER_CUBIC, **AREA}, flip]
    side, kind = (round(size * 8 / 7), cv2.INTER_LINEAR) if seen == "cropped" else (size, cv2.INTER_CUBIC)
    shrink = {"type": "SmallestMaxSize", "max_size": side, "interpolation": kind, **AREA}
    return [shrink, *([{"type": "RandomCrop", **square}, flip] if training else [{"type": "CenterCrop", **square}])]


def _optimizer(cell: Cell, found: Recipe) -> dict[str, Any]:
    chosen = cell.hyperparameters
    lr, decay = chosen.get("lr", found.lr), chosen.get("weight_decay", found.weight_decay)
    groups = {"head_lr_mult": HEAD_LR / found.lr, "decay_vectors": found.decay_vectors, **found.groups}
    return {
        "type": "visadapt.optim.wrapper.AutocastOptimWrapper",
        "constructor": "visadapt.optim.groups.TrainableGroups",
        "optimizer": {**found.optimizer, "lr": lr, "weight_decay": decay},
        "paramwise_cfg": groups,
    }


def run_cell(cell: Cell, folder: Path, threads: int) -> dict[str, Any]:
    """Train a cell in a folder of its own and measure it; an earlier run in the folder is replaced.

    Returns:
        The result as one JSON object.
    """
    torch.set_num_threads(threads)
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    config.dump(cell.config, folder / "config.py")
    cfg = config.load(folder / "config.py")
    for loader in (cfg.train_dataloader, cfg.val_dataloader):  # figures over fewer images are other figures
        if "strict" in signature(DATASETS.get(loader.dataset.type)).parameters:
            loader.dataset.strict = True
    time_ratio, memory_ratio = step_cost(cfg, cell.protocol.size)
    cfg.work_dir = str(folder)
    written = RunFolder(Config(cfg.to_dict()), overwrite=True)
    runner = engine.build_runner(cfg)
    runner.register_hook(written)
    for kept in (hook for hook in runner.hooks if isinstance(hook, CacheFeatures)):
        kept.folder = folder.parent / "features"  # of all cells of the sweep
    runner.train()
    heads, protocol = unwrap(runner.model).heads, cell.suite.protocol
    return {
        **{"suite": cell.suite.name, "method": cell.method, "task": cell.task.name, "group": cell.task.group},
        **{"seed": cell.seed, "backbone": f"{protocol.model}, {protocol.weights or 'random weights'}"},
        **measured(runner),
        "hyperparameters": dict(cell.hyperparameters),
        "protocol": described(cell),
        "head_params": sum(p.numel() for head in heads.values() for p in head.parameters()),
        **{"step_time_ratio": time_ratio, "memory_ratio": memory_ratio},
        **{"seconds": round(time.perf_counter() - start, 1), "threads": threads, "machine": platform.machine()},
        **{"adapter_file": str(folder / "adapter_last.safetensors"), "config_hash": cell.key, "version": __version__},
    }


def described(cell: Cell) -> dict[str, Any]:
    """What a reader wants to know of the training without opening the config."""
    protocol, optimizer = cell.protocol, cell.config.optim_wrapper.optimizer
    return {
        **{"size": protocol.size, "epochs": protocol.epochs, "batch": protocol.batch},
        **{key: optimizer[key] for key in ("lr", "weight_decay")},
    }
