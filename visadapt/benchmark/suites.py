"""Collections of tasks and the protocol under which all methods meet on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..backbones.weights import FOCUS
from ..datasets import few_shot, fgvc, vtab
from ..errors import InputError, hint

Data = dict[str, Any]

SPLITS = ("train", "val", "trainval", "test")
"""Hyperparameters are chosen on train and val; the final model is trained on both and measured on test."""

Seen = Literal["whole", "cropped", "zoomed"]
"""How images are brought to the protocol's size: resized as they are, in training and testing; a random crop of the
image with its shorter side resized to 8/7 of the size, flipped at random; or a random part of 8 % to all of the image,
flipped at random. Both are tested on the square in the middle."""


@dataclass(frozen=True)
class BenchTask:
    """What is learnt.

    Attributes:
        name: as on the command line.
        group: of tasks whose means are reported.
        classes: their number.
        data: config of the data set of each of SPLITS, without transforms.
        pixels: every pixel has a class; else every image has.
        channels: bands of the images; of others than 3 the backbone gets mean and deviation from the images it is
            trained on.
        tile: side of the windows that images with masks are cut into, in pixels. They are resized to the protocol's
            size, masks of test images are not.
        own: values of the protocol that are others for this task.
        seeded: argument of the data sets that takes the seed of the run, where it decides which images are trained on.
    """

    name: str
    group: str
    classes: int
    data: dict[str, Data]
    pixels: bool = False
    channels: int = 3
    tile: int = 0
    own: Mapping[str, Any] = field(default_factory=dict)
    seeded: str | None = None


@dataclass(frozen=True)
class Protocol:
    """How every method of a suite is trained and tested.

    Attributes:
        model: timm name of the backbone, which normalises images by its own mean and deviation.
        weights: of the backbone, see TimmViT.
        size: side of the images in pixels.
        epochs: of training.
        batch: images per training step; the rest of an epoch that fills no batch is left out.
        test_batch: images per step of the test.
        seen: how images with labels are brought to `size`.
    """

    model: str
    weights: str | None
    size: int
    epochs: int
    batch: int
    test_batch: int = 50
    seen: Seen = "whole"


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

    def protocol_of(self, task: BenchTask) -> Protocol:
        """The protocol with the task's own values."""
        return replace(self.protocol, **task.own)

    def under(self, **changes: Any) -> Suite:
        """The same tasks under a protocol with other values, which hold for all of them; those that are None stay.

        Raises:
            InputError: another batch for tasks whose epochs are counted in steps of their own.
        """
        given = {key: value for key, value in changes.items() if value is not None}
        if "batch" in given and any({"batch", "epochs"} <= task.own.keys() for task in self.tasks.values()):
            raise InputError(f"{self.name} takes no other batch: the epochs of its tasks fit theirs; leave --batch out")
        tasks = {
            name: replace(task, own={key: value for key, value in task.own.items() if key not in given})
            for name, task in self.tasks.items()
        }
        return replace(self, protocol=replace(self.protocol, **given), tasks=tasks)


def _splits(kind: str, names: Sequence[str] = SPLITS, **arguments: Any) -> dict[str, Data]:
    """One data set whose splits may have names of their own."""
    return {ours: {"type": kind, **arguments, "split": theirs} for ours, theirs in zip(SPLITS, names, strict=True)}


IN21K = "vit_base_patch16_224.augreg_in21k"


def _named(tasks: Sequence[BenchTask]) -> dict[str, BenchTask]:
    return {task.name: task for task in tasks}


def _vtab() -> Suite:
    """VTAB-1k (Zhai et al. 2019) as NOAH, SSF and FacT have it; test images per step are theirs too.

    `bench vtab` normalises by the mean and deviation of the weights, 0.5 and 0.5 for augreg_in21k. Published figures
    are from images that were normalised by ImageNet's, or not at all.
    """
    groups = {"natural": vtab.NATURAL, "specialized": vtab.SPECIALIZED, "structured": vtab.STRUCTURED}
    tasks = [
        BenchTask(name, group, classes, _splits("VTABDataset", vtab.SPLITS, task=name))
        for group, found in groups.items()
        for name, classes in found.items()
    ]
    protocol = Protocol(IN21K, "timm", 224, 100, 64, test_batch=256)
    return Suite("vtab", protocol, _named(tasks), "data/vtab/README.md")


def _fgvc() -> Suite:
    """The five fine-grained sets as MoSA trains on them: 100 epochs, batches of 128, crops of 224 out of 256 pixels.

    SNELL has batches of 32 and random parts of images in place of crops. Ours are the test batch, the normalisation by
    the weights' own mean and deviation, and what all suites share: the cosine without a warm-up, a method's rate on all
    sets, the last epoch's value.
    """
    tasks = [
        BenchTask(name, "fine-grained", known.classes, _splits("FGVC", task=name)) for name, known in fgvc.TASKS.items()
    ]
    protocol = Protocol(IN21K, "timm", 224, 100, 128, test_batch=256, seen="cropped")
    return Suite("fgvc", protocol, _named(tasks))


SHOTS, SHOT_STEPS = (1, 2, 4, 8, 16), 500
"""Training images of a class, and steps of training for each of them."""


def _fewshot() -> Suite:
    """The few-shot protocol of CoOp (Zhou et al. 2022), trained as CLIP-LoRA, as far as an image tower can follow.

    CLIP's ViT-B/16; batches of 32 and 500 steps times the number of shots, counted in epochs; random parts of images,
    flipped at random; all test images. Published figures are means over `--seeds 1 2 3`, which draw the shots. Ours: a
    linear head on the class token in the place of class names, the test batch, the middle square as CLIP itself sees
    it, and the part of an epoch that fills no batch, which is left out. A method's recipe replaces the published
    learning rate of 2e-4, weight decay of 1e-2, rank and dropout, and the cosine ends at 0, not at their floor.
    Hyperparameters are chosen on min(shots, 4) further images of each class, which the final model is not trained on.
    """
    protocol = Protocol("vit_base_patch16_clip_quickgelu_224.openai", "timm", 224, 0, 32, test_batch=256, seen="zoomed")
    tasks = [
        _few(name, classes, arguments, shots, protocol.batch)
        for shots in SHOTS
        for name, (classes, arguments) in few_shot.TASKS.items()
    ]
    return Suite("fewshot", protocol, _named(tasks))


def _few(name: str, classes: int, arguments: dict[str, str], shots: int, batch: int) -> BenchTask:
    """A set with so many shots, trained for whole epochs of the steps that are due; small sets are one batch."""
    batch = min(batch, shots * classes)
    own = {"epochs": round(SHOT_STEPS * shots / (shots * classes // batch)), "batch": batch}
    data = _splits("FewShot", ("train", "val", "train", "test"), shots=shots, **arguments)
    return BenchTask(f"{name}-{shots}shot", f"{shots}-shot", classes, data, own=own, seeded="draw")


def _offline() -> Suite:
    """Real data that are small or come with a library, in few minutes per run; all numbers are ours.

    Images with masks are cut into windows and seen once at 112 pixels, in 70 to 90 steps. Vessels, which are thinner
    than a patch, are enlarged for it, those of both sets of retinas to about one width; pixels of Samson, which is a
    small scene, by 7.
    """
    eurosat = {
        split: {"type": "EuroSAT", "split": "train", "list_file": f"data/lists/eurosat_{name}.txt"}
        for split, name in zip(SPLITS, vtab.SPLITS[:3])
    } | {"test": {"type": "EuroSAT", "split": "test"}}
    dubai = _splits("DubaiAerial", ("train4", "val", "train", "test"))
    tasks = [
        BenchTask("eurosat", "remote sensing", 10, eurosat),
        BenchTask("tiny-imagenet", "natural", 50, _splits("TinyImageNet", vtab.SPLITS)),
        BenchTask("omniglot", "characters", 136, _splits("Omniglot", vtab.SPLITS)),
        BenchTask("digits", "characters", 10, _splits("Digits", vtab.SPLITS)),
        _masks("retina-drive", "retina", 2, _splits("DRIVE"), tile=56),
        _masks("retina-chase", "retina", 2, _splits("CHASEDB1"), tile=96),
        _masks("dubai", "remote sensing", 5, dubai, tile=112),
        BenchTask("samson", "remote sensing", 3, _splits("Samson"), True, channels=156, tile=8, own={"batch": 8}),
    ]
    protocol = Protocol("vit_small_patch14_dinov2", FOCUS, 56, 8, 32)
    return Suite("offline", protocol, _named(tasks))


def _masks(name: str, group: str, classes: int, data: dict[str, Data], tile: int) -> BenchTask:
    """A task of images that are large, for one epoch over their windows."""
    return BenchTask(name, group, classes, data, pixels=True, tile=tile, own={"size": 112, "epochs": 1})


SUITES: dict[str, Callable[[], Suite]] = {"offline": _offline, "vtab": _vtab, "fgvc": _fgvc, "fewshot": _fewshot}


def suite(name: str, **changes: Any) -> Suite:
    """A suite under its protocol, or one that is changed, see `Suite.under`."""
    return SUITES[name]().under(**changes)
