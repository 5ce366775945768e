"""Features of a wholly frozen backbone, computed once."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import Hook
from torch.utils.data import DataLoader

from ..checkpoint import unwrap
from ..datasets.base import collate
from ..datasets.cached import FeatureDataset
from ..datasets.sampler import EpochSampler
from ..errors import InputError


class CacheFeatures(Hook):
    """Replace the images of both loaders by their pooled vectors before training.

    Only for a head on a backbone without enabled adapter pieces, and transforms without chance.
    """

    priority = "HIGHEST"

    def before_train(self, runner) -> None:
        task = unwrap(runner.model)
        self.check(task, runner.train_loop.dataloader.dataset)
        loops = [runner.train_loop, *([runner.val_loop] if runner.val_loop is not None else [])]
        for loop in loops:
            dataset = cached(task, loop.dataloader)
            loop.dataloader = _reload(loop.dataloader, dataset)
            if hasattr(loop, "dataloader_iterator"):
                loop.dataloader_iterator = type(loop.dataloader_iterator)(loop.dataloader)

    @staticmethod
    def check(task: Any, dataset: Any) -> None:
        """Refuse what cannot be computed once.

        Raises:
            InputError: with the reason.
        """
        if task.adapted.pieces() or any(p.requires_grad for p in task.adapted.parameters()):
            names = ", ".join(task.adapted.adapters)
            raise InputError(f"cache_features needs a wholly frozen backbone; the adapters {names} change its features")
        if task.adapted.base_mode == "train":
            raise InputError("cache_features needs base_mode='eval': the backbone draws anew in every training step")
        if task.mix is not None:
            raise InputError("cache_features and mix exclude each other: mixed images have features of their own")
        transform = getattr(dataset, "transform", None)
        if hasattr(dataset, "num_frames"):
            raise InputError("cache_features is for images, not for clips; leave it out")
        if transform is not None and transform.is_random:
            raise InputError("cache_features needs training transforms without chance; leave out random ones")


@torch.no_grad()
def cached(task: Any, loader: DataLoader) -> FeatureDataset:
    """The loader's dataset with pooled vectors in place of images, in the dataset's order."""
    training = task.training
    task.eval()
    in_order = DataLoader(loader.dataset, loader.batch_size, num_workers=loader.num_workers, collate_fn=collate)
    features, labels, paths = [], [], []
    for batch in in_order:
        data = task.data_preprocessor(batch)
        features.append(task.encode(data["inputs"]).float().cpu()[batch["valid"]])
        labels.append(batch["labels"][batch["valid"]])
        paths += [p for p, valid in zip(batch["path"], batch["valid"]) if valid]
    task.train(training)
    found = FeatureDataset(torch.cat(features), torch.cat(labels), paths, classes=loader.dataset.classes)
    found.source = loader.dataset  # for pictures
    return found


def _reload(loader: DataLoader, dataset: FeatureDataset) -> DataLoader:
    """The same draws from another dataset; no worker processes, there is nothing left to decode."""
    old = loader.sampler
    sampler = EpochSampler(dataset, old.shuffle, old.seed, old.round_up, old.endless)
    return DataLoader(dataset, loader.batch_size, sampler=sampler, collate_fn=collate, drop_last=loader.drop_last)
