"""The norm check of attention projections."""

from __future__ import annotations

import math

import pytest
import torch
from cases import TINY

from visadapt.adapters.lora import LoRA
from visadapt.benchmark.norms import attention_norms
from visadapt.cli import main
from visadapt.core.adapted import Adapted
from visadapt.testing import noise, tiny_backbone


@pytest.fixture
def adapted():
    adapted = Adapted(tiny_backbone(TINY["vit"])).eval()
    adapted.add("a", LoRA(rank=2, targets=["q", "v"]))
    noise(adapted.adapters)
    return adapted


def test_norms_equal_their_definition_and_grow_with_the_scale(adapted):
    images = torch.randn(2, 3, 28, 42)
    rows = attention_norms(adapted, images)
    assert [r["layer"] for r in rows] == [0, 1] and all(r["tokens"] == 7 for r in rows)
    kept = []
    qkv = adapted.backbone.body.blocks[0].attn.qkv
    handle = qkv.register_forward_pre_hook(lambda m, args: kept.append(args[0]))
    with torch.no_grad():
        adapted(images)
        handle.remove()
        pieces = adapted.adapters["a"].pieces
        change = max((kept[0] @ pieces[f"trunk_00_{r}"].delta().T).abs().max().item() for r in "qv")
        base = (kept[0] @ qkv.weight.T + qkv.bias).abs().max().item()
    assert rows[0]["change"] == pytest.approx(change / math.sqrt(math.log(7)), rel=1e-4)
    assert rows[0]["base"] == pytest.approx(base / math.sqrt(math.log(7)), rel=1e-4)
    adapted.enable("a", scale=3.0)
    tripled = attention_norms(adapted, images)
    assert tripled[0]["change"] == pytest.approx(3 * rows[0]["change"], rel=1e-3)  # the first layer sees the same input
    with adapted.disabled():
        assert all(r["change"] == 0 and r["adapted"] == r["base"] for r in attention_norms(adapted, images))


def test_norms_need_a_config(capsys):
    assert main(["sites", "test_vit", "--norms"]) == 2
    assert "--norms needs a config" in capsys.readouterr().err
