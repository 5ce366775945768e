"""Published adapters with their heads become adapter files that predict the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from visadapt.cli import main
from visadapt.predict.mask import MaskPredictor
from visadapt.registry import TASKS
from visadapt.testing import assert_close, noise

ARCH = dict(depth=4, embed_dim=32, num_heads=2, img_size=32, init_values=1.0, patch_size=16)
HEAD = dict(width=32, queries=5, heads=4, encoder_layers=1, decoder_layers=1, encoder_hidden=16, decoder_hidden=16)
CONFIG = """
model = dict(
    type="Segmenter",
    backbone=dict(type="TimmViT", name="vit_small_patch14_dinov2", weights="{base}", arch={arch},
                  out_indices=[0, 1, 2, 3]),
    neck=dict(type="Pyramid"),
    adapters=dict(main=dict(type="{name}", {arguments})),
    head=dict(type="Mask2FormerHead", num_classes=2, linked_queries={linked}, {head}),
)
val_dataloader = dict(dataset=dict(type="HRC_WHU", split="test"))
val_evaluator = dict(type="SegmentationMetric")
val_cfg = dict()
"""


def rein_names(adapter):
    """The official state of a Rein."""
    shared = adapter.common.state_dict()
    renamed = {"refiner.strength": "scale", "refiner.value": "mlp_token2feat", "refiner.out": "mlp_delta_f"}
    renamed |= {"link.project": "transform", "link.merge": "merge"}
    state = {
        re.sub(rf"^({'|'.join(map(re.escape, renamed))})", lambda m: renamed[m[1]], k): v for k, v in shared.items()
    }
    pieces = [*adapter.pieces.values()]
    return state | {f"learnable_tokens_{n}": torch.stack([getattr(p, n).data for p in pieces]) for n in "ab"}


@pytest.fixture
def published(tmp_path):
    """A task with a trained Rein and head, its config, and the file that the official code would write."""
    torch.manual_seed(0)
    arguments = "length=5, rank=2, query_dim=32"
    head = ", ".join(f"{k}={v}" for k, v in HEAD.items())
    body = TASKS.build(
        dict(
            type="Segmenter",
            backbone=dict(type="TimmViT", name="vit_small_patch14_dinov2", arch=ARCH, out_indices=[0, 1, 2, 3]),
            neck=dict(type="Pyramid"),
            adapters=dict(main=dict(type="Rein", length=5, rank=2, query_dim=32)),
            head=dict(type="Mask2FormerHead", num_classes=2, linked_queries=True, **HEAD),
        )
    ).eval()
    base = tmp_path / "base.safetensors"
    save_file(body.adapted.backbone.body.state_dict(), base)
    noise(body.adapted.adapters)
    noise(body.head, std=0.05)
    state = {f"backbone.reins.{k}": v for k, v in rein_names(body.adapted.adapters["main"]).items()}
    state |= {f"decode_head.{k}": v for k, v in body.head.state_dict().items()}
    state["decode_head.loss_cls.class_weight"] = torch.ones(3)
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "official.pth")
    made = dict(base=base, arch=ARCH, name="Rein", arguments=arguments, head=head, linked=True)
    (tmp_path / "config.py").write_text(CONFIG.format(**made))
    return body, tmp_path


def convert(folder: Path, file: str = "official.pth") -> int:
    return main(
        ["convert", str(folder / file), "--config", str(folder / "config.py"), "--out", str(folder / "a.safetensors")]
    )


def test_converted_file_predicts_as_the_published_model(published):
    task, folder = published
    assert convert(folder) == 0
    predictor = MaskPredictor(folder / "a.safetensors", merge=False)
    images = torch.randint(0, 256, (1, 3, 64, 96)).float()
    with torch.no_grad():
        wanted = task.scores(task.data_preprocessor.normalize(images))
        assert_close(predictor.score(images), wanted)
    assert predictor.classes == ["clear sky", "cloud"] and predictor.palette is not None


def test_what_does_not_fit_is_refused(published, capsys):
    _, folder = published
    state = torch.load(folder / "official.pth", weights_only=True)["state_dict"]
    cut = {k: v for k, v in state.items() if k != "decode_head.cls_embed.bias"}
    torch.save(cut, folder / "cut.pth")
    assert convert(folder, "cut.pth") == 2 and "lacks cls_embed.bias" in capsys.readouterr().err
    bare = {k: v for k, v in state.items() if not k.startswith("decode_head.")}
    torch.save(bare, folder / "bare.pth")
    assert convert(folder, "bare.pth") == 2 and "no head" in capsys.readouterr().err
    text = (folder / "config.py").read_text()
    (folder / "config.py").write_text(text.replace("length=5", "length=6"))
    assert convert(folder) == 2 and "other shapes for" in capsys.readouterr().err
    (folder / "config.py").write_text(text.replace("dict(main=", 'dict(norm=dict(type="LayerNormTuning"), main='))
    assert convert(folder) == 2 and "one adapter, the config 2" in capsys.readouterr().err
    (folder / "config.py").write_text(
        text.replace('"Rein", length=5, rank=2, query_dim=32', '"LoRA"').replace(
            "linked_queries=True", "linked_queries=False"
        )
    )
    assert convert(folder) == 2 and "no published layout is known for 'LoRA'" in capsys.readouterr().err
