"""Segmentation: neck, heads, task, and the adapted backbone inside MMSegmentation's own model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import DefaultScope

from visadapt.core.io import load_adapter, save_adapter
from visadapt.errors import InputError
from visadapt.heads.segment import LinearSegHead
from visadapt.necks.pyramid import Pyramid
from visadapt.registry import HEADS
from visadapt.tasks.segment import Segmenter, best_class
from visadapt.testing import assert_close, noise

ARCH = dict(depth=4, embed_dim=32, num_heads=2, img_size=28, init_values=1.0)
BACKBONE = dict(type="TimmViT", name="vit_small_patch14_dinov2", arch=ARCH, out_indices=[0, 1, 2, 3])
LORA = dict(main=dict(type="LoRA", rank=2))
MMSEG = {
    "FCNHead": (dict(convs=1), None),
    "UPerHead": ({}, "Pyramid"),
    "SegFormerHead": ({}, "Pyramid"),
    "ASPPHead": (dict(dilations=[1, 2]), None),
    "DPTHead": (dict(post_channels=[8, 8, 16, 16]), None),
}


def segmenter(head="LinearSegHead", neck=None, seed=0, adapters=LORA, **options):
    torch.manual_seed(seed)
    neck = neck and dict(type=neck)
    return Segmenter(BACKBONE, dict(type=head, num_classes=3, **options), neck, adapters).eval()


def stripes(n=2, h=28, w=42):
    """Images whose brightness is the class, with masks; a border of ignored pixels."""
    masks = torch.zeros(n, h, w, dtype=torch.int64)
    masks[:, :, w // 3 : 2 * w // 3], masks[:, :, 2 * w // 3 :] = 1, 2
    images = (masks[:, None].float() - 1).repeat(1, 3, 1, 1)
    masks[:, :2] = 255
    return images, masks


def test_pyramid_has_the_strides_of_the_papers():
    maps = [torch.randn(2, 5, 4, 6) for _ in range(4)]
    found = Pyramid()(maps)
    assert [tuple(x.shape[2:]) for x in found] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert_close(found[3], F.avg_pool2d(maps[3], 2))  # bilinear at half the size is the mean of four
    assert found[2] is maps[2] and Pyramid().out_channels([5] * 4) == [5] * 4
    with pytest.raises(InputError, match="4 factors and the backbone gives 3"):
        Pyramid().out_channels([5] * 3)
    with pytest.raises(InputError, match="above 0"):
        Pyramid([1, 0])


def test_linear_head_is_a_linear_map_per_pixel():
    head = LinearSegHead(3, [4, 6]).eval()
    noise(head)
    maps = [torch.randn(2, 4, 6, 8), torch.randn(2, 6, 3, 4)]
    y = head(maps)
    both = torch.cat([maps[0], F.interpolate(maps[1], (6, 8), mode="bilinear")], 1)
    norm = head.norm
    flat = F.batch_norm(both, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    assert_close(y, torch.einsum("kc,bchw->bkhw", head.fc.weight[..., 0, 0], flat) + head.fc.bias[:, None, None])


@pytest.mark.parametrize("name", MMSEG)
def test_heads_of_mmsegmentation_train_and_come_back_from_a_file(name, tmp_path):
    pytest.importorskip("mmseg")
    DefaultScope.get_instance(f"run-{name}", scope_name="mmengine")  # as in a training run
    options, neck = MMSEG[name]
    task = segmenter(name, neck, channels=32, **options)
    images, masks = stripes()
    images = images + torch.randn_like(images)  # batch norms make nothing of two equal images
    task.train()
    losses = task(images, list(masks), mode="loss")
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in task.head.parameters())
    noise(task.adapted.adapters)
    wanted = task.eval()(images)
    assert wanted.shape == (2, 3, 28, 42)
    path = save_adapter(task.adapted, tmp_path / "a.safetensors", heads=task.heads, extra=task.card())
    other = segmenter(name, neck, seed=1, adapters=None, channels=32, **options)
    other.adapted.backbone.load_state_dict(task.adapted.backbone.state_dict())
    load_adapter(other.adapted, path, heads=other.heads)
    assert_close(other.eval()(images), wanted)


def test_segmenter_learns_two_images():
    task = segmenter().train()
    images, masks = stripes()
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(30):
        loss = task(images, list(masks), mode="loss")["loss_task"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    outputs = task.eval()(images, list(masks), mode="predict", path=["a", "b"], valid=torch.tensor([True, False]))
    known = masks[0] != 255
    assert (outputs[0]["pred"] == masks[0])[known].float().mean() > 0.8
    assert [(o["path"], o["valid"]) for o in outputs] == [("a", True), ("b", False)]


def test_ignored_pixels_have_no_part_in_the_loss():
    task = segmenter()
    images, masks = stripes()
    with torch.no_grad():
        scores = task(images)
        found = task(images, list(masks), mode="loss")["loss_task"]
    assert_close(found, F.cross_entropy(scores[:, :, 2:], masks[:, 2:]))


def test_padding_of_the_backbone_is_cut_off_again():
    """Scores of an image that is no multiple of the patch are those of the padded image, without what was added."""
    task = segmenter()
    noise(task.adapted.adapters)
    images = torch.randn(1, 3, 30, 45)
    with torch.no_grad():
        assert_close(task(images), task(F.pad(images, (0, 11, 0, 12)))[..., :30, :45])


def test_prediction_has_the_size_of_the_mask():
    task = segmenter()
    outputs = task(torch.randn(2, 3, 28, 42), [torch.zeros(50, 61).long(), torch.zeros(28, 42).long()], mode="predict")
    assert [tuple(o["pred"].shape) for o in outputs] == [(50, 61), (28, 42)]
    assert tuple(task(torch.randn(1, 3, 28, 42), mode="predict")[0]["pred"].shape) == (28, 42)
    scores = torch.randn(3, 7, 9)
    assert torch.equal(best_class(scores, (7, 9)), scores.argmax(0))


def test_segmenter_refuses():
    images, masks = stripes()
    task = segmenter()
    with pytest.raises(InputError, match="no pixel of the 2 masks"):
        task(images, list(torch.full_like(masks, 255)), mode="loss")
    with pytest.raises(InputError, match=r"mask of \(28, 40\) in a batch of 28x42"):
        task(images, [masks[0], masks[1, :, :40]], mode="loss")
    with pytest.raises(InputError, match="gives no maps"):
        Segmenter({**BACKBONE, "out_indices": []}, dict(type="LinearSegHead", num_classes=3))
    with pytest.raises(InputError, match="2 or more"):
        segmenter(adapters=None, seed=0) and HEADS.build(dict(type="LinearSegHead", num_classes=1), in_channels=[4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(norm="LN"), "unknown norm 'LN'"),
        (dict(dropout=1.0), "dropout"),
        (dict(norm="GN", channels=48), "32 groups"),
        (dict(convs=0), "LinearSegHead has none"),
    ],
)
def test_heads_of_mmsegmentation_refuse(options, message):
    with pytest.raises(InputError, match=message):
        HEADS.build(dict(type="FCNHead", num_classes=3, **options), in_channels=[4, 4])


def test_adapted_backbone_works_in_an_encoder_decoder():
    pytest.importorskip("mmseg")
    from mmengine.config import ConfigDict
    from mmengine.structures import PixelData
    from mmseg.models import EncoderDecoder, SegDataPreProcessor
    from mmseg.structures import SegDataSample

    from visadapt.backbones.mmseg import AdaptedBackbone

    head = dict(type="FCNHead", in_channels=32, in_index=3, channels=8, num_convs=1, num_classes=3)
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = EncoderDecoder(
            dict(type=AdaptedBackbone, backbone=BACKBONE, adapters=LORA, neck=dict(type="Pyramid")),
            dict(head, norm_cfg=dict(type="BN"), loss_decode=dict(type="CrossEntropyLoss", avg_non_ignore=True)),
            data_preprocessor=dict(type=SegDataPreProcessor, size=(28, 42)),
            train_cfg=dict(),
            test_cfg=ConfigDict(mode="whole"),
        )
    model.init_weights()
    images, masks = stripes()
    samples = []
    for mask in masks:
        sample = SegDataSample(metainfo=dict(ori_shape=(28, 42), img_shape=(28, 42)))
        sample.set_data(dict(gt_sem_seg=PixelData(data=mask[None])))
        samples.append(sample)
    losses = model.loss(images, samples)
    losses["decode.loss_ce"].backward()
    base = model.backbone.adapted.backbone
    assert all(p.grad is None for p in base.parameters())
    assert all(p.grad is not None for p in model.backbone.adapted.adapters.parameters())
    assert np.isfinite(float(losses["decode.loss_ce"].detach()))
    assert model.eval().predict(images, samples)[0].pred_sem_seg.data.shape == (1, 28, 42)
