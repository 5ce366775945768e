"""Adapter files: what is in them, and what happens to damaged or wrong ones."""

from __future__ import annotations

import json
import random
import re

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
from visadapt.core import io
from visadapt.core.adapted import Adapted
from visadapt.core.io import read_manifest
from visadapt.core.manifest import NEEDED
from visadapt.heads.linear import LinearHead
from visadapt.heads.segment import LinearSegHead
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


# ---- files from strangers --------------------------------------------------------------------------------------------
def forge(path, target, change=lambda manifest: None, tensors=None) -> None:
    """A file with another manifest, checksum and all: what a stranger can write, not what damage does."""
    tensors = tensors or load_file(path)
    with safe_open(path, "pt") as file:
        manifest = json.loads(file.metadata()["visadapt"])
    manifest["tensors"] = io._listed(tensors)
    manifest = change(manifest) or manifest
    if isinstance(manifest, dict):
        manifest["sha256"] = io._checksum(manifest, tensors)
    save_file(tensors, target, metadata={"visadapt": manifest if isinstance(manifest, str) else json.dumps(manifest)})


def refusal(call, *args) -> str:
    """The one line that something is refused with."""
    with pytest.raises(InputError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def of_a_run(saved, tmp_path):
    """A file with all that predict needs, but for the weights of its base."""
    path = tmp_path / "run.safetensors"
    extra = {"task": {"type": "ImageClassifier", "pool": "native"}, "channels": 3, "transforms": []}
    forge(saved[0], path, lambda manifest: manifest.update(extra))
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda m, call: m["backbone"].update(call),
        lambda m, call: m["adapters"]["main"].update(call),
        lambda m, call: m["heads"]["main"].update(call),
        lambda m, call: m["task"].update(type="os.system", command="touch ran"),
        lambda m, call: m["task"].update(loss={"type": "os.system", "command": "touch ran"}),
        lambda m, call: m["task"].update(adapters={"x": {"type": "os.system", "command": "touch ran"}}),
    ],
    ids=["backbone", "adapter", "head", "task", "loss", "task-adapter"],
)
def test_a_file_names_no_code_to_run(of_a_run, tmp_path, monkeypatch, change):
    """A dotted path would be imported and called; in a config it may be, in a file from elsewhere it may not."""
    monkeypatch.chdir(tmp_path)
    call = {"type": "os.system", "arguments": {"command": "touch ran"}}
    forge(of_a_run, tmp_path / "f.safetensors", lambda m: change(m, call))
    for read in (Predictor, read_manifest, fresh().load):
        assert "'os.system' is no registered name" in refusal(read, tmp_path / "f.safetensors")
    assert main(["merge", str(tmp_path / "f.safetensors"), "--out", "m.safetensors"]) == 2
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((lambda m, key=key: m.pop(key) and None, f"{key} is missing") for key in NEEDED if key != "sha256"),
        (lambda m: m["adapters"]["main"].pop("arguments") and None, "adapters.main.arguments is missing"),
        (lambda m: m["backbone"].pop("fingerprint") and None, "backbone.fingerprint is missing"),
        (lambda m: m.update(heads=[]), r"heads is \[\]"),
        (lambda m: m.update(classes=[1]), "classes.0 is 1"),
        (lambda m: m["adapters"]["main"].update(sites=[3]), "adapters.main.sites.0 is 3"),
        (lambda m: m.update(format=True), "format is True"),
        (lambda m: m.update(format=2, visadapt="9.0"), r"has format 2, written by visadapt 9\.0; .*upgrade"),
        (lambda m: "[]", "it is no JSON object"),
        (lambda m: '{"format"', "damaged manifest"),
        (lambda m: "[" * 9999, "damaged manifest"),
    ],
)
def test_manifests_that_lack_something_or_come_from_the_future(of_a_run, tmp_path, change, message, capsys):
    path = tmp_path / "f.safetensors"
    forge(of_a_run, path, change)
    for read in (fresh().load, Predictor):
        assert re.search(message, refusal(read, path))
    assert main(["info", str(path)]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("key", ["classes", "channels", "transforms", "heads"])
def test_predict_needs_what_a_run_writes(of_a_run, tmp_path, key):
    path = tmp_path / "f.safetensors"
    forge(of_a_run, path, lambda m: m["heads"].clear() if key == "heads" else m.pop(key) and None)
    assert "predict needs the file of a training run" in refusal(Predictor, path)


def test_a_probe_that_does_not_fit(saved, tmp_path):
    tensors = load_file(saved[0])
    for probe, message in (
        (torch.zeros(3), "its probe has 3 values, this backbone gives 48"),
        (None, "no probe/output"),
    ):
        changed = tensors | {"probe/output": probe}
        changed = {name: value for name, value in changed.items() if value is not None}
        forge(saved[0], tmp_path / "f.safetensors", tensors=changed)
        other = fresh()
        assert message in refusal(other.load, tmp_path / "f.safetensors") and not other.adapters


def test_another_type_of_the_same_bytes_is_an_alteration(saved, tmp_path, capsys):
    """Only the header says whether four bytes are a float or an integer."""
    content = saved[0].read_bytes()
    assert content.count(b'"dtype":"F32"') > 3
    path = tmp_path / "f.safetensors"
    path.write_bytes(content.replace(b'"dtype":"F32"', b'"dtype":"I32"', 1))
    assert "does not match its checksum" in refusal(fresh().load, path)
    assert main(["info", str(path)]) == 2 and "does not match its checksum" in capsys.readouterr().err


def test_damage_anywhere_is_refused_in_one_line(saved, tmp_path, capsys):
    """Flipped bytes and cut-off ends, by `Adapted.load` and by `visadapt info`."""
    path, content, draw = tmp_path / "f.safetensors", saved[0].read_bytes(), random.Random(0)
    adapted, whole = fresh(), io.read_tensors(saved[0], io.read_manifest(saved[0]))
    flips = [(i, 1 << draw.randrange(8)) for i in (*range(8), *(draw.randrange(len(content)) for _ in range(90)))]
    damaged = [content[:i] + bytes([content[i] ^ mask]) + content[i + 1 :] for i, mask in flips]
    damaged += [content[: draw.randrange(len(content))] for _ in range(30)]
    for bad in damaged:
        path.write_bytes(bad)
        code = main(["info", str(path)])
        said = capsys.readouterr()
        if code == 0:  # blanks between the entries of the header carry nothing
            read = io.read_tensors(path, io.read_manifest(path))
            assert read.keys() == whole.keys() and all(torch.equal(read[k], whole[k]) for k in whole)
            continue
        assert code == 2 and said.err.count("\n") == 1 and said.err.startswith("visadapt: error: ")
        assert refusal(adapted.load, path) and not adapted.adapters


def test_info_of_a_head_with_batch_norm_and_of_long_keys(tmp_path, capsys):
    head, path = LinearSegHead(3, [48, 48]), tmp_path / "a.safetensors"
    fresh().save(path, heads={"main": head}, extra={"file_bands": ["B1", "B2"]})
    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"LinearSegHead(num_classes=3), {sum(p.numel() for p in head.parameters()):,} parameters" in out
    assert "\nfile_bands 2: B1, B2\n" in out
