"""Do the parts of a config fit each other? What is found here would else be found in the middle of a run, or never."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from torch.utils.data import DataLoader

from .errors import InputError, hint
from .hooks.files import AdapterFiles
from .hooks.steps import EarlyStop
from .ignored import IGNORED

LOOKED_AT = 8
"""Samples of a batch that are read."""


def check_data(task: Any, dataset: Any, where: str) -> None:
    """Refuse a data set with other classes than the heads have, other bands than the backbone takes, or other clips.

    A training set may name fewer classes: a list file makes its classes from what occurs in it.

    Raises:
        InputError: the numbers differ.
    """
    classes, channels = getattr(dataset, "classes", ()), getattr(dataset, "channels", None)
    for head in task.heads.values():
        count = getattr(head, "num_classes", None)
        if not classes or count is None:
            continue
        if len(classes) > count or (len(classes) < count and where != "train_dataloader"):
            raise InputError(f"{where}: the data set has {len(classes)} classes, the head has {count}; set num_classes")
    taken = task.adapted.backbone.in_chans
    if channels not in (None, taken):
        raise InputError(
            f"{where}: images have {channels} bands, the backbone takes {taken}; set in_chans of the backbone, or "
            "choose other bands"
        )
    frames, seen = getattr(dataset, "num_frames", None), getattr(task, "num_frames", None)
    if None not in (frames, seen) and frames != seen:
        raise InputError(
            f"{where}: the data set gives clips of {frames} frames, the model takes {seen}; give both one num_frames"
        )


def names_of(dataset: Any) -> dict[str, Sequence[str]]:
    """Names of a data set's classes and bands, under the keys of an adapter file; empty where it has none."""
    described = getattr(dataset, "source", dataset)
    return {key: tuple(getattr(described, key, None) or ()) for key in ("classes", "bands")}


def check_names(
    found: Mapping[str, Any], where: str, wanted: Mapping[str, Any], place: str, fewer_classes: bool = False
) -> None:
    """Refuse classes or bands that mean something else in two places: names count by their order.

    What has no names in one of the places is not compared.

    Args:
        found: "classes" and "bands" of `where`, see `names_of`.
        where: what they belong to, for the message.
        wanted: likewise, of `place`.
        place: what those belong to.
        fewer_classes: the last classes may be missing in `where`.

    Raises:
        InputError: with the first difference; or names are no names.
    """
    for noun, key in (("class", "classes"), ("band", "bands")):
        these, those = found.get(key) or (), wanted.get(key) or ()
        for names, owner in ((these, where), (those, place)):
            if not isinstance(names, list | tuple):  # a file comes from anywhere
                raise InputError(f"{owner} is damaged: its {key} are no list of names")
        if not these or not those:
            continue
        advice = f"both need the same {key} in the same order"
        for number, (this, that) in enumerate(zip(these, those)):
            if this != that:
                raise InputError(f"{where}: {noun} {number} is '{this}', in {place} it is '{that}'; {advice}")
        if len(these) > len(those) or (len(these) < len(those) and not (fewer_classes and key == "classes")):
            raise InputError(f"{where}: there are {len(these)} {key}, in {place} {len(those)}; {advice}")


def check_monitors(hooks: Iterable[Hook], evaluator: Evaluator) -> None:
    """Refuse hooks that wait for a figure that no metric gives; metrics without `figures` may give any.

    Raises:
        InputError: with the figures that there are.
    """
    known = [getattr(metric, "figures", None) for metric in evaluator.metrics]
    if None in known:
        return
    names = ["/".join(filter(None, (m.prefix, name))) for m, row in zip(evaluator.metrics, known) for name in row]
    for hook in hooks:
        if isinstance(hook, AdapterFiles | EarlyStop) and hook.monitor not in names:
            raise InputError(f"{type(hook).__name__}: no metric '{hook.monitor}'{hint(hook.monitor, names)}")


def doubts(task: Any) -> list[str]:
    """Warnings: random weights of the backbone, adapters that are made for clips of another length."""
    found = []
    if getattr(task.adapted.backbone, "weights", "") is None:
        found.append(
            "the backbone has random weights, which no other process can make again: the adapter file will not load; "
            "name weights=... of the backbone"
        )
    seen = getattr(task, "num_frames", None)
    for name, adapter in task.adapted.adapters.items():
        if None not in (seen, frames := getattr(adapter, "num_frames", None)) and frames != seen:
            found.append(f"adapter '{name}' has frame embeddings for {frames} frames, resampled to the model's {seen}")
    return found


@torch.no_grad()
def try_samples(task: Any, loader: DataLoader, where: str, mode: str) -> tuple[dict[str, Any], Any]:
    """Read samples of a loader's first and last batch and collate them; take two of the first through the task.

    Masks without a labelled pixel are passed over, as two of them have no loss where a whole batch would have one.

    Args:
        task: it is in training mode afterwards where the mode is "loss", else in eval mode.
        loader: of batches.
        where: its name, for messages.
        mode: "loss" or "predict".

    Returns:
        The two samples as a batch, and what the task says of it; None for the latter where no sample has a label.

    Raises:
        InputError: what data set, transforms, collate function and task refuse.
    """
    task.train(mode == "loss")
    try:
        batches = list(islice(loader.batch_sampler, len(loader)))
        if not batches:
            raise InputError(f"{len(loader.dataset)} samples fill no batch; lower batch_size or leave out drop_last")
        for asked in (batches[-1], batches[0]):
            samples = [loader.dataset[i] for i in asked[:: -(-len(asked) // LOOKED_AT)]]
            loader.collate_fn(samples)
        labelled = [s for s in samples if "mask" not in s or (s["mask"] != IGNORED).any()]
        batch = loader.collate_fn((labelled or samples)[:2])
        return batch, task(**task.data_preprocessor(batch), mode=mode) if labelled else None
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
