from __future__ import annotations

import argparse
import os
import pickle
import zipfile

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from visadapt.backbones.timm_vit import TimmViT
from visadapt.backbones.weights import FOCUS, is_local, load_weights
from visadapt.convert import convert
from visadapt.errors import InputError

TINY = dict(embed_dim=48, depth=2, num_heads=3, img_size=56, dynamic_img_size=True)


def build(name="vit_small_patch14_dinov2", seed=0, **kwargs):
    """A tiny model with random values everywhere, norms and LayerScale included."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**TINY, "num_classes": 0, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def features(model, chans=3, size=(56, 56)):
    torch.manual_seed(9)
    with torch.no_grad():
        return model.forward_features(torch.randn(2, chans, *size))


def official(model, chunk=None):
    """The state of a timm DINOv2 under the official names; the model gets a class position to add."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for key in list(state):
        renamed = key
        if "mlp.fc" in key and type(model.blocks[0].mlp).__name__ == "GluMlp":
            renamed = key.replace("fc1", "w12").replace("fc2", "w3")
        if chunk and key.startswith("blocks."):
            renamed = f"blocks.{int(key.split('.')[1]) // chunk}.{renamed.removeprefix('blocks.')}"
        state[renamed] = state.pop(key)
    if model.no_embed_class:
        state["register_tokens"] = state.pop("reg_token")
        own, position = (torch.randn(1, 1, model.embed_dim) for _ in range(2))
        model.cls_token.data = own + position
        state["cls_token"] = own
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], 1)
    state["mask_token"] = torch.zeros(1, model.embed_dim)
    return state


def saved(state, path):
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save(state, path)
    return str(path)


# --- official DINOv2


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize(
    "name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_reg4_dinov2"]
)
def test_official_dinov2_gives_equal_outputs(name, suffix, tmp_path):
    source, target = build(name), build(name, seed=1)
    report = load_weights(target, saved(official(source), tmp_path / f"official{suffix}"))
    assert torch.equal(features(source), features(target))
    assert (report.layout, report.dropped, report.missing) == ("dinov2", ("mask_token",), ())
    assert report.loaded == len(target.state_dict())
    assert report.positions is report.bands is None


def test_training_checkpoint_of_dinov2_with_chunked_blocks(tmp_path):
    source, target = build(depth=3), build(depth=3, seed=1)
    state = {f"backbone.{k}": v for k, v in official(source, chunk=2).items()}
    assert "backbone.blocks.1.2.norm1.weight" in state
    state["dino_head.last_layer.weight"] = torch.zeros(2)
    report = load_weights(target, saved({"teacher": state, "iteration": 3}, tmp_path / "teacher.pth"))
    assert torch.equal(features(source), features(target))
    assert set(report.dropped) == {"mask_token", "dino_head.last_layer.weight", "iteration"}


def test_conversion_changes_neither_checkpoint_nor_model():
    model = build("vit_small_patch14_reg4_dinov2")
    state = official(model)
    before, values = dict(state), [p.clone() for p in model.parameters()]
    assert convert(state, model).layout == "dinov2"
    assert state.keys() == before.keys() and all(state[k] is before[k] for k in before)
    assert all(torch.equal(a, b) for a, b in zip(values, model.parameters()))


# --- Hugging Face DINOv2


@pytest.mark.parametrize("registers", [0, 4])
def test_hugging_face_dinov2_equals_its_own_implementation(registers, tmp_path):
    transformers = pytest.importorskip("transformers")
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=56,
        patch_size=14,
        use_swiglu_ffn=bool(registers),
        **(dict(num_register_tokens=registers) if registers else {}),
    )
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}Model")(config).eval()
    for parameter in theirs.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    ours = build("vit_giant_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2", seed=1)
    report = load_weights(ours, str(tmp_path / "model.safetensors"))
    torch.manual_seed(9)
    with torch.no_grad():
        expected = theirs(torch.randn(2, 3, 56, 56)).last_hidden_state
    torch.testing.assert_close(features(ours), expected, atol=1e-5, rtol=0)
    assert (report.layout, report.dropped) == ("dinov2_hf", ("embeddings.mask_token",))


# --- CLIP


@pytest.fixture(scope="module")
def towers():
    """Tiny open_clip models by their activation: True for QuickGELU."""
    open_clip = pytest.importorskip("open_clip")

    def tiny(quick):
        torch.manual_seed(0)
        vision = dict(layers=2, width=48, head_width=16, patch_size=14, image_size=56)
        text = dict(context_length=8, vocab_size=20, width=16, heads=2, layers=1)
        return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, quick_gelu=quick).eval()

    return {quick: tiny(quick) for quick in (True, False)}


def clip_model(quick=True, **kwargs):
    name = "vit_base_patch16_clip_quickgelu_224" if quick else "vit_base_patch16_clip_224"
    return build(name, seed=1, patch_size=14, **kwargs)


@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "tower alone"])
@pytest.mark.parametrize("quick", [True, False])
def test_clip_image_tower_equals_open_clip(towers, quick, whole, tmp_path):
    theirs = towers[quick]
    state = (theirs if whole else theirs.visual).state_dict()
    ours = clip_model(quick, num_classes=16)
    report = load_weights(ours, saved(state, tmp_path / "clip.safetensors"))
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs.encode_image(x), atol=1e-5, rtol=1e-5)
    assert report.layout == "clip"
    assert set(report.dropped) == {k for k in state if whole and not k.startswith("visual.")}


def test_clip_without_projection_reports_it(towers, tmp_path):
    report = load_weights(clip_model(), saved(towers[True].visual.state_dict(), tmp_path / "clip.pth"))
    assert set(report.dropped) == {"head.weight", "head.bias"}


def test_openai_weights_are_refused_where_quickgelu_is_lacking(towers, tmp_path):
    state = {**towers[True].state_dict(), "input_resolution": torch.tensor(56)}
    path = saved(state, tmp_path / "openai.pth")
    with pytest.raises(InputError, match="QuickGELU"):
        load_weights(clip_model(quick=False), path)
    assert "input_resolution" in load_weights(clip_model(), path).dropped


def test_open_clip_with_a_tower_of_timm(tmp_path):
    source, target = build(num_classes=7), build(num_classes=7, seed=1)
    state = {f"visual.trunk.{k}": v for k, v in source.state_dict().items() if not k.startswith("head.")}
    state |= {"visual.head.proj.weight": source.head.weight.data, "text.token_embedding.weight": torch.zeros(3, 2)}
    path = saved(state, tmp_path / "trunk.pth")
    report = load_weights(target, path)
    assert torch.equal(features(source), features(target)) and torch.equal(source.head.weight, target.head.weight)
    assert report.dropped == ("text.token_embedding.weight",)
    headless = load_weights(build(), path)
    assert set(headless.dropped) == {"visual.head.proj.weight", "text.token_embedding.weight"}


# --- timm


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "epoch": 3},
        lambda s: {"model": {f"model.{k}": v for k, v in s.items()}, "args": argparse.Namespace(lr=1)},
        lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    ],
)
def test_timm_layout_with_usual_wrappers(wrap, tmp_path):
    source, target = build("test_vit", patch_size=14), build("test_vit", seed=1, patch_size=14)
    report = load_weights(target, saved(wrap(source.state_dict()), tmp_path / "timm.pth"))
    assert torch.equal(features(source), features(target))
    assert report.layout == "timm"


def test_averaged_weights_are_preferred_and_the_others_reported(tmp_path):
    source, other, target = build(), build(seed=2), build(seed=1)
    both = {"state_dict": other.state_dict(), "state_dict_ema": source.state_dict()}
    report = load_weights(target, saved(both, tmp_path / "both.pth"))
    assert torch.equal(features(source), features(target))
    assert report.dropped == ("state_dict",)


def test_rotary_models_load_their_own_layout(tmp_path):
    kwargs = dict(embed_dim=96, num_heads=3, img_size=64)
    source, target = (build("vit_small_patch16_dinov3", seed=s, **kwargs) for s in (0, 1))
    load_weights(target, saved(source.state_dict(), tmp_path / "eva.safetensors"))
    assert torch.equal(features(source, size=(64, 64)), features(target, size=(64, 64)))


def test_classifier_is_loaded_only_where_it_fits(tmp_path):
    source = build(num_classes=5)
    path = saved(source.state_dict(), tmp_path / "classifier.pth")
    same, other, none, own = build(num_classes=5, seed=1), build(num_classes=4, seed=1), build(seed=1), build(seed=3)
    assert load_weights(same, path).dropped == () and torch.equal(same.head.weight, source.head.weight)
    kept = other.head.weight.clone()
    report = load_weights(other, path)
    assert report.dropped == report.missing == ("head.weight", "head.bias") and torch.equal(other.head.weight, kept)
    assert load_weights(none, path).dropped == ("head.weight", "head.bias")
    assert load_weights(same, saved(own.state_dict(), tmp_path / "own.pth")).missing == ("head.weight", "head.bias")


# --- positions and bands


@pytest.mark.parametrize(("size", "grid"), [((84, 84), (6, 6)), ((28, 70), (2, 5)), ((28, 28), (2, 2))])
@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_positions_are_resampled_and_reported(name, size, grid, tmp_path):
    source, target = build(name), build(name, seed=1, img_size=size)
    report = load_weights(target, saved(official(source), tmp_path / "small.pth"))
    assert report.positions == ((4, 4), grid)
    assert f"resampled from 4x4 to {grid[0]}x{grid[1]}" in str(report)
    # timm resamples to the image at hand from the file's grid; the same numbers must come out
    torch.testing.assert_close(features(target, size=size), features(source, size=size), atol=1e-5, rtol=1e-5)


def test_positions_of_unknown_grid_are_refused(tmp_path):
    oblong = saved(build(img_size=(28, 84)).state_dict(), tmp_path / "oblong.pth")
    assert load_weights(build(seed=1, img_size=(28, 84)), oblong).positions is None
    with pytest.raises(InputError, match="12 positions are neither a square nor the model's 4x4"):
        load_weights(build(), oblong)
    square = saved(build().state_dict(), tmp_path / "square.pth")
    with pytest.raises(InputError, match="16 positions may be 4x4 or the model's 2x8"):
        load_weights(build(img_size=(28, 112)), square)


def test_patch_embedding_is_widened_to_the_model(tmp_path):
    source, target = build(), build(seed=1, in_chans=5)
    path = saved(source.state_dict(), tmp_path / "rgb.pth")
    assert load_weights(target, path).bands == "repeat"
    grey = torch.randn(2, 1, 56, 56)
    with torch.no_grad():
        expected, got = (m.forward_features(grey.expand(-1, n, -1, -1)) for m, n in ((source, 3), (target, 5)))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert load_weights(target, path, bands="zero").bands == "zero"
    assert torch.equal(target.patch_embed.proj.weight[:, :3], source.patch_embed.proj.weight)
    five = saved(target.state_dict(), tmp_path / "five.pth")
    assert load_weights(build(in_chans=5), five).bands is None
    with pytest.raises(InputError, match="made for 5 bands, the model takes 4; set in_chans=5"):
        load_weights(build(in_chans=4), five)


# --- files that are refused


class Code:
    """Unpickling this makes a folder."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_refused_and_not_run(legacy, tmp_path):
    trace, path = tmp_path / "ran", tmp_path / "bad.pth"
    content = {**build().state_dict(), "extra": Code(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match=r"contains code \(posix.mkdir\) and is refused") as error:
        load_weights(build(), str(path))
    assert "\n" not in str(error.value) and not trace.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:.*looks like a TorchScript")
def test_plain_pickle_and_torchscript_are_refused(tmp_path):
    trace, plain, script = tmp_path / "ran", tmp_path / "plain.pt", tmp_path / "script.pt"
    plain.write_bytes(pickle.dumps(Code(trace)))
    with pytest.raises(InputError, match="a pickle might contain code"):
        load_weights(build(), str(plain))
    assert not trace.exists()
    torchscript(script)
    with pytest.raises(InputError, match=r"contains code \(TorchScript\)"):
        load_weights(build(), str(script))


def torchscript(path):
    """A minimal archive of the form that torch.jit.save writes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "version", "code/__torch__.py"):
            archive.writestr(f"model/{name}", "3")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("keep", [0, 64, 0.5, 0.999])
def test_truncated_files_are_refused(suffix, keep, tmp_path):
    path = tmp_path / f"cut{suffix}"
    saved(build().state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    model = build(seed=1)
    before = features(model)
    with pytest.raises(InputError, match="truncated, damaged or of another type") as error:
        load_weights(model, str(path))
    assert "\n" not in str(error.value)
    assert torch.equal(features(model), before)


@pytest.mark.parametrize("content", [b"hello world\n", b"<!DOCTYPE html>", bytes(1000), b"version https://git-lfs"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_other_files_are_refused(suffix, content, tmp_path):
    path = tmp_path / f"other{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"of another type|a pickle might contain code") as error:
        load_weights(build(), str(path))
    assert "\n" not in str(error.value)


def test_missing_file_folder_and_suffix(tmp_path):
    with pytest.raises(InputError, match=f"there is no file {tmp_path / 'none.pth'}"):
        load_weights(build(), str(tmp_path / "none.pth"))
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(InputError, match="there is no file"):
        load_weights(build(), str(tmp_path / "folder.pth"))
    with pytest.raises(InputError, match=r"ends in \.safetensors, \.pth, \.pt"):
        load_weights(build(), str(tmp_path / "model.h5"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"layer1.0.conv1.weight": torch.zeros(2)},
            "unknown checkpoint layout with keys layer1.0.conv1.weight;.*dinov2",
        ),
        ({"model": {"epoch": 3}}, "no tensors under the keys epoch"),
        ([torch.zeros(2)], "no state dict, a list"),
        (torch.zeros(2), "no state dict, a Tensor"),
    ],
)
def test_unknown_content_says_what_it_found(content, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load_weights(build(), saved(content, tmp_path / "odd.pth"))


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (dict(depth=3), "it lacks blocks.2.norm1.weight, .* in all"),
        (dict(depth=1), "it has also blocks.1.norm1.weight, .* in all"),
        (dict(embed_dim=96), r"cls_token \(1, 1, 48\) instead of \(1, 1, 96\)"),
        (dict(patch_size=16, img_size=64), r"patch_embed.proj.weight \(48, 3, 14, 14\) instead of \(48, 3, 16, 16\)"),
        (dict(name="vit_small_patch14_reg4_dinov2"), "it lacks reg_token"),
        (dict(global_pool="avg"), "it has also norm.weight, norm.bias"),
    ],
)
@pytest.mark.parametrize("form", [official, lambda m: m.state_dict()], ids=["official", "timm"])
def test_another_architecture_is_refused_and_nothing_is_written(form, arch, message, tmp_path):
    target = build(**arch, seed=1)
    before = [p.clone() for p in target.parameters()]
    path = saved(form(build()), tmp_path / "small.pth")
    with pytest.raises(InputError, match=message):
        load_weights(target, path)
    assert all(torch.equal(a, b) for a, b in zip(before, target.parameters()))


def test_registers_are_refused_by_a_model_without(tmp_path):
    path = saved(official(build("vit_small_patch14_reg4_dinov2")), tmp_path / "reg.pth")
    with pytest.raises(InputError, match="it has also reg_token"):
        load_weights(build(), path)


def test_what_is_local():
    assert all(map(is_local, (FOCUS, "a.pth", "b.pt", "c.safetensors", "weights/d", "./e.h5")))
    assert not any(map(is_local, ("timm", "timm:lvd142m", "timm:vit_small_patch14_dinov2.lvd142m", "dinov2_vits14")))


def test_patches_are_resampled_where_their_size_is_asked_for(tmp_path):
    """As published heads for patches of 16 pixels expect: plain bicubic, for positions too, and the class stays."""
    arch = dict(depth=1, embed_dim=16, num_heads=2)
    given = TimmViT("vit_small_patch14_dinov2", arch=arch).body.state_dict()
    save_file(given, tmp_path / "a.safetensors")
    file = str(tmp_path / "a.safetensors")
    model = TimmViT("vit_small_patch14_dinov2", file, arch={**arch, "patch_size": 16, "img_size": 256})
    assert model.weight_report.patch == (14, 16) and "patches resampled from 14 to 16" in str(model.weight_report)
    found = model.body.state_dict()
    wanted = F.interpolate(given["patch_embed.proj.weight"], (16, 16), mode="bicubic", align_corners=False)
    assert torch.equal(found["patch_embed.proj.weight"], wanted)
    table = given["pos_embed"][:, 1:].mT.unflatten(2, (37, 37))
    small = F.interpolate(table, (16, 16), mode="bicubic", align_corners=False).flatten(2).mT
    assert torch.equal(found["pos_embed"][:, :1], given["pos_embed"][:, :1])
    assert torch.allclose(found["pos_embed"][:, 1:], small, atol=1e-6)
    with pytest.raises(InputError, match="another architecture"):
        TimmViT("vit_small_patch16_224", file, arch={**arch, "init_values": 1.0, "img_size": 592})
