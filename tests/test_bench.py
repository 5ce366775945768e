"""The speed benchmark gives the figures that scripts read, from tiny models here."""

from __future__ import annotations

import json

import pytest
import torch
from small import Ops

from visadapt.adapters import VIT_B
from visadapt.backbones.timm_vit import TimmViT
from visadapt.benchmark.attention import explicit
from visadapt.benchmark.methods import adapted_with, measure_methods, textbook
from visadapt.benchmark.parameters import MODEL, trainable
from visadapt.benchmark.report.zoo import zoo_rows
from visadapt.benchmark.setup import Setup
from visadapt.benchmark.timing import ratio, spread
from visadapt.cli import main
from visadapt.registry import ADAPTERS
from visadapt.testing import assert_close

ALWAYS = {
    *("lora_step_over_floor", "full_step_over_floor", "merged_over_base", "mixed_over_base", "switch_ms"),
    *("shira_switch_over_lora_fuse", "prefix_epoch_speedup"),
    *("cached_epoch_speedup", "runner_over_loop", "machine", "torch", "timm", "visadapt", "step_spread"),
}
WITH_PEFT = {"peft_step_over_floor", "lora_peak_over_peft", "peft_mixed_over_base", "peft_switch_ms"}


@pytest.mark.peft
def test_speed_gives_all_figures(capsys, tmp_path):
    pytest.importorskip("peft")
    small = ["--model", "test_vit", "--size", "32", "--batch", "2", "--mixed", "2", "--rounds", "1", "--method"]
    small += ["LoRA", "AdaptFormer", "SNELLA"]
    assert main(["bench", "speed", *small, "--json", "--out", str(tmp_path / "speed.json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) >= ALWAYS | WITH_PEFT and found["methods"].keys() == {"LoRA", "AdaptFormer", "SNELLA"}
    assert all(found[k] > 0 for k in (ALWAYS | WITH_PEFT) if isinstance(found[k], float) and k != "step_spread")
    assert json.loads((tmp_path / "speed.json").read_text()) == found

    rows = found["methods"]
    alone = {"step_over_floor", "step_over_flops", "peak_over_floor"}
    assert set(rows["AdaptFormer"]) == alone  # nothing to compare it with
    assert {k for k, v in rows["LoRA"].items() if v > 0} == alone | {
        f"{k}_over_{o}" for k in ("step", "peak") for o in ("peft", "textbook")
    }
    assert set(rows["SNELLA"]) == alone | {"step_over_textbook", "peak_over_textbook"}


@pytest.mark.parametrize("method", ["LoRA", "SHiRA", "SALT", "SNELL", "IncreLoRA"])
def test_textbook_computes_the_same(method):
    """A reference for speed must do the same work: equal outputs and gradients."""
    setup = Setup("test_vit", 32, 2)
    cfg = {"type": method, "targets": ["q", "fc2"]}
    found = []
    for plain in (False, True):
        torch.manual_seed(0)
        adapted = adapted_with(setup, cfg).double()
        torch.manual_seed(1)
        output = (textbook(adapted) if plain else adapted)(setup.images(2).double()).native
        output.square().sum().backward()
        found.append([output, *(p.grad for p in adapted.adapters.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 4
    for ours, reference in zip(*found):
        torch.testing.assert_close(ours, reference)


def test_a_method_that_cannot_be_measured_says_why_and_stops_no_other():
    rows = measure_methods(Setup("test_vit", 32, 2, rounds=1), ["PEFT", "BitFit"])
    assert rows["PEFT"] == {"not_measured": "PEFT needs the argument tuner"} and rows["BitFit"]["step_over_floor"] > 0


def test_unknown_method(capsys):
    assert main(["bench", "speed", "--method", "LoRa"]) == 2
    assert "LoRA" in capsys.readouterr().err


@torch.no_grad()
def test_attention_is_compared_with_a_softmax_written_out():
    setup, x = Setup(model="test_vit", size=32), torch.randn(2, 5, 64)
    attention = explicit(setup, "blocks.1.attn").backbone.body.blocks[1].attn
    with Ops() as ops:
        y = attention(x)
    names = [name for name, _ in ops.all]
    assert "aten::_softmax" in names and not any("scaled_dot_product" in name for name in names)
    assert_close(y, setup.backbone().body.blocks[1].attn(x))


def test_ratios_are_taken_within_rounds():
    """A machine that slows down to half its speed changes no ratio."""
    times = {"a": [1.0, 2.0, 2.0], "b": [2.0, 4.0, 4.0], "c": [1.0, 2.0, 2.2]}
    assert ratio(times, "b", "a") == 2 and spread(times, "c", "a") == 0


def test_zoo_rows_join_seeds_and_keep_settings_apart():
    line = dict(config="configs/x/x_y_task-1.py", overrides=[], version="1", task="task-1", method="M", metric="top1")
    line |= dict(train_images=5, test_images=6, trainable_params=1000, stored_bytes=2_000_000, seconds=60)
    results = [line | dict(seed=s, value=v) for s, v in ((0, 0.8), (1, 0.9))]
    results.append(line | dict(seed=0, value=0.5, overrides=["a=1"]))
    one, two = zoo_rows(results)
    assert (one["%"], one["seeds"], one["file"]) == ("85.0 ± 7.1", "0 1", "2.00 MB")
    assert two["%"] == "50.0" and "a=1" in two["command"] and two["method"] == "M (x)"
    assert one["epochs"] == "-"
    results[0] |= dict(config="configs/m/m_y_4e_task-1.py")
    assert zoo_rows(results[:1])[0]["epochs"] == "4"
    results[0] |= dict(overrides=["train_cfg.max_epochs=2"])
    assert zoo_rows(results[:1])[0]["epochs"] == "2"
    assert zoo_rows(results[:1])[0]["method"] == "M"


def test_counts_on_a_vit_b_are_there_for_every_method_that_needs_no_argument():
    assert set(ADAPTERS.names()) - set(json.loads(VIT_B.read_text())) == {"PEFT", "ConvLoRA"}


@pytest.mark.parametrize("name", ["AdaptFormer", "Hydra", "LoRA", "MoSA", "SSF", "VPT"])
def test_counts_on_a_vit_b_are_those_of_the_code(name):
    """Of methods that make nothing of the weights; `visadapt bench parameters` writes all of them anew."""
    with torch.device("meta"):
        assert trainable(TimmViT(MODEL), ADAPTERS.build({"type": name})) == json.loads(VIT_B.read_text())[name]
