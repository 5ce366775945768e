"""Adapter files: what is in them, and what happens to damaged or wrong ones."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from visadapt import InputError
from visadapt.adapters.adaptformer import AdaptFormer
from visadapt.adapters.full import FullFineTune
from visadapt.adapters.lora import LoRA
from visadapt.backbones.timm_vit import TimmViT
from visadapt.cli import main
from visadapt.core.adapted import Adapted
from visadapt.core.io import read_manifest
from visadapt.heads.linear import LinearHead
from visadapt.predict.image import Predictor

ARCH = {"depth": 2, "embed_dim": 48, "num_heads": 3, "init_values": 1.0}
IMAGES = torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(1))


def fresh(seed: int = 0) -> Adapted:
    torch.manual_seed(seed)
    return Adapted(TimmViT("vit_small_patch14_dinov2", arch=ARCH)).eval()


def noisy(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


@pytest.fixture
def saved(tmp_path):
    """A file with a LoRA and a head, and the answers they give."""
    adapted = fresh()
    adapted.add("main", LoRA(rank=2, targets=["q", "fc2"]))
    head = LinearHead(3, 48)
    noisy(adapted.adapters)
    path = tmp_path / "a.safetensors"
    adapted.save(path, "main", heads={"main": head}, extra={"classes": ["x", "y", "z"]})
    return path, adapted(IMAGES).native, head


def outputs(adapted: Adapted) -> torch.Tensor:
    with torch.no_grad():
        return adapted(IMAGES).native


def test_round_trip_with_head(saved):
    path, expected, head = saved
    other, empty = fresh(), LinearHead(3, 48)
    report = other.load(path, heads={"main": empty})
    assert torch.equal(outputs(other), expected) and torch.equal(empty.fc.weight, head.fc.weight)
    assert report.probe_error == 0 and not report.unexpected
    assert all(not k.startswith("adapters") for k in report.expected_missing) and len(report.expected_missing) > 10
    assert other.load(path).unexpected == ["heads/main/fc.bias", "heads/main/fc.weight"]


def test_a_head_of_the_users_own_is_kept_and_said_to_be_unknown(saved, tmp_path, capsys):
    adapted, head, empty = fresh(), torch.nn.Linear(48, 3), torch.nn.Linear(48, 3)
    adapted.add("main", LoRA(rank=2))
    adapted.save(tmp_path / "own.safetensors", heads={"main": head}, extra={"task": {"type": "ImageClassifier"}})
    adapted.load(tmp_path / "own.safetensors", heads={"main": empty})
    assert torch.equal(empty.weight, head.weight)
    assert main(["info", str(tmp_path / "own.safetensors")]) == 0
    assert "main: Linear(…), 147 parameters" in capsys.readouterr().out
    with pytest.raises(InputError, match="head Linear, which is no registered one"):
        Predictor(tmp_path / "own.safetensors")


def test_manifest_lists_every_tensor_and_nothing_of_the_base(saved):
    path, _, _ = saved
    manifest, tensors = read_manifest(path), load_file(path)
    assert set(manifest["tensors"]) == set(tensors)
    assert {k.split("/")[0] for k in tensors} == {"adapters", "heads", "probe"}
    assert manifest["adapters"]["main"]["arguments"]["targets"] == ["q", "fc2"]
    assert manifest["classes"] == ["x", "y", "z"]
    assert manifest["adapters"]["main"]["sites"][0]["key"] == "trunk_00_q"


def test_another_base_is_refused_with_both_fingerprints(saved):
    path, _, _ = saved
    other = fresh(seed=1)
    with pytest.raises(InputError, match=r"fingerprint [0-9a-f]{12}; this backbone has [0-9a-f]{12}"):
        other.load(path)
    assert not other.adapters


def test_fingerprint_does_not_follow_merging_or_training(saved):
    path, expected, _ = saved
    adapted = fresh()
    adapted.add("full", FullFineTune())
    for parameter in adapted.backbone.parameters():
        parameter.data.add_(0.01)
    adapted.enable()
    adapted.load(path)
    adapted.enable("main")
    assert torch.equal(outputs(adapted), expected)


def test_truncated_file(saved, tmp_path):
    path, _, _ = saved
    content = path.read_bytes()
    for cut in (4, 200, len(content) - 50):
        (tmp_path / "cut.safetensors").write_bytes(content[:cut])
        with pytest.raises(InputError, match="cut off"):
            fresh().load(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("what", ["tensor", "manifest"])
def test_altered_file(saved, tmp_path, what):
    path, _, _ = saved
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        manifest = json.loads(file.metadata()["visadapt"])
    if what == "tensor":
        tensors["adapters/main/trunk_00_q/a"][0, 0] += 1e-3
    else:
        manifest["classes"] = ["y", "x", "z"]
    save_file(tensors, tmp_path / "b.safetensors", metadata={"visadapt": json.dumps(manifest)})
    other = fresh()
    with pytest.raises(InputError, match="checksum"):
        other.load(tmp_path / "b.safetensors")
    assert not other.adapters


def test_other_files_are_no_adapter_files(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_text("hello")
    for name, message in (
        ("x", "without a visadapt manifest"),
        ("y", "no complete adapter file"),
        ("z", "no adapter file"),
    ):
        with pytest.raises(InputError, match=message):
            fresh().load(tmp_path / f"{name}.safetensors")


def test_same_name_with_another_type_is_refused(saved):
    path, _, _ = saved
    adapted = fresh()
    adapted.add("main", AdaptFormer(width=2))
    before = outputs(adapted)
    with pytest.raises(InputError, match="here it is AdaptFormer"):
        adapted.load(path)
    assert torch.equal(outputs(adapted), before)


def test_a_failing_write_leaves_the_old_file(saved, monkeypatch):
    path, _, _ = saved
    before = path.read_bytes()
    adapted = fresh()
    adapted.add("main", LoRA())

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("visadapt.core.io.save_file", full)
    with pytest.raises(InputError, match="no space left on device; the file that was there is intact"):
        adapted.save(path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_saving_changes_neither_modes_switches_nor_random_numbers(saved, tmp_path):
    adapted = fresh()
    adapted.add("a", LoRA(dropout=0.5))
    adapted.add("b", LoRA())
    adapted.enable("b", scale=0.5)
    adapted.train()
    state = torch.random.get_rng_state()
    adapted.save(tmp_path / "a.safetensors", "a")
    assert torch.equal(state, torch.random.get_rng_state())
    assert adapted.adapters["a"].training and not adapted.backbone.training
    assert not adapted.is_enabled("a") and all(p.scale == 0.5 for p in adapted.pieces("b"))


def test_merged_adapters_are_not_saved(saved, tmp_path):
    path, _, _ = saved
    adapted = fresh()
    adapted.load(path)
    adapted.merge()
    with pytest.raises(InputError, match="unmerge before saving"):
        adapted.save(tmp_path / "m.safetensors")
