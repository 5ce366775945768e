"""Which query stands for which class of an image, and how well it does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.calibrate import mean_over_processes
from ...losses.segment import find_labelled

CLASS, MASK, DICE = 2.0, 5.0, 5.0  # of costs and losses alike
NO_OBJECT = 0.1  # weight of the class "none" against 1 of the others
OVERSAMPLE, IMPORTANT = 3, 0.75


class Target(NamedTuple):
    """What is to be found in an image: a mask for each class that occurs.

    Attributes:
        classes: (n,) int64.
        masks: (n, H, W) float32, 1 where the class is.
        labelled: (H, W) float32, 0 at ignored pixels and 1 elsewhere.
    """

    classes: Tensor
    masks: Tensor
    labelled: Tensor


def targets_of(labels: Tensor, num_classes: int) -> list[Target]:
    """Targets per image of a label map (B, H, W) int64, where 255 belongs to no class.

    Raises:
        InputError: a label that is neither a class nor 255, or no labelled pixel at all.
    """
    found = []
    for image, labelled in zip(labels, find_labelled(labels, num_classes)):
        classes = image[labelled].unique()
        found.append(Target(classes, (image == classes[:, None, None]).float(), labelled.float()))
    return found


def at_points(maps: Tensor, points: Tensor, beyond: str = "zeros") -> Tensor:
    """Bilinear values (N, C, P) of maps (N, C, H, W) at points (N, P, 2), x and y in [0, 1].

    Zeros around the maps, as in the authors' code, make values fade in the outer half of the border cells.
    """
    return F.grid_sample(maps, 2 * points[:, :, None] - 1, padding_mode=beyond, align_corners=False).squeeze(-1)


def weights_at(labelled: Tensor, points: Tensor) -> Tensor:
    """Weights (N, 1, P) of points (N, P, 2): the share of labelled pixels there, (N, 1, H, W) being 1 or 0."""
    return at_points(labelled, points, "border")


@torch.no_grad()
def match(logits: Tensor, masks: Tensor, target: Target, points: int) -> tuple[Tensor, Tensor]:
    """The cheapest way to give each target of an image a query of its own (Hungarian method).

    Args:
        logits: (Q, K + 1) of classes.
        masks: (Q, h, w) logits.
        target: of the image, with n classes.
        points: number of random points at which masks are compared.

    Returns:
        The min(Q, n) queries, ascending, and their targets, both int64.
    """
    from scipy.optimize import linear_sum_assignment

    where = torch.rand(1, points, 2, device=masks.device)
    inside, values = at_points(target.masks[None], where)[0], at_points(masks[None], where)[0]
    known = weights_at(target.labelled[None, None], where)[0]
    cost = -CLASS * logits.softmax(-1)[:, target.classes]
    outside, area = known - inside, known.sum().clamp(min=1)
    cost = cost + MASK * (F.softplus(-values) @ inside.mT + F.softplus(values) @ outside.mT) / area
    shares = values.sigmoid()
    overlap, total = shares @ inside.mT, (shares * known).sum(-1, keepdim=True) + inside.sum(-1)
    cost = cost + DICE * (1 - (2 * overlap + 1) / (total + 1))
    # what is no number is left to whoever looks at the loss, where it is one message and not an error of scipy's
    queries, targets = linear_sum_assignment(cost.nan_to_num().cpu().numpy())
    return torch.from_numpy(queries).to(masks.device), torch.from_numpy(targets).to(masks.device)


@torch.no_grad()
def important_points(masks: Tensor, labelled: Tensor, count: int) -> Tensor:
    """Points of which three quarters are where a mask is least certain; ignored pixels come last (PointRend).

    Args:
        masks: (N, 1, h, w) logits.
        labelled: (N, 1, H, W), 0 at ignored pixels.
        count: P.

    Returns:
        (N, P, 2), x and y in [0, 1].
    """
    candidates = torch.rand(len(masks), OVERSAMPLE * count, 2, device=masks.device)
    doubt = -at_points(masks, candidates)[:, 0].abs()
    # nothing teaches the masks there, so that they stay uncertain and would draw most of the points
    doubt.masked_fill_(weights_at(labelled, candidates)[:, 0] < 0.5, -torch.inf)
    best = doubt.topk(int(IMPORTANT * count), 1).indices
    chosen = candidates.gather(1, best[..., None].expand(-1, -1, 2))
    return torch.cat([chosen, torch.rand(len(masks), count - best.shape[1], 2, device=masks.device)], 1)


def mask_losses(masks: Tensor, wanted: Tensor, labelled: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Binary cross entropy and dice loss per pair of masks.

    Args:
        masks: (N, 1, h, w) logits.
        wanted: (N, 1, H, W), 0 or 1.
        labelled: (N, 1, H, W), 0 at ignored pixels and 1 elsewhere.
        points: number of points that the losses are taken at.

    Returns:
        Two tensors (N,).
    """
    where = important_points(masks, labelled, points)
    values, inside = at_points(masks, where)[:, 0], at_points(wanted, where)[:, 0]
    known = weights_at(labelled, where)[:, 0]
    entropy = inside * F.softplus(-values) + (known - inside) * F.softplus(values)
    shares = values.sigmoid()
    overlap, total = (shares * inside).sum(-1), (shares * known).sum(-1) + inside.sum(-1)
    return entropy.sum(-1) / known.sum(-1).clamp(min=1), 1 - (2 * overlap + 1) / (total + 1)


def class_loss(logits: Tensor, targets: Sequence[Target], pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Weighted mean cross entropy of logits (B, Q, K + 1), K being the class of queries that have no target.

    Images without a labelled pixel are left out: what is in them is unknown.
    """
    none, unknown = logits.shape[-1] - 1, -100
    labels = logits.new_full(logits.shape[:2], none, dtype=torch.int64)
    for row, target, (queries, chosen) in zip(labels, targets, pairs):
        row[queries] = target.classes[chosen]
        if not len(target.classes):
            row.fill_(unknown)
    weights = torch.ones_like(logits[0, 0])
    weights[none] = NO_OBJECT
    summed = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weights, ignore_index=unknown, reduction="sum")
    return summed / weights[labels[labels != unknown]].sum()


def set_losses(outputs: Sequence[tuple[Tensor, Tensor]], labels: Tensor, points: int) -> dict[str, Tensor]:
    """Losses of all outputs, summed: "loss_cls", "loss_mask" and "loss_dice".

    Args:
        outputs: (B, Q, K + 1) class logits and (B, Q, h, w) mask logits, per layer.
        labels: (B, H, W) int64, 255 being ignored.
        points: number of points per mask.

    Raises:
        InputError: a label that is neither a class nor 255, or no labelled pixel in the batch.
    """
    targets = targets_of(labels, outputs[0][0].shape[-1] - 1)
    labelled = [t.labelled.expand_as(t.masks) for t in targets]
    count = outputs[0][0].new_tensor(float(sum(len(t.classes) for t in targets)), dtype=torch.float32)
    count = mean_over_processes(count)
    sums = dict.fromkeys(("loss_cls", "loss_mask", "loss_dice"), 0.0)
    for logits, masks in outputs:
        logits, masks = logits.float(), masks.float()
        pairs = [match(*image, points) for image in zip(logits, masks, targets)]
        queries, found = zip(*pairs)
        wanted, known = picked([t.masks for t in targets], found), picked(labelled, found)
        entropy, dice = mask_losses(picked(masks, queries), wanted, known, points)
        sums["loss_cls"] = sums["loss_cls"] + CLASS * class_loss(logits, targets, pairs)
        sums["loss_mask"] = sums["loss_mask"] + MASK * entropy.sum() / count
        sums["loss_dice"] = sums["loss_dice"] + DICE * dice.sum() / count
    return sums


def picked(masks: Iterable[Tensor], rows: Iterable[Tensor]) -> Tensor:
    """The named rows of the masks (n, h, w) of each image, one image behind the other: (N, 1, h, w)."""
    return torch.cat([of[these] for of, these in zip(masks, rows)])[:, None]
