"""Our building blocks against recorded runs of the official implementations."""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from cases import CASES

from visadapt.convert.clip_lora import clip_lora_keys
from visadapt.errors import InputError
from visadapt.testing import KITS, Kit, find_kits, shared_kits


def builders():
    """Runs our side of a kit: kit -> (outputs, gradients) by the kit's names; from every module beside the kits."""
    found = {}
    for path in sorted((Path(__file__).parent / "parity").glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"parity_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert not found.keys() & module.BUILDERS.keys(), f"{path}: a second builder for the same kits"
        found |= module.BUILDERS
    return found


BUILDERS = builders()

KITS_HERE = Path(__file__).parent / "parity" / "kits"
FOUND = find_kits(KITS_HERE, shared_kits())


@pytest.mark.parametrize("kit", [k for k in FOUND if k.builder in BUILDERS], ids=lambda k: k.name)
def test_kit(kit):
    kit.compare(*BUILDERS[kit.builder](kit))


def test_kits_without_builder_are_reported(record_property):
    missing = [k.name for k in FOUND if k.builder not in BUILDERS]
    record_property("parity_not_implemented", " ".join(missing))


@pytest.fixture
def shared():
    """The folder with all kits; the large ones are nowhere else."""
    folder = shared_kits()
    if not folder.is_dir():
        assert KITS not in os.environ, f"{KITS}={folder} is no folder"
        pytest.skip(f"no folder {folder}; only the kits of tests/parity/kits ran")
    return folder


def test_shared_folder_of_kits_is_used(shared):
    assert {p.stem for p in shared.glob("*.json")} <= {k.name for k in FOUND}


def test_every_kit_named_in_cases_has_a_builder():
    assert {c.kit for c in CASES if c.kit} <= set(BUILDERS)


def test_every_builder_has_a_kit_in_the_repository(shared):
    """But for those whose tensors are too large for it."""
    large = {k.builder for k in FOUND if k.path.with_suffix(".safetensors").stat().st_size > 100_000}
    assert set(BUILDERS) <= {k.builder for k in find_kits(KITS_HERE)} | large


# ---- the harness itself ---------------------------------------------------------------------------------------------
@pytest.fixture
def kit():
    return next(k for k in FOUND if k.name == "cliplora_mha_a")


@pytest.mark.parametrize("group", ["out", "grad"])
def test_harness_sees_a_difference_and_a_missing_tensor(kit, group):
    outputs, gradients = kit.group("out"), kit.group("grad")
    kit.compare(outputs, gradients)
    found = outputs if group == "out" else gradients
    name = sorted(found)[0]
    off = copy.deepcopy(found)
    off[name].view(-1)[0] += 1e-2
    with pytest.raises(AssertionError, match=f"{name} differs"):
        kit.compare(*((off, gradients) if group == "out" else (outputs, off)))
    off = {k: v for k, v in found.items() if k != name}
    with pytest.raises(AssertionError, match=f"{name} is missing"):
        kit.compare(*((off, gradients) if group == "out" else (outputs, off)))


def test_harness_scales_the_tolerance_of_gradients_only(kit):
    big = {"g": torch.full((2,), 1e3)}
    made = Kit(kit.path, {"atol": 1e-4})
    made.__dict__["tensors"] = {"grad/g": big["g"], "out/g": big["g"]}
    near = {"g": big["g"] + 0.05}
    made.compare(big, near)
    with pytest.raises(AssertionError, match="output g differs"):
        made.compare(near, big)


# ---- key map of published files -------------------------------------------------------------------------------------
def published(layers, encoder="both", position="all"):
    pair = {"w_lora_A": torch.zeros(2, 8), "w_lora_B": torch.zeros(8, 2)}
    weights = {f"layer_{i}": {"q_proj": pair, "v_proj": pair} for i in range(layers)}
    return {"weights": weights, "metadata": {"r": 2, "alpha": 1, "encoder": encoder, "position": position}}


def test_clip_lora_file_numbers_text_layers_first():
    keys = clip_lora_keys(published(24))
    assert len(keys) == 48
    assert {"text_00_q", "text_11_v", "trunk_00_q", "trunk_11_v"} <= set(keys)
    assert keys["text_00_q"]["a"].shape == (2, 8)


@pytest.mark.parametrize(("encoder", "part"), [("text", "text"), ("vision", "trunk")])
def test_clip_lora_file_of_one_encoder(encoder, part):
    assert sorted(clip_lora_keys(published(2, encoder))) == [f"{part}_0{i}_{r}" for i in (0, 1) for r in "qv"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (published(2, position="top3"), "position 'top3'"),
        (published(2, encoder="audio"), "encoder 'audio'"),
        ({"q_proj.w_lora_A": torch.zeros(2, 8)}, "one of the two factors for trunk_00_q"),
        ({"c_proj.w_lora_A": torch.zeros(2, 8)}, "'c_proj.w_lora_A'"),
        ({"q_proj.weight": torch.zeros(8, 8)}, "no CLIP-LoRA factors"),
        ({"weights": {"block_0": {}}}, "layer 'block_0'"),
    ],
)
def test_clip_lora_refuses(state, message):
    with pytest.raises(InputError, match=message):
        clip_lora_keys(state)
