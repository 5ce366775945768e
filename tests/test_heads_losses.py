"""Heads and classification losses."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from visadapt.errors import InputError
from visadapt.heads.linear import CosineHead, LinearHead, MLPHead
from visadapt.losses.classify import BCE, CrossEntropy, FocalLoss
from visadapt.registry import HEADS, LOSSES

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * 3
TARGET = torch.tensor([0, 1, 2, 3, 1, 0])
SHARES = one_hot(TARGET, 4).float()
SOFT = torch.softmax(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), 1)
ALL_LOSSES = [CrossEntropy(), CrossEntropy(0.1), FocalLoss(), FocalLoss(0.5, [1, 2, 3, 4]), BCE(), BCE(0.1)]


@pytest.mark.parametrize("cfg", [dict(type="LinearHead"), dict(type="MLPHead", hidden=7), dict(type="CosineHead")])
def test_heads_are_built_with_the_width_of_the_features(cfg):
    head = HEADS.build(dict(cfg, num_classes=3), in_dim=5)
    logits = head(torch.randn(2, 5))
    assert logits.shape == (2, 3) and head.num_classes == 3
    (logits * torch.randn(2, 3)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


def test_linear_heads_start_undecided_and_drop_in_training_only():
    for head in (LinearHead(10, 64, dropout=0.5), MLPHead(10, 64, dropout=0.5)):
        x = torch.randn(4, 64)
        head.eval()
        assert torch.equal(head(x), head(x)) and head(x).abs().max() < 1
        head.train()
        assert not torch.equal(head(x), head(x))


def test_cosine_head_sees_directions_only():
    head = CosineHead(3, 5, scale=4.0)
    x = torch.randn(2, 5)
    assert torch.allclose(head(x), head(10 * x), atol=1e-5)
    with torch.no_grad():
        head.weight[1] = 7 * x[0]
    assert torch.isclose(head(x)[0, 1], torch.tensor(4.0), atol=1e-5)
    assert head.log_scale.requires_grad
    fixed = CosineHead(3, 5, learn_scale=False)
    assert [n for n, _ in fixed.named_parameters()] == ["weight"] and "log_scale" in fixed.state_dict()


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(type="LinearHead", num_classes=0), "LinearHead: num_classes must be 1 or more, got 0"),
        (dict(type="LinearHead", num_classes=2, dropout=1.0), r"dropout must be in \[0, 1\)"),
        (dict(type="MLPHead", num_classes=2, hidden=-1), "MLPHead: hidden"),
        (dict(type="CosineHead", num_classes=2, scale=0), "scale must be above 0"),
        (dict(type="LinearHaed", num_classes=2), "did you mean 'LinearHead'"),
    ],
)
def test_head_mistakes(cfg, message):
    with pytest.raises(InputError, match=message):
        HEADS.build(cfg, in_dim=4)


def test_losses_equal_their_definitions():
    p = torch.softmax(LOGITS, 1)
    assert torch.isclose(CrossEntropy()(LOGITS, TARGET), cross_entropy(LOGITS, TARGET))
    smooth = 0.8 * SHARES + 0.2 / 4
    assert torch.isclose(CrossEntropy(0.2)(LOGITS, TARGET), -(smooth * p.log()).sum(1).mean())
    alpha = torch.tensor([1.0, 2.0, 0.5, 3.0])
    focal = -(SOFT * alpha * (1 - p) ** 1.5 * p.log()).sum(1).mean()
    assert torch.isclose(FocalLoss(1.5, alpha.tolist())(LOGITS, SOFT), focal)
    s = torch.sigmoid(LOGITS)
    binary = -(smooth * s.log() + (1 - smooth) * (1 - s).log()).mean()
    assert torch.isclose(BCE(0.2)(LOGITS, TARGET), binary)


@pytest.mark.parametrize("loss", [CrossEntropy(0.1), FocalLoss(2.0, [1, 2, 3, 4]), FocalLoss(0.0), BCE()])
def test_indices_equal_one_hot_shares(loss):
    assert torch.isclose(loss(LOGITS, TARGET), loss(LOGITS, SHARES))


def test_focal_without_gamma_is_cross_entropy_and_with_it_prefers_the_hard():
    assert torch.isclose(FocalLoss(0.0)(LOGITS, TARGET), cross_entropy(LOGITS, TARGET))
    easy, hard = torch.tensor([[5.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    label = torch.tensor([0])
    ratio = FocalLoss(2.0)(easy, label) / FocalLoss(2.0)(hard, label)
    assert ratio < 1e-3 * cross_entropy(easy, label) / cross_entropy(hard, label)


@pytest.mark.parametrize("loss", ALL_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_finite_scalars_with_gradients(loss, dtype):
    logits = (LOGITS * 30).to(dtype).requires_grad_()  # so sure that 1 - p rounds to zero
    for target in (TARGET, SOFT):
        value = loss(logits, target)
        assert value.shape == () and value.dtype == torch.float32 and torch.isfinite(value)
        (grad,) = torch.autograd.grad(value, logits)
        assert torch.isfinite(grad).all() and grad.abs().sum() > 0


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_targets_out_of_range_are_named(loss):
    for bad in (4, -1):
        with pytest.raises(InputError, match=f"label {bad} does not fit the head's 4 classes"):
            loss(LOGITS, torch.tensor([0, 1, 2, 3, 1, bad]))
    with pytest.raises(InputError, match="the target has 5 classes, the head has 4"):
        loss(LOGITS, torch.zeros(6, 5))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(type="CrossEntropy", label_smoothing=1.0), "label_smoothing"),
        (dict(type="BCE", smoothing=-0.1), "smoothing"),
        (dict(type="FocalLoss", gamma=-1), "gamma"),
        (dict(type="FocalLoss", alpha=[]), "alpha"),
    ],
)
def test_loss_mistakes(cfg, message):
    with pytest.raises(InputError, match=f"{cfg['type']}: {message}"):
        LOSSES.build(cfg)
    with pytest.raises(InputError, match="alpha has 2 weights for 4 classes"):
        FocalLoss(alpha=[1, 2])(LOGITS, TARGET)
