"""Strict configs: what is read, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmengine.registry import DATASETS as ENGINE_DATASETS

from visadapt import config
from visadapt.errors import InputError
from visadapt.registry import TASKS

GOOD = """
from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR
from torch.optim import AdamW

from visadapt.adapters.lora import LoRA
from visadapt.backbones.timm_vit import TimmViT
from visadapt.datasets.base import collate
from visadapt.datasets.digits import Digits
from visadapt.datasets.sampler import EpochSampler
from visadapt.heads.linear import LinearHead
from visadapt.optim.wrapper import AutocastOptimWrapper
from visadapt.tasks.classify import ImageClassifier

with read_base():
    from .base import *

size = 32
model = dict(
    type=ImageClassifier,
    backbone=dict(type=TimmViT, name="test_vit"),
    adapters=dict(second=dict(type=LoRA, rank=2, dropout=0.0), first=dict(type=LoRA, rank=4, targets=["q"])),
    head=dict(type=LinearHead, num_classes=10),
)
train_dataloader = dict(
    batch_size=4,
    dataset=dict(type=Digits, split="train", transform=[dict(type="Resize", height=size, width=size)]),
    sampler=dict(type=EpochSampler, shuffle=True),
    collate_fn=dict(type=collate),
)
train_cfg = dict(by_epoch=True, max_epochs=1)
optim_wrapper = dict(
    type=AutocastOptimWrapper, optimizer=dict(type=AdamW, lr=1e-3), paramwise_cfg=dict(layer_decay=0.5)
)
param_scheduler = dict(type=CosineAnnealingLR, T_max=6, by_epoch=True, convert_to_iter_based=True)
"""
BASE = """
from mmengine.hooks import LoggerHook

default_hooks = dict(logger=dict(type=LoggerHook, interval=10, priority="LOW"))
randomness = dict(seed=0)
work_dir = "runs"
experiment_name = None
"""


@pytest.fixture
def write(tmp_path: Path):
    """Write the good config, with replacements, beside its base."""

    def written(*changes: tuple[str, str]) -> Path:
        text = GOOD
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "base.py").write_text(BASE)
        path = tmp_path / "good.py"
        path.write_text(text)
        return path

    return written


def problem(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        config.load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message and path.name in message
    return message


def test_types_are_names_and_locals_are_gone(write):
    cfg = config.load(write())
    assert cfg.model.type == "visadapt.tasks.classify.ImageClassifier"
    assert cfg.optim_wrapper.optimizer.type == "torch.optim.AdamW"
    assert cfg.train_dataloader.dataset.transform[0] == {"type": "Resize", "height": 32, "width": 32}
    assert cfg.randomness.seed == 0
    assert not {"size", "LoRA", "read_base", "LoggerHook"} & set(cfg.keys())


def test_what_is_read_can_be_built(write):
    cfg = config.load(write(), ["model.adapters.first.rank=3"])
    task = TASKS.build(cfg.model)
    assert task.adapted.adapters["first"].rank == 3
    assert len(ENGINE_DATASETS.build(cfg.train_dataloader.dataset)) == 500


@pytest.mark.parametrize("dump", [config.dump, lambda cfg, path: cfg.dump(str(path))], ids=["ours", "mmengine"])
def test_a_dumped_config_reads_the_same(write, tmp_path, dump):
    cfg = config.load(write(), ["optim_wrapper.optimizer.lr=0.5"])
    dump(cfg, tmp_path / "resolved.py")
    assert config.load(tmp_path / "resolved.py").to_dict() == cfg.to_dict()


def test_our_dump_keeps_the_order_of_adapters(write, tmp_path):
    config.dump(config.load(write()), tmp_path / "resolved.py")
    assert list(config.load(tmp_path / "resolved.py").model.adapters) == ["second", "first"]


def test_all_problems_are_told_at_once(write):
    path = write(("rank=2", "rnak=2"), ("size = 32\n", "size = 32\nmodle = 3\n"), ("T_max", "Tmax"))
    message = problem(path, "optim_wrapper.optimzer.lr=1")
    for part in (
        "unknown top-level key 'modle' (did you mean 'model'?)",
        "model.adapters.second: LoRA has no argument 'rnak' (did you mean 'rank'?)",
        "param_scheduler: CosineAnnealingLR has no argument 'Tmax' (did you mean 'T_max'?)",
        "override 'optim_wrapper.optimzer.lr': no key 'optimzer' under 'optim_wrapper' (did you mean 'optimizer'?)",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("shuffle=True", "shufle=True"), "train_dataloader.sampler: EpochSampler has no argument 'shufle'"),
        (("batch_size=4", "batchsize=4"), "train_dataloader: DataLoader has no argument 'batchsize'"),
        (("max_epochs=1", "max_epoch=1"), "train_cfg: EpochBasedTrainLoop has no argument 'max_epoch'"),
        (("size = 32", "size = 32\nrandomness = dict(sed=1)"), "randomness: set_randomness has no argument 'sed'"),
        (("lr=1e-3", "lrr=1e-3"), "optim_wrapper.optimizer: AdamW has no argument 'lrr'"),
        (
            ("type=LoRA, rank=4", "type='LoRa', rank=4"),
            "model.adapters.first: unknown adapter 'LoRa' (did you mean 'LoRA'",
        ),
        (("type=AdamW", "type='AdmaW'"), "optim_wrapper.optimizer: unknown optimizer 'AdmaW' (did you mean 'AdamW'"),
        (
            ("type=LinearHead", "type='visadapt.heads.linear.Nope'"),
            "model.head: type 'visadapt.heads.linear.Nope' cannot be",
        ),
        (
            ("lora import LoRA", "lorra import LoRA"),
            "model.adapters.second: type 'visadapt.adapters.lorra.LoRA' cannot be",
        ),
        (("type=ImageClassifier,", ""), "a config needs model=dict(type=...)"),
        (("train_cfg =", "val_cfg = dict()\ntrain_cfg ="), "val_dataloader and val_evaluator is missing"),
        (("size = 32", "size = 32\n_base_ = ['x.py']"), "unknown top-level key '_base_'"),
        (("rank=4", "rank=4, layers=print"), "model.adapters.first.layers: a config holds plain values"),
        (("rank=4", "rank='four'"), "model.adapters.first: LoRA takes rank as int, got 'four'"),
        (("rank=4", "rank=4, layers=1"), "LoRA takes layers as Sequence[int] | None, got 1"),
        (("rank=4", "rank=4, layers=[0.5]"), "LoRA takes layers as Sequence[int] | None, got [0.5]"),
        (
            ("type=LoRA, rank=4", "type=LinearHead, num_classes=4"),
            "LinearHead is one of the heads, not of the",
        ),
        (("type=LinearHead, num_classes=10", "type=LoRA"), "model.head: LoRA is one of the adapters, not of the heads"),
        (("max_epochs=1", "max_epochs=0"), "train_cfg.max_epochs must be a whole number of at least 1, got 0"),
        (
            ("max_epochs=1", "max_epochs=1, val_interval=0"),
            "train_cfg.val_interval must be a whole number",
        ),
        (("size = 32", "size = 32\nload_from = 'a.pth'"), "load_from does nothing in a config; use --resume FILE"),
        (("size = 32", "size = 32\nresume = True"), "resume does nothing in a config; use --resume"),
        (("size = 32", "size = 32\nlog_level = 'INFO'"), "unknown top-level key 'log_level'"),
        (("paramwise_cfg", "constructor='TrainableGroup', paramwise_cfg"), "unknown constructor 'TrainableGroup'"),
        (
            ("paramwise_cfg", "clip_grad=dict(max_nrm=1.0), paramwise_cfg"),
            "optim_wrapper.clip_grad: clip_grad_norm_ has no argument 'max_nrm' (did you mean 'max_norm'?)",
        ),
    ],
)
def test_one_mistake(write, change, message):
    assert message in problem(write(change))


def test_short_names_of_ours_become_dotted(write):
    cfg = config.load(write(("type=LoRA, rank=2", "type='LoRA', rank=2")))
    assert cfg.model.adapters.second.type == "visadapt.adapters.lora.LoRA"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim_wrapper.optimizer.lr=1", 1.0),
        ("optim_wrapper.optimizer.weight_decay=0.1", 0.1),
        ("train_dataloader.batch_size=8", 8),
        ("train_dataloader.num_workers=2", 2),
        ("train_dataloader.dataset.transform.0.height=64", 64),
        ("train_dataloader.sampler.shuffle=False", False),
        ("model.adapters.first.targets=['k','v']", ["k", "v"]),
        ("model.adapters.first.targets=('k',)", ["k"]),
        ("model.backbone.name=vit_tiny_patch16_224", "vit_tiny_patch16_224"),
        ("work_dir=2024", "2024"),
        ("work_dir=a=b", "a=b"),
        ("experiment_name=some/name", "some/name"),
        ("find_unused_parameters=True", True),
    ],
)
def test_overrides(write, override, value):
    found = config.load(write(), [override])
    for part in override.partition("=")[0].split("."):
        found = found[int(part)] if part.isdigit() else found[part]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train_dataloader.batch_size=8.0", "it is the int 4 and cannot become 8.0"),
        ("train_dataloader.batch_size=True", "cannot become True"),
        ("train_dataloader.sampler.shuffle=1", "it is the bool True and cannot become 1"),
        ("model.adapters.first.targets=q", "it is the list ['q'] and cannot become q"),
        ("model.adapters.first.targets=[q]", "strings inside need quotes"),
        ("model.head=LinearHead", "cannot become LinearHead"),
        ("model.adapters.first.rnak=3", "no key 'rnak' under 'model.adapters.first' (did you mean 'rank'?)"),
        ("model.adapters.main.rank=3", "no key 'main' under 'model.adapters'; it is one of: first, second"),
        ("modle.head.num_classes=3", "no key 'modle' at the top level (did you mean 'model'?)"),
        ("train_dataloader.dataset.transform.1.height=3", "no entry 1 under 'train_dataloader.dataset.transform'"),
        ("optim_wrapper.optimizer.lr.x=3", "no key 'x' under 'optim_wrapper.optimizer.lr', which is 0.001"),
        ("size=3", "no key 'size' at the top level"),
        ("model.head.num_classes", "write it as a.b.c=value"),
        ("model.backbone.type=TimVit", "model.backbone: unknown backbone 'TimVit' (did you mean 'TimmViT'?)"),
    ],
)
def test_wrong_overrides(write, override, message):
    assert message in problem(write(), override)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", b"model: 3", "a config is a Python file"),
        ("a.py", b"\x00\xff\x89PNG", "cannot be read as a config"),
        ("a.py", b"model = dict(\n", "cannot be read as a config"),
        ("a.py", b"x = 1\nmodel = undefined\n", "(line 2): NameError"),
        ("a.py", b"import sys\n\nsys.exit(3)\n", "(line 3): SystemExit(3)"),
        ("a.py", b"from torch.nn import Linear\nmodel = Linear(1, 2)\n", "write dict(type=...)"),
        (
            "a.py",
            b"from mmengine.config import read_base\nwith read_base():\n    from .gone import *\n",
            "gone.py not found",
        ),
        ("a.py", b"print('hello')\nx = 3\n", "is no config: it defines neither model"),
        ("a.py", b"", "is no config: it defines neither model"),
    ],
)
def test_files_that_are_no_configs(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in problem(tmp_path / name)


def test_missing_configs_and_folders(tmp_path, write):
    write()
    assert "no config file" in problem(tmp_path / "godo.py") and "'good.py'" in problem(tmp_path / "godo.py")
    assert "is no config" in problem(tmp_path)
