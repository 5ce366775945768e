"""Losses on pixels, against their definitions, torch and torchvision."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, interpolate, one_hot
from torchvision.ops import sigmoid_focal_loss

from visadapt.errors import InputError
from visadapt.losses.segment import Combined, Dice, PixelCrossEntropy, PixelFocal
from visadapt.registry import LOSSES

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(3, 4, 6, 5, generator=GENERATOR)
MASKS = torch.randint(0, 4, (3, 6, 5), generator=GENERATOR)
MASKS[0, :2] = MASKS[2, 3, 3] = 255
MASKS[1] = MASKS[1].clamp(max=2)  # no class 3
LABELLED = MASKS != 255
PIXELS, TARGET = LOGITS.movedim(1, -1)[LABELLED], MASKS[LABELLED]
WEIGHTS = [1.0, 2.0, 0.5, 3.0]
COMBINED = dict(losses=[dict(type="PixelFocal"), dict(type="Dice")], weights=[0.2, 0.8])
ALL_LOSSES = [PixelCrossEntropy(WEIGHTS, 0.1), PixelFocal(0.5, WEIGHTS), Dice(), Dice([1, 3]), Combined(**COMBINED)]


def test_losses_equal_their_definitions_over_the_labelled_pixels():
    p, weights = PIXELS.softmax(1), torch.tensor(WEIGHTS)
    of_pixel, w = p[range(len(TARGET)), TARGET], weights[TARGET]
    assert torch.isclose(PixelCrossEntropy()(LOGITS, MASKS), -of_pixel.log().mean())
    assert torch.isclose(PixelCrossEntropy(WEIGHTS)(LOGITS, MASKS), -(w * of_pixel.log()).sum() / w.sum())
    smooth = 0.8 * one_hot(TARGET, 4) + 0.2 / 4
    assert torch.isclose(PixelCrossEntropy(label_smoothing=0.2)(LOGITS, MASKS), -(smooth * p.log()).sum(1).mean())
    focal = -(w * (1 - of_pixel) ** 1.5 * of_pixel.log()).mean()
    assert torch.isclose(PixelFocal(1.5, WEIGHTS)(LOGITS, MASKS), focal)
    assert torch.isclose(PixelFocal(0.0)(LOGITS, MASKS), cross_entropy(PIXELS, TARGET))


def dice_by_hand(classes):
    terms = []
    for logits, mask in zip(LOGITS, MASKS):
        p = logits.softmax(0)[:, mask != 255]
        for k in classes:
            t = (mask[mask != 255] == k).float()
            if t.any():
                terms.append(1 - 2 * (p[k] * t).sum() / (p[k].sum() + t.sum()))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("classes", [None, [1], [3, 0]])
def test_dice_is_the_mean_over_the_classes_that_an_image_has(classes):
    assert torch.isclose(Dice(classes)(LOGITS, MASKS), dice_by_hand(classes or range(4)))


def test_dice_of_perfect_and_of_opposite_scores():
    sure = 50 * one_hot(MASKS.where(LABELLED, 0), 4).movedim(-1, 1).float()
    assert Dice()(sure, MASKS) == pytest.approx(0, abs=1e-6)
    assert Dice()(-sure, MASKS) == pytest.approx(1, abs=1e-6)


def test_dice_of_a_foreground_that_no_image_has_is_zero_and_trains_nothing():
    logits = LOGITS.clone().requires_grad_()
    value = Dice([3])(logits, MASKS.where(MASKS != 3, 0))
    (grad,) = torch.autograd.grad(value, logits)
    assert value == 0 and not grad.any()


def test_two_classes_equal_the_sigmoid_losses_of_mapsam():
    """Focal of alpha 0.25 and dice of the sigmoid, here on the difference of two logits."""
    logits, masks = LOGITS[:, :2], MASKS % 2
    masks[:, 0] = 1  # every image has a foreground
    difference, target = logits[:, 1] - logits[:, 0], masks.float()
    focal = sigmoid_focal_loss(difference, target, alpha=0.25, gamma=2.0, reduction="mean")
    assert torch.isclose(PixelFocal(2.0, [0.75, 0.25])(logits, masks), focal)
    p = difference.sigmoid()
    overlap, total = (p * target).sum((1, 2)), (p + target).sum((1, 2))
    dice = (1 - (2 * overlap + 1e-6) / (total + 1e-6)).mean()
    assert torch.isclose(Dice([1])(logits, masks), dice)
    parts = [dict(type="PixelFocal", alpha=[0.75, 0.25]), dict(type="Dice", classes=[1])]
    assert torch.isclose(Combined(parts, [0.2, 0.8])(logits, masks), 0.2 * focal + 0.8 * dice)


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_scores_are_resized_to_the_masks(loss):
    small = LOGITS[..., ::2, :3]
    large = interpolate(small, (6, 5), mode="bilinear", align_corners=False)
    assert torch.equal(loss(small, MASKS), loss(large, MASKS))
    assert not torch.isclose(loss(small, MASKS), loss(interpolate(small, (6, 5)), MASKS), rtol=1e-3)


@pytest.mark.parametrize("loss", ALL_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ignored_pixels_have_no_part_and_sure_scores_stay_finite(loss, dtype):
    logits = (LOGITS * 30).to(dtype).requires_grad_()  # so sure that 1 - p rounds to zero
    value = loss(logits, MASKS)
    assert value.shape == () and value.dtype == torch.float32 and torch.isfinite(value)
    (grad,) = torch.autograd.grad(value, logits)
    assert torch.isfinite(grad).all() and grad.any() and not grad.movedim(1, -1)[~LABELLED].any()
    other = logits.detach().movedim(1, -1).clone()
    other[~LABELLED] = 7.0
    assert torch.equal(loss(other.movedim(-1, 1), MASKS), value)


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_masks_that_cannot_be_learned_from_are_named(loss):
    with pytest.raises(InputError, match=r"no pixel of a batch of 3 masks is labelled \(all are 255\).*leave out"):
        loss(LOGITS, torch.full_like(MASKS, 255))
    for bad in (4, -1, 254):
        masks = MASKS.clone()
        masks[1, 2, 3] = bad
        with pytest.raises(InputError, match=f"a mask holds {bad}, the head has the classes 0 to 3"):
            loss(LOGITS, masks)
    for shapes in ((LOGITS[0], MASKS), (LOGITS, MASKS[:2]), (LOGITS, MASKS[..., 0])):
        with pytest.raises(InputError, match=rf"{type(loss).__name__} takes logits \(B, K, h, w\)"):
            loss(*shapes)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(type="PixelCrossEntropy", label_smoothing=1.0), "label_smoothing must be in"),
        (dict(type="PixelCrossEntropy", class_weights=[]), "class_weights is one weight above 0"),
        (dict(type="PixelCrossEntropy", class_weights=[1.0, 0.0]), "class_weights is one weight above 0"),
        (dict(type="PixelFocal", gamma=-1.0), "gamma must be 0 or more"),
        (dict(type="PixelFocal", gamma=math.nan), "gamma must be 0 or more"),
        (dict(type="PixelFocal", alpha=[-1.0]), "alpha is one weight above 0"),
        (dict(type="Dice", classes=[]), "classes are indices"),
        (dict(type="Dice", classes=[1, 1]), "classes are indices"),
        (dict(type="Combined", losses=[], weights=[]), "each loss needs one weight"),
        (dict(type="Combined", losses=[dict(type="Dice")], weights=[1.0, 2.0]), "each loss needs one weight"),
        (dict(type="Combined", losses=[dict(type="Dice")], weights=[0.0]), "each loss needs one weight"),
        (dict(type="Combined", losses=[dict(type="FocalLoss")], weights=[1.0]), "FocalLoss is no loss on pixels"),
    ],
)
def test_loss_mistakes(cfg, message):
    with pytest.raises(InputError, match=f"{cfg['type']}: {message}"):
        LOSSES.build(cfg)


def test_weights_and_classes_must_fit_the_scores():
    with pytest.raises(InputError, match="class_weights has 2 weights for 4 classes"):
        PixelCrossEntropy([1, 2])(LOGITS, MASKS)
    with pytest.raises(InputError, match="alpha has 2 weights for 4 classes"):
        PixelFocal(alpha=[1, 2])(LOGITS, MASKS)
    with pytest.raises(InputError, match="Dice: there is no class 4, the scores have 4"):
        Dice([4])(LOGITS, MASKS)
