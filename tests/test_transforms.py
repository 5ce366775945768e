"""The albumentations bridge and batch mixing."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch

from visadapt.errors import InputError
from visadapt.registry import TRANSFORMS
from visadapt.transforms.albu import Albu
from visadapt.transforms.mix import BatchMix

IMAGE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
RESIZE = dict(type="Resize", height=24, width=32)
FLIPS = [dict(type="HorizontalFlip", p=0.5), dict(type="VerticalFlip", p=0.5)]
MANY = [
    dict(type="RandomResizedCrop", size=(20, 20)),
    dict(type="OneOf", transforms=[dict(type="ColorJitter"), dict(type="GaussNoise")], p=0.9),
    dict(type="ElasticTransform", p=1),
    dict(type="ISONoise", p=1),
]


def test_result_depends_on_the_seed_alone():
    a, b = Albu(MANY), Albu(MANY)
    first = a(IMAGE, 7)
    assert first.shape == (20, 20, 3) and first.dtype == np.uint8
    b(IMAGE, 1), b(IMAGE, 2)
    assert np.array_equal(b(IMAGE, 7), first)
    assert not np.array_equal(a(IMAGE, 8), first)


def test_transforms_of_one_pipeline_draw_independently():
    albu = Albu(FLIPS)
    kinds = {
        "none": IMAGE,
        "horizontal": IMAGE[:, ::-1],
        "vertical": IMAGE[::-1],
        "both": IMAGE[::-1, ::-1],
    }
    seen = {n for seed in range(40) for n, k in kinds.items() if np.array_equal(albu(IMAGE, seed), k)}
    assert seen == set(kinds)


def test_pickle_and_json_rebuild_the_pipeline():
    albu = Albu(MANY)
    again = Albu(json.loads(json.dumps(albu.to_json())))
    for other in (pickle.loads(pickle.dumps(albu)), again):
        assert np.array_equal(other(IMAGE, 3), albu(IMAGE, 3))
    assert again.to_json() == albu.to_json()
    albu.to_json()[0]["size"] = [1, 1]
    assert albu.to_json()[0]["size"] == [20, 20]


@pytest.mark.parametrize(
    ("transforms", "expected"),
    [
        ([RESIZE], False),
        ([RESIZE, dict(type="CenterCrop", height=8, width=8), dict(type="PadIfNeeded", min_height=9)], False),
        ([dict(RESIZE, p=0.5)], True),
        ([dict(type="HorizontalFlip", p=0)], False),
        (FLIPS, True),
        ([dict(type="Sequential", transforms=[RESIZE], p=1)], False),
        ([dict(type="Sequential", transforms=[RESIZE])], True),  # albumentations' own default is p=0.5
        ([dict(type="Sequential", transforms=[RESIZE, FLIPS[0]], p=1)], True),
        ([dict(type="LongestMaxSize", max_size=[16, 32])], True),
        ([dict(type="PadIfNeeded", min_height=80, position="random")], True),
        ([dict(type="ToGray")], True),
        ([dict(type="ToGray", p=1)], False),
    ],
)
def test_is_random(transforms, expected):
    albu = Albu(transforms)
    assert albu.is_random is expected
    if not expected:
        assert np.array_equal(albu(IMAGE, 1), albu(IMAGE, 2))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (dict(type="Resiz", height=8, width=8), r"transform\[0\].*no transform 'Resiz' \(did you mean 'Resize'\?\)"),
        (dict(type="Resize", height=8, widht=8), r"Resize has no argument 'widht' \(did you mean 'width'\?\)"),
        (dict(type="Resize", height=8), "width: Field required"),
        (dict(type="Resize", height=8, width=-1), "width: Input should be greater"),
        (dict(type="OneOf", transforms=[dict(type="Blurr")]), r"transform\[0\]\.transforms\[0\].*'Blur'"),
        (dict(type="OneOf"), "OneOf needs transforms"),
        (dict(type="Normalize"), "the model normalises"),
        (dict(type="ToTensorV2"), "become tensors"),
        (dict(type="MaskDropout"), "needs mask beside the image"),
        (dict(type="ShiftScaleRotate"), "special case of Affine"),
        (dict(type="ToGray", num_output_channels=1), "turns images of 3 bands into"),
        (dict(type=Albu), "must be JSON"),
        ("Resize", "must be dict"),
    ],
)
def test_mistakes_are_one_line_errors(entry, message):
    with pytest.raises(InputError, match=message) as caught:
        Albu([entry])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("channels", [4, 13])
def test_rgb_transforms_are_refused_on_other_bands(channels):
    wrong = [dict(type="OneOf", transforms=[dict(type="HorizontalFlip"), dict(type="ColorJitter")], p=0.01)]
    with pytest.raises(InputError, match=f"ColorJitter does not work on images of {channels} bands"):
        Albu(wrong, channels)
    right = Albu([*FLIPS, dict(type="RandomBrightnessContrast", p=1)], channels)
    assert right(np.zeros((8, 8, channels), np.uint8), 0).shape == (8, 8, channels)


def test_float_images_keep_their_range():
    image = np.random.default_rng(0).random((16, 16, 13), dtype=np.float32) * 10000
    out = Albu([dict(type="Resize", height=8, width=8), dict(type="Rotate", p=1)], 13)(image, 0)
    assert out.dtype == np.float32 and out.max() > 1000
    with pytest.raises(InputError, match=r"RandomGamma works on 8-bit.*clip"):
        Albu([dict(type="RandomGamma", p=1)], 13)(image, 0)


BLOCKS = np.kron(np.array([[1, 90], [254, 255]], np.uint8), np.ones((24, 32), np.uint8))
FILLS = [
    dict(type="Rotate", limit=(30, 40)),
    dict(type="Affine", translate_percent=(0.2, 0.3)),
    dict(type="Pad", padding=4),
    dict(type="CropAndPad", percent=0.1),
    dict(type="GridElasticDeform", num_grid_xy=(4, 4), magnitude=10),
    dict(type="OpticalDistortion", distort_limit=(0.4, 0.5)),
    dict(type="CoarseDropout", fill_mask=255),
    dict(type="PixelDropout", dropout_prob=0.3, mask_drop_value=255),
]


@pytest.mark.parametrize("entry", FILLS, ids=lambda entry: entry["type"])
def test_masks_are_filled_with_ignored_and_never_mixed(entry):
    albu = Albu([dict(entry, p=1)])
    full = np.full((48, 64), 7, np.uint8)
    image, mask = albu(IMAGE, 3, full)
    assert set(np.unique(mask)) == {7, 255} and mask.dtype == np.uint8
    assert np.array_equal(image, albu(IMAGE, 3)) and (full == 7).all()
    _, mask = albu(IMAGE, 3, BLOCKS)
    assert set(np.unique(mask)) == {1, 90, 254, 255}


@pytest.mark.parametrize("transforms", [MANY, [*FLIPS, dict(type="Perspective", p=1), RESIZE], [dict(type="D4", p=1)]])
def test_image_and_mask_share_one_draw(transforms):
    """An image that shows the mask still does, but for the borders that interpolation blurs."""
    geometric = [t for t in transforms if t["type"] not in ("OneOf", "ISONoise")]
    albu = Albu(geometric)
    classes = (BLOCKS == 90).astype(np.uint8)
    for seed in range(6):
        image, mask = albu(np.repeat(classes[..., None] * 250, 3, 2), seed, classes)
        assert image.shape[:2] == mask.shape
        known = mask < 255
        assert ((image[..., 0] > 125) == (mask == 1))[known].mean() > 0.95


def test_mistakes_about_masks():
    for name, value, kind in (("fill_mask", 0, "Pad"), ("mask_drop_value", 3, "PixelDropout")):
        with pytest.raises(InputError, match=rf"transform\[0\]: {kind}: {name} must be 255"):
            Albu([{"type": kind, name: value} | ({"padding": 1} if kind == "Pad" else {})])
    with pytest.raises(InputError, match="mask_interpolation would mix labels"):
        Albu([dict(RESIZE, mask_interpolation=1)])
    assert Albu([dict(RESIZE, mask_interpolation=0)]).to_json() == [dict(RESIZE, mask_interpolation=0)]
    with pytest.raises(InputError, match=r"uint8 and of its image's size: this one is uint8 \(48, 60\)"):
        Albu([RESIZE])(IMAGE, 0, BLOCKS[:, :60])
    with pytest.raises(InputError, match="this one is int64"):
        Albu([RESIZE])(IMAGE, 0, BLOCKS.astype(np.int64))
    with pytest.raises(InputError, match="Morphological would grow"):
        Albu([dict(type="OneOf", transforms=[dict(type="Morphological")])])(IMAGE, 0, BLOCKS)


def test_balanced_crop():
    """A stripe of one class in a field of another: of most places less than a quarter is stripe."""
    mask = np.zeros((48, 64), np.uint8)
    mask[:, 28:36] = 1
    crop = dict(type="BalancedCrop", height=16, width=16)

    def shares(**options):
        return [Albu([crop | options])(IMAGE, seed, mask)[1].mean() for seed in range(60)]

    assert np.mean([share < 0.25 for share in shares(max_share=1.0)]) > 0.5
    assert np.mean([share < 0.25 for share in shares()]) < 0.1
    mask[:] = 255  # what is ignored is no class: it does not make room for one
    mask[:12, :32], mask[12:, :32] = 1, 0
    found = [Albu([crop])(IMAGE, seed, mask)[1] for seed in range(60)]
    assert np.mean([(m == 1).sum() >= 0.25 * (m < 255).sum() > 0 for m in found]) > 0.8
    assert Albu([crop])(IMAGE, 0, np.full_like(mask, 255))[1].shape == (16, 16)  # nothing fits
    image, padded = Albu([dict(crop, height=60, pad_if_needed=True)])(IMAGE, 0, np.zeros((48, 64), np.uint8))
    assert image.shape == (60, 16, 3) and (padded == 255).sum() == 12 * 16
    assert Albu([crop]).is_random and Albu([crop]).to_json() == [crop]
    with pytest.raises(InputError, match=r"transform\[0\]: BalancedCrop: height: Input should be greater"):
        Albu([dict(crop, height=-1)])
    with pytest.raises(InputError, match=r"max_share must be in \(0, 1\], got 1.5"):
        Albu([dict(crop, max_share=1.5)])
    with pytest.raises(InputError, match=r"BalancedCrop requires .*mask"):
        Albu([crop])(IMAGE, 0)


def test_wrong_images_are_input_errors():
    with pytest.raises(InputError, match=r"fail on an image of \(48, 64, 3\).*Crop size"):
        Albu([dict(type="RandomCrop", height=100, width=100)])(IMAGE, 0)
    with pytest.raises(InputError, match="built for 4 bands"):
        Albu(FLIPS, 4)(IMAGE, 0)


def test_albu_is_registered():
    assert isinstance(TRANSFORMS.build(dict(type="Albu", transforms=[RESIZE])), Albu)


@pytest.mark.parametrize("kwargs", [dict(mixup=0.8), dict(cutmix=1.0), dict(mixup=0.8, cutmix=1.0)])
def test_batch_mix_keeps_labels_in_step_with_pixels(kwargs):
    labels = torch.arange(6)
    inputs = torch.zeros(6, 6, 16, 16)
    inputs[range(6), range(6)] = 1  # image i is one in band i, so the mean of a band is the share of image i
    mixed, targets = BatchMix(**kwargs)(inputs, labels, 6, torch.Generator().manual_seed(1))
    assert torch.allclose(targets.sum(1), torch.ones(6))
    assert torch.allclose(mixed.mean((2, 3)), targets, atol=1e-5)
    assert not torch.equal(mixed, inputs)


def test_batch_mix_draws_from_torch_alone():
    mix = BatchMix(mixup=0.8, cutmix=1.0, prob=0.7)
    inputs, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = [mix(inputs, labels, 4)[1] for _ in range(5)]
    np.random.seed(0)
    torch.set_rng_state(state)
    second = [mix(inputs, labels, 4)[1] for _ in range(5)]
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert len({tuple(t.flatten().tolist()) for t in first}) > 2

    before = torch.get_rng_state()
    mix(inputs, labels, 4, torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


def test_batch_mix_prob_and_mistakes():
    inputs, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    generator = torch.Generator().manual_seed(0)
    same = sum(torch.equal(BatchMix(mixup=1, prob=0.3)(inputs, labels, 4, generator)[0], inputs) for _ in range(100))
    assert 55 < same < 85
    for kwargs in (dict(), dict(mixup=-1.0), dict(mixup=1.0, prob=0.0)):
        with pytest.raises(InputError, match="BatchMix"):
            BatchMix(**kwargs)
    with pytest.raises(InputError, match="label 3 does not fit the head's 3 classes"):
        BatchMix(mixup=1)(inputs, labels, 3)
