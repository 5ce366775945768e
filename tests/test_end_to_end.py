"""The tools as users call them: train, resume, test, predict, merge, info, on a tiny model and real scans."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
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


@pytest.mark.parametrize("late", [False, True], ids=["probe", "last block"])
def test_cached_features_train_the_same(tmp_path, config, late):
    """A head, and LoRA in the last block, end with the weights that they have with the backbone in every step."""
    text = config.read_text()
    if late:
        text = text.replace("dropout=0.1", "dropout=0.1, layers=[-1]")
    else:
        start, end = text.index("    adapters=dict("), text.index("    head=dict(")
        text = (text[:start] + text[end:]).replace("from visadapt.adapters.lora import LoRA\n", "")
    path = tmp_path / "cached.py"
    path.write_text(text + "\ncache_features = False\n")
    for flag in ("False", "True"):
        assert main(["train", str(path), f"cache_features={flag}", "--work-dir", str(tmp_path / flag)]) == 0
    plain, cached = trained(tmp_path / "False"), trained(tmp_path / "True")
    assert len([*(tmp_path / "True" / "features").iterdir()]) == 2 and plain.keys() == cached.keys()
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


# ---- nothing is lost -------------------------------------------------------------------------------------------------
def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but logs, which each start writes anew."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--overwrite", "train_dataloader.dataset.split=trian"], "did you mean 'train'"),
        (["--overwrite", "optim_wrapper.optimizer.lr=-1.0"], "optim_wrapper: Invalid learning rate"),
        (["--resume", "model.adapters.main.rank=2"], "epoch_4.pth belongs to another model"),
        (["--resume", "optim_wrapper.optimizer.lr=0.01"], "optim_wrapper.optimizer.lr was 0.001 and is 0.01"),
        (["--resume", "param_scheduler.T_max=9"], "param_scheduler.T_max was 6 and is 9"),
        (["--resume", "adapter_last.safetensors"], "no checkpoint"),
    ],
)
def test_a_start_that_is_refused_changes_nothing(config, run, tmp_path, capsys, words, message):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    words = [str(folder / w) if w.endswith(".safetensors") else w for w in words]
    assert main(["train", str(config), "--work-dir", str(folder), *words]) == 2
    assert message in error_line(capsys) and contents(folder) == contents(run)


def test_a_start_that_is_refused_does_not_stand_in_the_way(config, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["train", str(config), "val_dataloader.dataset.split=tset", "--work-dir", str(folder)]) == 2
    assert "did you mean 'test'" in error_line(capsys)
    assert main(["train", str(config), "train_cfg.max_epochs=1", "--work-dir", str(folder)]) == 0


def test_overwrite_deletes_what_a_run_left_and_nothing_else(config, run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "notes").mkdir()
    for name in ("thesis.txt", "notes/20250101_120000.txt", "epochs.pth"):
        (folder / name).write_text("precious")
    assert main(["train", str(config), "train_cfg.max_epochs=1", "--work-dir", str(folder), "--overwrite"]) == 0
    assert {p.name for p in folder.glob("*.pth")} == {"epoch_1.pth", "epochs.pth"}
    assert all((folder / name).read_text() == "precious" for name in ("thesis.txt", "notes/20250101_120000.txt"))
    assert len(list(folder.glob("2*_*"))) == 1


@pytest.mark.parametrize("flag", [[], ["--overwrite"], ["--resume"]])
def test_a_config_of_the_users_own_is_not_replaced(config, tmp_path, capsys, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    shutil.copy(config, "config.py")
    assert main(["train", "config.py", "--work-dir", ".", *flag]) == 2
    assert "take another --work-dir" in error_line(capsys)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"config.py": config.read_bytes()}


@pytest.mark.parametrize("place", ["file", "file/run", "x" * 300])
def test_run_folders_that_cannot_be(config, tmp_path, capsys, place):
    (tmp_path / "file").write_text("old")
    assert main(["train", str(config), "--work-dir", str(tmp_path / place)]) == 2
    assert "cannot be written" in error_line(capsys) and (tmp_path / "file").read_text() == "old"


def test_an_epoch_that_ends_without_a_finite_loss_leaves_no_checkpoint(config, tmp_path, capsys):
    """Two steps: the first throws the weights far off, the second has no loss."""
    words = ["optim_wrapper.optimizer.lr=1e30", "train_dataloader.batch_size=250"]
    assert main(["train", str(config), *words, "--work-dir", str(tmp_path / "nan")]) == 2
    assert "not finite" in error_line(capsys)
    assert not list((tmp_path / "nan").glob("*.pth"))


def test_classes_that_do_not_fit_are_found_before_training(config, run, tmp_path, capsys):
    words = [str(config), "model.head.num_classes=12"]
    for command in (["train", *words, "--work-dir", str(tmp_path / "x")], ["check", *words]):
        assert main(command) == 2
        assert "val_dataloader: the data set has 10 classes, the head has 12" in error_line(capsys)
    assert main(["test", words[0], str(run / "adapter_best.safetensors"), words[1]]) == 2
    assert "(10,) in the file and (12,) here" in error_line(capsys)


def test_test_takes_the_adapters_of_the_file_and_counts_what_it_cannot_read(config, run, tmp_path, capsys):
    import cv2

    data = Digits("test")
    for digit in range(10):
        (tmp_path / "scans" / str(digit)).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "scans" / str(digit) / "0.png"), data.load(data.labels.index(digit)))
    (tmp_path / "scans" / "3" / "1.png").write_bytes(b"no image")
    text = config.read_text().replace('Digits, split="test"', f'FolderDataset, root="{tmp_path / "scans"}"')
    path = tmp_path / "scans.py"
    path.write_text(f"from visadapt.datasets.folder import FolderDataset\n{text}")
    found = []
    for rank in (4, 2):  # what the config says of adapters does not count
        words = ["test", str(path), str(run / "adapter_best.safetensors"), f"model.adapters.main.rank={rank}"]
        assert main([*words, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] and (found[0]["images"], found[0]["unreadable"]) == (10, 1)
    assert main(words) == 0 and "1 unreadable images were left out" in capsys.readouterr().out


def test_test_runs_on_the_device_that_is_asked_for(config, run, capsys, monkeypatch):
    from visadapt.errors import InputError
    from visadapt.predict import from_file
    from visadapt.tasks.classify import ImageClassifier

    words = ["test", str(config), str(run / "adapter_best.safetensors")]
    assert main([*words, "--device", "cuda:99"]) == 2
    assert "no device 'cuda:99' here; there is cpu" in error_line(capsys)

    def forward(task, inputs, **batch):
        raise InputError(f"on {sorted({inputs.device.type, *(p.device.type for p in task.parameters())})}")

    monkeypatch.setattr(ImageClassifier, "forward", forward)
    monkeypatch.setattr(from_file, "available", lambda device: torch.device("meta" if device is None else "cpu"))
    for device, expected in (([], "on ['meta']"), (["--device", "cpu"], "on ['cpu']")):
        assert main([*words, *device]) == 2
        assert expected in error_line(capsys)


# ---- predict, merge and convert on odd input -------------------------------------------------------------------------
def test_pictures_of_same_named_images_are_kept_apart(run, tmp_path):
    import cv2

    scan = Digits("test").load(0)
    shown = ["same/x/a/b/1.png", "same/y/a/b/1.png", "same/y/a/b/1.jpg", "ö 'é.png", "-x.png", "new\nline.png"]
    shown += ["long" * 60 + ".png", os.fsdecode(b"bad\xff.png")]
    for name in shown:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(cv2.imencode(Path(name).suffix, scan)[1].tobytes())
    out = tmp_path / "out put"
    assert main(["predict", str(run / "adapter_best.safetensors"), str(tmp_path / "in"), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert sorted(r["path"] for r in rows) == sorted(str(tmp_path / "in" / name) for name in shown)
    assert len(list(out.glob("*.png"))) == len(shown) and {"a__b__1.png", "a__b__1_2.png"} <= set(os.listdir(out))


def test_scores_that_are_no_numbers_are_errors(run, tmp_path, capsys):
    """The image is fine on its own; inside the network its values overflow."""
    np.save(tmp_path / "far.npy", np.full((8, 8, 3), 1e30))
    np.save(tmp_path / "good.npy", Digits("test").load(0))
    words = ["predict", str(run / "adapter_best.safetensors"), "--out", str(tmp_path / "out")]
    assert main([*words, str(tmp_path / "far.npy"), str(tmp_path / "good.npy")]) == 0
    far, good = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert "not finite" in json.loads(far)["error"] and "label" not in json.loads(far) and "label" in json.loads(good)
    assert [p.name[-8:] for p in (tmp_path / "out").glob("*.png")] == ["good.png"]
    capsys.readouterr()
    assert main([*words, str(tmp_path / "far.npy")]) == 2
    assert "no prediction for 1 image, " in (said := error_line(capsys)) and "the first: the scores are not" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "foo"], "no device 'foo' here; there is cpu"),
        (["--device", "cuda:99"], "no device 'cuda:99' here; there is cpu"),
        (["--weights", "gone.pth"], "there is no file"),
        (["--out", "images/0.txt"], "a file stands where a folder is needed"),
        (["nothing/*.png"], "no images at 'nothing/*.png'"),
    ],
)
def test_predict_mistakes(run, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    np.save("images/0.npy", Digits("test").load(0))
    Path("images/0.txt").write_text("old")
    assert main(["predict", str(run / "adapter_best.safetensors"), "images", *words]) == 2
    assert message in error_line(capsys) and Path("images/0.txt").read_text() == "old"


def test_weights_are_not_written_over_what_they_are_made_of(config, run, tmp_path, capsys):
    adapter, base = tmp_path / "a.safetensors", config.parent / "base.safetensors"
    shutil.copy(run / "adapter_best.safetensors", adapter)
    before = adapter.read_bytes(), base.read_bytes()
    merge, convert = ["merge", str(adapter)], ["convert", str(base), "--model", "vit_small_patch14_dinov2"]
    for command, out, message in (
        (merge, adapter, "would replace the input"),
        (merge, base, "would replace the input"),
        (convert, base, "would replace the input"),
        (merge, tmp_path / "m.pth", "written as a .safetensors file"),
        (convert, tmp_path / "m", "written as a .safetensors file"),
    ):
        assert main([*command, "--out", str(out)]) == 2
        assert message in error_line(capsys)
    assert (adapter.read_bytes(), base.read_bytes()) == before and [p.name for p in tmp_path.iterdir()] == [
        adapter.name
    ]
