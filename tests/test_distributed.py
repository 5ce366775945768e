"""Two processes with gloo on a tiny model whose head has a batch norm, and whose best adapter is the first one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from safetensors.torch import load_file, save_file

from visadapt import engine
from visadapt.backbones.timm_vit import TimmViT
from visadapt.cli import main
from visadapt.commands.train import train as train_here
from visadapt.core.io import read_manifest
from visadapt.datasets.digits import Digits
from visadapt.errors import InputError

ROOT = Path(__file__).parent.parent
ARCH = {"depth": 2, "embed_dim": 48, "num_heads": 3, "init_values": 1.0}
PIECES = '''
from pathlib import Path

import torch
from mmengine.hooks import Hook
from torch import nn

from visadapt.checkpoint import unwrap
from visadapt.registry import HEADS


@HEADS.register_module()
class NormedHead(nn.Module):
    """Batch norm and one linear layer."""

    def __init__(self, num_classes, in_dim):
        super().__init__()
        self.num_classes, self.in_dim = num_classes, in_dim
        self.norm, self.fc = nn.BatchNorm1d(in_dim), nn.Linear(in_dim, num_classes)

    def forward(self, x):
        return self.fc(self.norm(x))


class Record(Hook):
    """What the head's buffers are in this process after each step, each validation, and training."""

    priority = "LOWEST"

    def before_train(self, runner):
        self.seen = {}

    def keep(self, runner, when):
        self.seen[when] = {n: b.clone() for n, b in unwrap(runner.model).head.named_buffers()}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.keep(runner, f"step {runner.iter + 1}")

    def after_train_epoch(self, runner):
        self.keep(runner, f"epoch {runner.epoch + 1}")

    def after_val_epoch(self, runner, metrics=None):
        self.keep(runner, f"validation {runner.iter}")

    def after_train(self, runner):
        self.keep(runner, "end")
        torch.save(self.seen, Path(runner.work_dir) / f"buffers{runner.rank}.pt")
'''
ITERATIONS = {
    "train_cfg = dict(by_epoch=True, max_epochs=6)": "train_cfg = dict(by_epoch=False, max_iters=7, val_interval=4)",
    "EpochSampler, shuffle=True": "EpochSampler, shuffle=True, endless=True",
    "T_max=6, by_epoch=True, convert_to_iter_based=True": "T_max=7, by_epoch=False",
    "Checkpoints, interval=1, by_epoch=True": "Checkpoints, interval=3, by_epoch=False",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With base weights, the pieces above as a module, and a config for each kind of loop."""
    folder = tmp_path_factory.mktemp("ddp")
    torch.manual_seed(0)
    body = TimmViT("vit_small_patch14_dinov2", arch=ARCH).body
    save_file({k: v.contiguous() for k, v in body.state_dict().items()}, folder / "base.safetensors")
    (folder / "pieces_of_test.py").write_text(PIECES)
    text = (ROOT / "configs/lora/lora_dinov2-s-focus_6e_digits-56.py").read_text()
    changes = {
        'weights="dinov2_vits14_focus"': f'weights="{folder / "base.safetensors"}", arch={ARCH}',
        "height=56, width=56": "height=28, width=28",
        "batch_size=16": "batch_size=50",
        "with read_base():\n    from .._base_.runtime import *\n": "",
        "type=LinearHead": "type=NormedHead",
    }
    text += (ROOT / "configs/_base_/runtime.py").read_text()
    text = "from pieces_of_test import NormedHead, Record\n" + replaced(text, changes)
    text += "custom_hooks = [dict(type=AdapterFiles, monitor='top1', rule='less'), dict(type=Record)]\n"
    (folder / "iterations.py").write_text(replaced(text, ITERATIONS))
    (folder / "epochs.py").write_text(replaced(text, {"max_epochs=6": "max_epochs=2"}))
    return folder


def replaced(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def train(folder: Path, loop: str) -> Path:
    """The folder of a finished run of two processes."""
    run = folder / f"run_{loop}"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PYTHONPATH": str(folder)}
    command = ["sh", "tools/dist_train.sh", str(folder / f"{loop}.py"), "2", "--work-dir", str(run)]
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes; a kill would leave them behind
        process.communicate()
        raise
    assert process.returncode == 0, err[-2000:]
    wrote = [line for line in out.splitlines() if line.startswith("wrote ")]
    assert len(wrote) == len(set(wrote)) > 4  # by one process alone
    return run


def compare(run: Path) -> tuple[dict[str, dict[str, torch.Tensor]], list[str]]:
    """The main process's buffers by the time of their record, and the times at which both processes agree."""
    one, other = (torch.load(run / f"buffers{rank}.pt") for rank in (0, 1))
    assert one.keys() == other.keys()
    return one, [when for when, values in one.items() if all(torch.equal(v, other[when][n]) for n, v in values.items())]


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("loop", "together"),
    [
        ("iterations", ["step 3", "validation 4", "step 6", "validation 7", "epoch 1", "end"]),
        ("epochs", ["epoch 1", "validation 5", "epoch 2", "validation 10", "end"]),
    ],
)
def test_processes_share_buffers_and_the_last_evaluation(folder, loop, together, capsys, monkeypatch):
    run = train(folder, loop)
    recorded, agreed = compare(run)
    assert agreed == together  # and nowhere else: they see other images
    state = torch.load(sorted(run.glob("*.pth"))[-1], weights_only=True)
    written = "step 6" if loop == "iterations" else "epoch 2"
    assert torch.equal(state["state_dict"]["head.norm.running_var"], recorded[written]["norm.running_var"])

    best, last = (read_manifest(run / f"adapter_{which}.safetensors") for which in ("best", "last"))
    assert best["iter"] < last["iter"]
    stored = load_file(run / "adapter_best.safetensors")
    name = next(n for n in stored if n.endswith("norm.running_mean"))
    assert torch.equal(stored[name], recorded[f"validation {best['iter']}"]["norm.running_mean"])

    report, images = json.loads((run / "report.json").read_text()), len(Digits("test"))
    right = sum(row[i] for i, row in enumerate(report["confusion"]))
    assert sum(map(sum, report["confusion"])) == images and right / images == best["metrics"]["top1"]
    assert (run / "predictions.png").exists()
    monkeypatch.syspath_prepend(str(folder))
    words = ["test", str(folder / f"{loop}.py"), str(run / "adapter_best.safetensors"), "--device", "cpu", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == best["metrics"]["top1"]


def test_a_process_that_fails_does_not_wait_for_the_rest(tmp_path, monkeypatch):
    """They may be waiting for its gradients; the group is left, so that they notice."""

    def build(cfg):
        raise InputError("full disk")

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    monkeypatch.setattr(engine, "barrier", lambda: pytest.fail("waits for the others"))
    monkeypatch.setattr(engine, "build_runner", build)
    with pytest.raises(InputError, match="full disk"):
        train_here(Config({}), str(tmp_path / "run"))
    assert not dist.is_initialized()
