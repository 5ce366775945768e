"""What a frozen backbone makes of images, computed once."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from torch import Tensor
from torch.utils.data import DataLoader

from ..checkpoint import unwrap
from ..datasets.base import collate
from ..datasets.cached import FeatureDataset
from ..datasets.sampler import EpochSampler
from ..errors import InputError
from ..tasks.classify import ImageClassifier
from .kept import file_of, keep, load
from .prefix import Start, first_block

LIMIT = 2 * 2**30
"""Bytes of tokens of one data set; with more the backbone runs whole, for they are in memory while they are made."""


class CacheFeatures(Hook):
    """Replace the images of both loaders by what the frozen part of the backbone makes of them, before training.

    That are pooled vectors where only a head trains, and else the tokens that enter the first block that is not frozen.
    Only for images whose transforms leave nothing to chance.

    Args:
        folder: where features are kept for other runs; "features" in the folder of the run where None.
    """

    priority = "HIGHEST"

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.start: Start | None = None

    def before_train(self, runner) -> None:
        task = unwrap(runner.model)
        self.check(task, runner.train_loop.dataloader.dataset)
        if (block := first_block(task.adapted)) is not None:
            with runner.optim_wrapper.optim_context(task):
                if torch.is_autocast_enabled(next(task.parameters()).device.type):
                    raise InputError("cache_features with adapters needs full precision: set optim_wrapper.dtype=None")
            self.start = Start(task.adapted, block)
        folder = self.folder or Path(runner.work_dir) / "features"
        for loop in (runner.train_loop, runner.val_loop):
            dataset = None if loop is None else cached(task, loop.dataloader, folder, self.start)
            if dataset is None:
                continue
            loop.dataloader = _reload(loop.dataloader, dataset)
            if hasattr(loop, "dataloader_iterator"):
                loop.dataloader_iterator = type(loop.dataloader_iterator)(loop.dataloader)

    def before_train_iter(self, runner, batch_idx: int, data_batch: Any = None) -> None:
        if self.start is not None:
            self.start.begin(data_batch, runner.train_loop.dataloader.dataset)

    def before_val_iter(self, runner, batch_idx: int, data_batch: Any = None) -> None:
        if self.start is not None:
            self.start.begin(data_batch, runner.val_loop.dataloader.dataset)

    def after_train_iter(self, runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self.start is not None:
            self.start.end()

    after_val_iter = after_train_iter

    @staticmethod
    def check(task: Any, dataset: Any) -> None:
        """Refuse what cannot be computed once.

        Raises:
            InputError: with the reason.
        """
        if not isinstance(task, ImageClassifier):
            raise InputError(
                f"cache_features is for classifiers of images, not for {type(task).__name__}; leave it out"
            )
        first_block(task.adapted)
        if task.adapted.base_mode == "train":
            raise InputError("cache_features needs base_mode='eval': the backbone draws anew in every training step")
        if task.mix is not None:
            raise InputError("cache_features and mix exclude each other: mixed images have features of their own")
        transform = getattr(dataset, "transform", None)
        if hasattr(dataset, "num_frames"):
            raise InputError("cache_features is for images, not for clips; leave it out")
        if transform is not None and transform.is_random:
            raise InputError("cache_features needs training transforms without chance; leave out random ones")


@dataclass
class Samples:
    """A data set without its images.

    Attributes:
        labels: of readable samples, (N,) or (N, K), as are the paths.
        paths: N names.
        sizes: heights and widths that occur.
        digest: sha256 of all images, batch by batch.
    """

    labels: Tensor
    paths: list[str]
    sizes: set[tuple[int, int]]
    digest: str


def _read(batches: DataLoader) -> Samples:
    labels, paths, sizes, digest = [], [], set(), hashlib.sha256()
    for batch in batches:
        images, valid = batch["inputs"], batch["valid"]
        labels.append(batch["labels"][valid])
        paths += [p for p, usable in zip(batch["path"], valid) if usable]
        sizes.add(tuple(images.shape[-2:]))
        digest.update(f"{images.dtype} {tuple(images.shape)} {valid.tolist()}".encode())
        digest.update(images.contiguous().numpy())
    return Samples(torch.cat(labels), paths, sizes, digest.hexdigest())


@torch.no_grad()
def cached(
    task: Any, loader: DataLoader, folder: Path | None = None, start: Start | None = None
) -> FeatureDataset | None:
    """The loader's dataset with features in place of images, in the dataset's order.

    Args:
        task: whose backbone makes them.
        loader: of the images.
        folder: where features are kept; they stay in memory alone where None.
        start: takes the tokens that enter its block; pooled vectors where None.

    Returns:
        None where the tokens would take more than `LIMIT`, which is said.

    Raises:
        InputError: images of several sizes, of which a pass that starts at a block would know only one.
    """
    training = task.training
    task.eval()
    in_order = DataLoader(loader.dataset, loader.batch_size, num_workers=loader.num_workers, collate_fn=collate)
    samples, began = _read(in_order), time.perf_counter()
    if start is not None and len(samples.sizes) > 1:
        raise InputError(f"cache_features with adapters needs images of one size, not {sorted(samples.sizes)}")
    place = f"pool {task.pool}" if start is None else f"block {start.block}"
    path = None if folder is None else file_of(folder, task, place, samples.digest)
    features, how = None if path is None else load(path), "read"
    if features is None:
        features, how = _computed(task, in_order, start, len(samples.paths)), "computed"
        features = features if path is None or features is None else keep(path, features)
    task.train(training)
    if features is None:
        return None
    if path is not None:
        size, seconds = features.nbytes / 1e6, time.perf_counter() - began
        print(
            f"features of {len(features)} images ({place}, {size:.1f} MB) {how} in {seconds:.1f} s: {path}", flush=True
        )
    found = FeatureDataset(features, samples.labels, samples.paths, classes=loader.dataset.classes)
    found.source, found.size = loader.dataset, next(iter(samples.sizes))
    return found


def _computed(task: Any, batches: DataLoader, start: Start | None, count: int) -> Tensor | None:
    found = []
    for batch in batches:
        images = task.data_preprocessor(batch)["inputs"]
        features = (task.encode(images) if start is None else start.record(images)).float().cpu()
        if start is not None and (size := features[0].nbytes * count) > LIMIT:
            print(
                f"tokens of {count} images would take {size / 1e9:.1f} GB: the backbone runs whole for them", flush=True
            )
            return None
        found.append(features[batch["valid"]])
    return torch.cat(found)


def _reload(loader: DataLoader, dataset: FeatureDataset) -> DataLoader:
    """The same draws from another dataset; no worker processes, there is nothing left to decode."""
    old = loader.sampler
    sampler = EpochSampler(dataset, old.shuffle, old.seed, old.round_up, old.endless)
    return DataLoader(dataset, loader.batch_size, sampler=sampler, collate_fn=collate, drop_last=loader.drop_last)
