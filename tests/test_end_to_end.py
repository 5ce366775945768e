"""The tools as users call them: train, resume, test, predict, merge, info, on a tiny model and real scans."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from visadapt.backbones.timm_vit import TimmViT
from visadapt.cli import main
from visadapt.datasets.digits import Digits

ROOT = Path(__file__).parent.parent
ARCH = {"depth": 2, "embed_dim": 48, "num_heads": 3, "init_values": 1.0}
BOUND = dict(env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A complete config in the form of those that ship, for a tiny random backbone with a weights file."""
    folder = tmp_path_factory.mktemp("e2e")
    torch.manual_seed(0)
    body = TimmViT("vit_small_patch14_dinov2", arch=ARCH).body
    save_file({k: v.contiguous() for k, v in body.state_dict().items()}, folder / "base.safetensors")
    text = (ROOT / "configs/lora/lora_dinov2-s-focus_6e_digits-56.py").read_text()
    text = text.replace('weights="dinov2_vits14_focus"', f'weights="{folder / "base.safetensors"}", arch={ARCH}')
    text = text.replace('targets=["all-linear"]', 'targets=["q", "v"], dropout=0.1').replace("rank=8", "rank=4")
    text = text.replace("height=56, width=56", "height=28, width=28").replace("batch_size=16", "batch_size=50")
    text = text.replace("max_epochs=6", "max_epochs=4")
    text = text.replace("with read_base():\n    from .._base_.runtime import *\n", "")
    text += (ROOT / "configs/_base_/runtime.py").read_text()
    path = folder / "tiny.py"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def run(config) -> Path:
    """A finished run."""
    folder = config.parent / "run"
    assert main(["train", str(config), "--work-dir", str(folder)]) == 0
    return folder


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_last.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def error_line(capsys) -> str:
    captured = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in captured if line.startswith("visadapt: error:")]
    assert len(lines) == 1 and "Traceback" not in "\n".join(captured)
    return lines[0]


def test_run_folder_is_complete(run):
    names = {p.name for p in run.iterdir()}
    assert {"config.py", "environment.json", "metrics.jsonl", "curves.png", "predictions.png", "confusion.png"} <= names
    assert {
        "report.json",
        "adapter_best.safetensors",
        "adapter_last.safetensors",
        "epoch_4.pth",
        "epoch_3.pth",
    } <= names
    assert "epoch_2.pth" not in names
    assert list(run.rglob("events.out.tfevents*"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    accuracies = [line["val/top1"] for line in lines if "val/top1" in line]
    assert len(accuracies) == 4 and accuracies[-1] > 0.3  # chance is 0.1
    assert (run / "adapter_best.safetensors").stat().st_size < 60_000
    assert torch.load(run / "epoch_4.pth", weights_only=True)["meta"]["iter"] == 40


def test_resolved_config_trains_again(run, tmp_path):
    """The dumped config is a config, and the same seed gives the same weights."""
    assert main(["train", str(run / "config.py"), "--work-dir", str(tmp_path / "again")]) == 0
    assert_same(trained(run), trained(tmp_path / "again"))


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param([], id="plain"),
        pytest.param(
            ["optim_wrapper.accumulative_counts=3", "model.mix={'mixup': 0.2, 'cutmix': 1.0}"], id="accumulation-mix"
        ),
    ],
)
def test_resume_is_exact(config, tmp_path, extra):
    """Stopped after two of four epochs and resumed: the same bits as in one go, dropout and mixing included."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    text = config.read_text()
    if extra:
        text = text.replace(
            "    type=AutocastOptimWrapper,", "    type=AutocastOptimWrapper,\n    accumulative_counts=1,"
        )
        text = text.replace("head=dict(", "mix=dict(mixup=0.0, cutmix=0.0),\n    head=dict(")
        text += (
            "\nfrom visadapt.hooks.steps import TrainableEMA\ncustom_hooks += [dict(type=TrainableEMA, momentum=0.1)]\n"
        )
    path = tmp_path / "c.py"
    path.write_text(text)
    overrides = ["optim_wrapper.accumulative_counts=3", "model.mix.mixup=0.2", "model.mix.cutmix=1.0"] if extra else []
    assert main(["train", str(path), *overrides, "--work-dir", str(whole)]) == 0
    shutil.copytree(whole, parts)
    for name in ("epoch_4.pth", "adapter_last.safetensors", "adapter_best.safetensors"):
        (parts / name).unlink()
    assert main(["train", str(path), *overrides, "--work-dir", str(parts), "--resume"]) == 0
    assert_same(trained(whole), trained(parts))
    steps = [json.loads(line)["step"] for line in (parts / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 40


def test_kill_during_checkpoint_and_resume(config, run, tmp_path):
    """kill -9 while a checkpoint is being written: no half file counts, and the resumed run ends the same."""
    folder = tmp_path / "killed"
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import sys, time, torch\n"
        "from visadapt import checkpoint\n"
        "save = torch.save\n"
        "def slowly(content, path):\n"
        "    save(content, path)\n"
        "    if content['meta']['epoch'] == 3:\n"
        "        open(path, 'r+b').truncate(1000)\n"
        "        print('WRITING', flush=True)\n"
        "        time.sleep(60)\n"
        "checkpoint.torch.save = slowly\n"
        "from visadapt.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, str(slow), "train", str(config), "--work-dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=BOUND["env"])
    for line in process.stdout:
        if "WRITING" in line:
            process.send_signal(signal.SIGKILL)
            break
    process.wait(30)
    assert process.returncode == -signal.SIGKILL
    assert sorted(p.name for p in folder.glob("epoch_*.pth")) == ["epoch_1.pth", "epoch_2.pth"]
    result = subprocess.run(
        [sys.executable, "tools/train.py", str(config), "--work-dir", str(folder), "--resume"], **BOUND
    )
    assert result.returncode == 0, result.stderr
    assert "resumed from" in result.stdout and "step 20" in result.stdout
    assert_same(trained(run), trained(folder))


def test_full_disk_keeps_the_last_checkpoint(config, tmp_path, capsys, monkeypatch):
    folder, save = tmp_path / "full", torch.save

    def no_space(content, path):
        if content["meta"]["epoch"] == 2:
            raise OSError(28, "No space left on device")
        save(content, path)

    monkeypatch.setattr("visadapt.checkpoint.torch.save", no_space)
    assert main(["train", str(config), "--work-dir", str(folder)]) == 2
    assert "no space left on device" in error_line(capsys)
    assert [p.name for p in folder.glob("*.pth")] == ["epoch_1.pth"] and not list(folder.glob(".*part*"))
    monkeypatch.undo()
    assert main(["train", str(config), "--work-dir", str(folder), "--resume"]) == 0


def test_nan_loss_stops_and_keeps_good_weights(config, tmp_path, capsys):
    folder = tmp_path / "nan"
    assert main(["train", str(config), "optim_wrapper.optimizer.lr=1e30", "--work-dir", str(folder)]) == 2
    assert "in a row" in error_line(capsys)


def test_earlier_run_is_not_overwritten(config, run, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["train", str(config), "--work-dir", str(run)]) == 2
    assert "--resume" in error_line(capsys)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_test_command_repeats_the_stored_metric(config, run, capsys, tmp_path):
    assert main(["test", str(config), str(run / "adapter_best.safetensors"), "--json", "--out", str(tmp_path)]) == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[0])
    assert metrics["images"] == 500
    assert main(["info", str(run / "adapter_best.safetensors"), "--json"]) == 0
    stored = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics["top1"] == pytest.approx(stored["top1"], abs=1e-9)
    assert (tmp_path / "confusion.png").exists()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Real scans as files of several sizes, one damaged and one that is no image."""
    import cv2

    folder = tmp_path_factory.mktemp("images")
    data = Digits("test")
    for i in range(6):
        cv2.imwrite(str(folder / f"{data.labels[i]}_{i}.png"), data.load(i)[: 8 - i % 2])
    whole = (folder / f"{data.labels[0]}_0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("no image")
    return folder


def test_predict_equals_the_trained_task(config, run, images, tmp_path):
    result = subprocess.run(
        [
            sys.executable,
            "tools/predict.py",
            str(run / "adapter_best.safetensors"),
            str(images),
            "--out",
            str(tmp_path),
        ],
        **BOUND,
    )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 7 and sum("error" in r for r in rows) == 1 and "1 unreadable" in result.stdout
    good = [r for r in rows if "error" not in r]
    assert all(abs(sum(r["scores"]) - 1) < 1e-5 and r["label"] == str(r["index"]) for r in good)
    assert len(list(tmp_path.glob("*.png"))) == 6


def test_predictor_merged_equals_unmerged(run):
    from visadapt.predict.image import Predictor

    data = Digits("test")
    scans = [data.load(i) for i in range(20)]
    path = run / "adapter_best.safetensors"
    merged, plain = Predictor(path), Predictor(path, merge=False)
    assert merged.task.adapted.merger.names and not plain.task.adapted.merger.names
    for a, b in zip(merged.predict(scans), plain.predict(scans)):
        assert a["scores"] == pytest.approx(b["scores"], abs=1e-5)


def test_merge_writes_a_plain_backbone(run, tmp_path, capsys):
    out = tmp_path / "merged.safetensors"
    assert main(["merge", str(run / "adapter_best.safetensors"), "--out", str(out)]) == 0
    assert "merged 2 modules" in capsys.readouterr().out
    from visadapt.predict.image import Predictor

    adapted = Predictor(run / "adapter_best.safetensors", merge=False).task.adapted
    plain = TimmViT("vit_small_patch14_dinov2", weights=str(out), arch=ARCH).eval()
    x = torch.randn(2, 3, 28, 42)
    with torch.no_grad():
        torch.testing.assert_close(plain(x).native, adapted(x).native, atol=1e-5, rtol=1e-5)


def test_cached_features_train_the_same_head(tmp_path, config):
    """A probe on cached features ends with the same head as one that runs the backbone in every step."""
    text = config.read_text().replace("from visadapt.adapters.lora import LoRA\n", "")
    start, end = text.index("    adapters=dict("), text.index("    head=dict(")
    path = tmp_path / "probe.py"
    path.write_text(text[:start] + text[end:] + "\ncache_features = False\n")
    for flag in ("False", "True"):
        assert main(["train", str(path), f"cache_features={flag}", "--work-dir", str(tmp_path / flag)]) == 0
    plain, cached = trained(tmp_path / "False"), trained(tmp_path / "True")
    for key in plain:
        torch.testing.assert_close(plain[key], cached[key], atol=1e-4, rtol=1e-4)


def test_iteration_loop_resumes_in_mid_epoch(config, tmp_path):
    text = config.read_text().replace(
        "train_cfg = dict(by_epoch=True, max_epochs=4)",
        "train_cfg = dict(by_epoch=False, max_iters=17, val_interval=17)",
    )
    text = text.replace("EpochSampler, shuffle=True", "EpochSampler, shuffle=True, endless=True")
    text = text.replace("T_max=6, by_epoch=True, convert_to_iter_based=True", "T_max=17, by_epoch=False")
    text = text.replace("Checkpoints, interval=1, by_epoch=True", "Checkpoints, interval=7, by_epoch=False")
    path = tmp_path / "iters.py"
    path.write_text(text)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", str(path), "--work-dir", str(whole)]) == 0
    shutil.copytree(whole, parts)
    (parts / "iter_14.pth").unlink()
    (parts / "adapter_last.safetensors").unlink()
    assert main(["train", str(path), "--work-dir", str(parts), "--resume"]) == 0
    assert_same(trained(whole), trained(parts))


def test_bf16_and_checkpointing_train(config, tmp_path):
    text = config.read_text().replace(
        "    type=AutocastOptimWrapper,", '    type=AutocastOptimWrapper,\n    dtype="bfloat16",'
    )
    text = text.replace("    head=dict(", "    checkpointing=True,\n    head=dict(").replace(
        "max_epochs=4", "max_epochs=2"
    )
    path = tmp_path / "bf16.py"
    path.write_text(text)
    assert main(["train", str(path), "--work-dir", str(tmp_path / "run")]) == 0
    assert all(v.dtype == torch.float32 for v in trained(tmp_path / "run").values())


def test_early_stop(config, tmp_path):
    text = config.read_text() + (
        "\nfrom visadapt.hooks.steps import EarlyStop\n"
        "custom_hooks += [dict(type=EarlyStop, patience=1, min_delta=2.0)]\n"
    )
    path = tmp_path / "stop.py"
    path.write_text(text)
    assert main(["train", str(path), "--work-dir", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("val/top1" in line for line in lines) == 2


@pytest.mark.ddp
def test_two_processes(config, tmp_path):
    """torchrun with gloo: both processes finish and one adapter file appears."""
    folder = tmp_path / "ddp"
    start = time.time()
    result = subprocess.run(
        ["sh", "tools/dist_train.sh", str(config), "2", "--work-dir", str(folder)],
        **{**BOUND, "env": {**BOUND["env"], "PYTHON": sys.executable}},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert (folder / "adapter_best.safetensors").exists() and time.time() - start < 200
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 20  # half the steps: each process sees half of every epoch


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.adapters.main.rnak=8"], "rank"),
        (["model.adapters.main.targets=['qq']"], "matches no site"),
        (["model.adapters.main.rank=400"], "exceeds the site"),
        (["model.head.num_classes=3"], "the head has 3"),
    ],
)
def test_wrong_settings_are_one_line(config, tmp_path, capsys, words, expected):
    assert main(["train", str(config), *words, "--work-dir", str(tmp_path / "x")]) == 2
    assert expected in error_line(capsys)
