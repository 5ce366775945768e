"""TimmViT on the families of plain vision transformers that timm has, against timm itself."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import timm
import torch
from families import FAMILIES, SMALL, config, every_family, images, joined, own, pristine
from safetensors.torch import save_file
from torch import nn

from visadapt.backbones.base import POOLS
from visadapt.backbones.patch_embed import BAND_MODES
from visadapt.backbones.timm_vit import TimmViT
from visadapt.errors import InputError
from visadapt.registry import BACKBONES
from visadapt.testing import assert_close, tiny_backbone

EXACT = 1e-6  # against timm on the same weights


def error_of(*args, **kwargs):
    """The one line that the user gets."""
    with pytest.raises(InputError) as caught:
        TimmViT(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- equal to timm ---------------------------------------------------------------------------------------------------
def check_against(model, family, x, grid):
    """Compare everything but maps with timm's forward_features and forward_head."""
    features, prefix = pristine(family)(x), FAMILIES[family].prefix
    stream = model.forward_features(x)
    assert features.grid == grid and stream.shape == (len(x), prefix + grid[0] * grid[1], 48)
    assert_close(features.tokens, stream[:, prefix:], "tokens", EXACT)
    assert_close(features.native, model.forward_head(stream, pre_logits=True), "native", EXACT)
    assert features.native.shape == (len(x), 48) and features.maps == []
    if FAMILIES[family].cls:
        assert_close(features.cls, stream[:, 0], "cls", EXACT)
    else:
        assert features.cls is None


@every_family
@torch.no_grad()
def test_native_size(family):
    check_against(own(family), family, images(24, 24), (3, 3))


@every_family
@pytest.mark.parametrize(
    ("size", "grid"), [((16, 40), (2, 5)), ((24, 17), (3, 3)), ((30, 9), (4, 2)), ((5, 3), (1, 1)), ((1, 1), (1, 1))]
)
@torch.no_grad()
def test_any_size(family, size, grid):
    """Not square, no multiple of the patch, below one patch; one image."""
    check_against(own(family, dynamic_img_size=True, dynamic_img_pad=True), family, images(*size, batch=1), grid)


@every_family
@torch.no_grad()
def test_images_of_a_batch_do_not_meet(family):
    backbone, x = pristine(family), images(16, 24, batch=3)
    together = joined(backbone(x))
    for i in range(3):
        assert_close(joined(backbone(x[i : i + 1])), together[i : i + 1])


# ---- features --------------------------------------------------------------------------------------------------------
@every_family
@torch.no_grad()
def test_pooled_vectors(family):
    backbone = pristine(family)
    features = backbone(images(16, 24))
    expected = {"native": features.native, "avg": features.tokens.mean(1)}
    if FAMILIES[family].cls:
        expected |= {"cls": features.cls, "cls_avg": torch.cat([features.cls, features.tokens.mean(1)], 1)}
    for pool in POOLS:
        if pool in expected:
            assert torch.equal(features.pooled(pool), expected[pool])
            assert backbone.pooled_dim(pool) == expected[pool].shape[1]
        else:
            with pytest.raises(InputError, match=f"'{pool}' needs a class token.*use pool='avg' or 'native'"):
                features.pooled(pool)
    with pytest.raises(InputError, match=r"unknown pool 'averag' \(did you mean 'avg'\?\)"):
        features.pooled("averag")


@every_family
@torch.no_grad()
def test_maps(family):
    backbone = tiny_backbone(config(family, out_indices=(0, -1)))
    x = images(16, 37)
    features, model = backbone(x), own(family, dynamic_img_size=True, dynamic_img_pad=True)
    expected = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert [m.shape for m in features.maps] == [(2, 48, 2, 5)] * 2 and backbone.embed_dims == [48, 48]
    for level, found, wanted in zip(backbone.out_indices, features.maps, expected):
        assert_close(found, wanted, f"map of block {level}", EXACT)
    assert_close(joined(features), joined(pristine(family)(x)), tolerance=0)


@torch.no_grad()
def test_levels_are_counted_from_both_ends():
    arch, x = SMALL | dict(depth=4), images(16, 24)
    backbone = TimmViT("test_vit", arch=arch, out_indices=(-3, 2)).eval()
    assert backbone.out_indices == (1, 2)
    expected = backbone.body.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
    assert all(map(torch.equal, backbone(x).maps, expected)) and not torch.equal(*expected)


# ---- bands -----------------------------------------------------------------------------------------------------------
def from_file(family, tmp_path, monkeypatch, **options):
    path = tmp_path / "rgb.safetensors"
    save_file({k: v.contiguous() for k, v in pristine(family).body.state_dict().items()}, path)
    return BACKBONES.build(config(family, weights=str(path), **options)).eval()


def from_hub(family, tmp_path, monkeypatch, **options):
    create, weights = timm.create_model, pristine(family).body.state_dict()

    def fetch(name, pretrained, **kwargs):
        assert pretrained and kwargs["in_chans"] == 3, "the hub has RGB weights"
        model = create(name, pretrained=False, **kwargs)
        model.load_state_dict(weights)
        return model

    monkeypatch.setattr(timm, "create_model", fetch)
    return BACKBONES.build(config(family, weights="timm", **options)).eval()


@pytest.mark.parametrize("mode", BAND_MODES)
@pytest.mark.parametrize("bands", [1, 4, 13])
@pytest.mark.parametrize("source", [from_file, from_hub])
@pytest.mark.parametrize("family", ["vit", "clip"])  # a patch convolution with and without bias
@torch.no_grad()
def test_bands(family, source, bands, mode, tmp_path, monkeypatch):
    build = functools.partial(source, family, tmp_path, monkeypatch, in_chans=bands, bands=mode)
    if mode == "zero" and bands < 3:
        with pytest.raises(InputError, match="mode 'zero' keeps red, green and blue"):
            build()
        return
    backbone, rgb = build(), pristine(family)
    x = images(16, 20, bands=bands)
    assert backbone.in_chans == bands and len(backbone.mean) == len(backbone.std) == bands
    assert backbone.sites()[0].dim_in == bands
    if mode == "zero":
        assert_close(joined(backbone(x)), joined(rgb(x[:, :3])))
        return
    grey = x[:, :1]
    assert_close(joined(backbone(grey.expand(-1, bands, -1, -1))), joined(rgb(grey.expand(-1, 3, -1, -1))))
    if bands > 3:  # in "repeat" band 3 is red again; in "mean" all bands are alike
        order = torch.arange(bands)
        red, green = (order.clone().index_copy_(0, torch.tensor([i, 3]), torch.tensor([3, i])) for i in (0, 1))
        assert_close(joined(backbone(x[:, red])), joined(backbone(x)))
        assert torch.allclose(joined(backbone(x[:, green])), joined(backbone(x)), atol=1e-4) == (mode == "mean")


@pytest.mark.parametrize("bands", [1, 13])
def test_random_weights_for_any_bands(bands):
    backbone = tiny_backbone(config("eva02", in_chans=bands))
    assert backbone(images(16, 16, bands=bands)).tokens.shape == (2, 4, 48)


@pytest.mark.parametrize("shape", [(2, 4, 16, 16), (2, 1, 16, 16), (3, 16, 16), (2, 3, 16)])
def test_other_bands_than_built_for(shape):
    with pytest.raises(InputError, match=r"takes \(B, 3, H, W\) images, got .*; see in_chans"):
        pristine("vit")(torch.zeros(shape))


def test_statistics():
    clip, four = pristine("clip"), tiny_backbone(config("clip", in_chans=4))
    assert clip.mean == pytest.approx([255 * v for v in timm.data.OPENAI_CLIP_MEAN])
    assert clip.std == pytest.approx([255 * v for v in timm.data.OPENAI_CLIP_STD])
    assert four.mean == (*clip.mean, clip.mean[0]) and four.std == (*clip.std, clip.std[0])
    given = TimmViT("test_vit", arch=SMALL, in_chans=2, mean=[1, 2], std=[3, 4])
    assert (given.mean, given.std) == ((1, 2), (3, 4))
    tagged = TimmViT("vit_small_patch16_224.dino", arch=SMALL)  # the tag was trained with other ones than the default
    assert tagged.mean == pytest.approx([255 * v for v in timm.data.IMAGENET_DEFAULT_MEAN])
    assert pristine("vit").mean == (127.5,) * 3


# ---- the rest --------------------------------------------------------------------------------------------------------
@every_family
def test_depth_of_parameters(family):
    """0 for what block 0 gets its input from, i + 1 in block i, then what is behind the blocks."""
    backbone = copy.deepcopy(pristine(family)).requires_grad_(True)
    caught = []
    backbone.body.blocks[0].register_forward_pre_hook(lambda m, args: caught.append(args[0]))
    backbone(images(16, 24))
    names, values = zip(*backbone.body.named_parameters())
    reached = torch.autograd.grad(caught[0].square().sum(), values, allow_unused=True)
    for name, grad in zip(names, reached):
        if name.startswith("blocks."):
            assert backbone.layer_id(name) == int(name.split(".")[1]) + 1
        else:
            assert backbone.layer_id(name) == (0 if grad is not None or name.startswith("rope.") else 3), name


def test_arguments_rebuild_it():
    options = dict(in_chans=4, bands="mean", out_indices=(0, -1), mean=[1.0] * 4)
    backbone = BACKBONES.build(config("dinov2", **options))
    again = BACKBONES.build({"type": "TimmViT", **backbone.arguments()})
    assert again.arguments() == backbone.arguments() and again.sites() == backbone.sites()
    assert again.out_indices == (0, 1) and again.mean == (1.0,) * 4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_base_patch16_xp_224", {}, "has ParallelScalingBlocks; TimmViT knows blocks of attention and MLP in turn"),
        ("vit_small_patch16_18x2_224", {}, "has ParallelThingsBlocks"),
        ("vit_dpwee_patch16_reg1_gap_256", {}, "has DiffParallelScalingBlocks"),
        ("beit_base_patch16_224", {}, "'beit_base_patch16_224' is none of the plain vision transformers"),
        ("resnet18", {}, "'resnet18' is none of the plain vision transformers"),
        ("vit_tiny_r_s16_p8_224", dict(patch_size=1, img_size=32), "has a HybridEmbed before its blocks"),
        ("eva02_tinny_patch14_224", {}, "timm has no model 'eva02_tinny_patch14_224' (did you mean"),
        ("deit_tinny_patch16_224", {}, "(did you mean 'deit_tiny_patch16_224'"),
        ("test_vit.nosuchtag", {}, "Invalid pretrained tag (nosuchtag)"),
        ("test_vit", dict(num_heads=5), "cannot be built: dim should be divisible by num_heads; see also arch"),
        ("test_vit", dict(num_heads=0), "cannot be built: integer"),
        ("test_vit", dict(embed_dims=48), "unexpected keyword argument 'embed_dims'"),
        ("test_vit", dict(patch_size=(8, 16)), "has patches of 8x16 in images of 24x24; TimmViT takes square patches"),
        ("test_vit", dict(img_size=4), "has patches of 8x8 in images of 4x4"),
        ("test_vit", dict(global_pool=""), "has no pooling and so no vector per image; set global_pool in arch"),
    ],
)
def test_networks_that_are_refused(name, options, message):
    assert message in error_of(name, arch=SMALL | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(bands="repaet"), "TimmViT: unknown bands 'repaet' (did you mean 'repeat'?)"),
        (dict(in_chans=0), "in_chans must be a whole number of at least 1, got 0"),
        (dict(weights="imagenet"), "TimmViT weights 'imagenet': no such file, nor 'timm'"),
        (dict(mean=[1.0]), "mean has 1 values for 3 bands"),
        (dict(std=[1.0] * 3, in_chans=4), "std has 3 values for 4 bands"),
        (dict(std=[1, 0, 1]), "std must be finite and above 0, got [1, 0, 1]"),
        (dict(std=[1, 1, -1]), "std must be finite and above 0"),
        (dict(mean=[0, math.nan, 0]), "mean must be finite, got"),
        (dict(out_indices=(0, 2)), "out_indices has 2; 'test_vit' has the blocks 0 to 1"),
        (dict(out_indices=(-3,)), "out_indices has -3"),
        (dict(out_indices=(0, -2)), "once, shallow to deep, got [0, -2]"),
        (dict(out_indices=(1, 0)), "once, shallow to deep, got [1, 0]"),
    ],
)
def test_arguments_that_make_no_sense(options, message):
    assert message in error_of("test_vit", arch=SMALL, **options)


@pytest.mark.parametrize(
    ("weights", "asked"), [("timm", "vit_small_patch16_224"), ("timm:dino", "vit_small_patch16_224.dino")]
)
def test_no_network(weights, asked, monkeypatch):
    calls = []

    def fail(name, pretrained, **kwargs):
        calls.append((name, pretrained))
        raise OSError("we cannot connect\nto the hub." + " again" * 100)

    monkeypatch.setattr(timm, "create_model", fail)
    message = error_of("vit_small_patch16_224", weights=weights, arch=SMALL)
    assert message.startswith("weights of 'vit_small_patch16_224' could not be fetched by timm (we cannot connect to")
    assert message.endswith("give a file") and len(message) < 400 and calls == [(asked, True)]


def test_weights_of_timm_for_another_architecture(monkeypatch):
    def fail(name, **kwargs):
        nn.Linear(2, 3).load_state_dict(nn.Linear(3, 3).state_dict())

    monkeypatch.setattr(timm, "create_model", fail)
    message = error_of("test_vit", weights="timm", arch=SMALL)
    assert "weights='timm') cannot be built: Error(s) in loading state_dict" in message and "size mismatch" in message
