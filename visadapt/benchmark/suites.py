"""Collections of tasks and the protocol under which all methods meet on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..backbones.weights import FOCUS
from ..datasets import vtab
from ..errors import InputError, hint

Data = dict[str, Any]

SPLITS = ("train", "val", "trainval", "test")
"""Hyperparameters are chosen on train and val; the final model is trained on both and measured on test."""


@dataclass(frozen=True)
class BenchTask:
    """What is learnt.

    Attributes:
        name: as on the command line.
        group: of tasks whose means are reported.
        classes: their number.
        data: config of the data set of each of SPLITS, without transforms.
        pixels: every pixel has a class; else every image has.
        channels: bands of the images.
        tile: side of the windows that images with masks are cut into, in pixels.
    """

    name: str
    group: str
    classes: int
    data: dict[str, Data]
    pixels: bool = False
    channels: int = 3
    tile: int = 0


@dataclass(frozen=True)
class Protocol:
    """How every method of a suite is trained and tested.

    Attributes:
        model: timm name of the backbone.
        weights: of the backbone, see TimmViT.
        size: side of the images in pixels.
        epochs: of training.
        batch: images per training step; the rest of an epoch that fills no batch is left out.
        test_batch: images per step of the test.
    """

    model: str
    weights: str | None
    size: int
    epochs: int
    batch: int
    test_batch: int = 50


@dataclass(frozen=True)
class Suite:
    """Tasks with one protocol.

    Attributes:
        name: of the command and of the file with results.
        protocol: what is published, or what is ours.
        tasks: by name.
        about: where to read how the data are prepared.
    """

    name: str
    protocol: Protocol
    tasks: dict[str, BenchTask]
    about: str = "data/README.md"

    def chosen(self, names: Sequence[str]) -> list[BenchTask]:
        """Tasks by name, all of them where there are no names.

        Raises:
            InputError: an unknown name.
        """
        for name in names:
            if name not in self.tasks:
                raise InputError(f"{self.name} has no task '{name}'{hint(name, self.tasks)}")
        return [self.tasks[n] for n in dict.fromkeys(names or self.tasks)]

    def under(self, **changes: Any) -> Suite:
        """The same tasks under a protocol with other values; those that are None stay."""
        given = {key: value for key, value in changes.items() if value is not None}
        return replace(self, protocol=replace(self.protocol, **given))


def _splits(kind: str, names: Sequence[str] = SPLITS, **arguments: Any) -> dict[str, Data]:
    """One data set whose splits may have names of their own."""
    return {ours: {"type": kind, **arguments, "split": theirs} for ours, theirs in zip(SPLITS, names, strict=True)}


VTAB_SPLITS = ("train800", "val200", "train800val200", "test")


def _vtab() -> Suite:
    groups = {"natural": vtab.NATURAL, "specialized": vtab.SPECIALIZED, "structured": vtab.STRUCTURED}
    tasks = {
        name: BenchTask(name, group, classes, _splits("VTABDataset", VTAB_SPLITS, task=name))
        for group, found in groups.items()
        for name, classes in found.items()
    }
    protocol = Protocol("vit_base_patch16_224.augreg_in21k", None, 224, 100, 64, test_batch=256)
    return Suite("vtab", protocol, tasks, "data/vtab/README.md")


def _offline() -> Suite:
    eurosat = {
        split: {"type": "EuroSAT", "split": "train", "list_file": f"data/lists/eurosat_{name}.txt"}
        for split, name in zip(SPLITS, VTAB_SPLITS[:3])
    } | {"test": {"type": "EuroSAT", "split": "test"}}
    tasks = [
        BenchTask("eurosat", "remote sensing", 10, eurosat),
        BenchTask("tiny-imagenet", "natural", 50, _splits("TinyImageNet", VTAB_SPLITS)),
        BenchTask("omniglot", "characters", 136, _splits("Omniglot", VTAB_SPLITS)),
    ]
    protocol = Protocol("vit_small_patch14_dinov2", FOCUS, 56, 8, 32)
    return Suite("offline", protocol, {t.name: t for t in tasks})


SUITES: dict[str, Callable[[], Suite]] = {"offline": _offline, "vtab": _vtab}


def suite(name: str, **changes: Any) -> Suite:
    """A suite under its protocol, or one that is changed, see `Suite.under`."""
    return SUITES[name]().under(**changes)
