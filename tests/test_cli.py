"""The command line: exit codes, one-line errors, and the commands that look but do not train."""

from __future__ import annotations

import errno
import importlib
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from visadapt import cli
from visadapt.commands import doctor
from visadapt.errors import PACKAGE, InputError, Notice, refusals
from visadapt.files import atomic

REPOSITORY = Path(__file__).parents[1]
CONFIG = """
from visadapt.adapters.lora import LoRA
from visadapt.backbones.timm_vit import TimmViT
from visadapt.datasets.base import collate
from visadapt.datasets.folder import FolderDataset
from visadapt.datasets.sampler import EpochSampler
from visadapt.heads.linear import LinearHead
from visadapt.metrics.classify import ClassificationMetric
from visadapt.tasks.classify import ImageClassifier

model = dict(
    type=ImageClassifier,
    backbone=dict(type=TimmViT, name="test_vit", weights="no/such/file.pth"),
    adapters=dict(main=dict(type=LoRA, rank=2)),
    head=dict(type=LinearHead, num_classes=3),
)
val_dataloader = dict(
    batch_size=4,
    dataset=dict(type=FolderDataset, root="no/such/folder"),
    sampler=dict(type=EpochSampler, shuffle=False),
    collate_fn=dict(type=collate),
)
val_cfg = dict()
val_evaluator = dict(type=ClassificationMetric)
"""


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def failing(monkeypatch):
    """Let `visadapt doctor` end with an error, and give its exit code."""

    def run(error: BaseException, *words: str) -> int:
        def fail(args):
            raise error

        monkeypatch.setattr(doctor, "run", fail)
        monkeypatch.setattr(doctor, "add_arguments", lambda parser: parser.add_argument("words", nargs="*"))
        return cli.main(["doctor", *words])

    return run


def test_help_and_list_import_nothing_heavy():
    code = (
        "import sys; from visadapt.cli import main; assert main(['list']) == 0\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'mmengine', 'numpy', 'timm'} & set(sys.modules)"
    )
    text = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert all(f"    {name} " in text for name in cli.COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert re.fullmatch(r"visadapt \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "visadapt: error: the following arguments are required: COMMAND; see 'visadapt --help'\n"),
        (["train"], "visadapt: error: the following arguments are required: config; see 'visadapt train --help'\n"),
        (["predict", "a", "b", "--batch-size", "0"], "--batch-size: it is a whole number of at least 1, not '0'"),
        *(
            (["bench", "speed", option, value], f"{option}: it is a whole number of at least 1, not '{value}'")
            for option, value in (("--rounds", "0"), ("--batch", "-1"), ("--mixed", "1.5"), ("--size", "x"))
        ),
        (["bench", "offline", "--seeds", "-1"], "--seeds: it is a whole number of at least 0, not '-1'"),
        (["trian"], "visadapt: error: unknown command 'trian' (did you mean 'train'?)"),
        (["list", "--nope"], "visadapt: error: unrecognized arguments: --nope; see 'visadapt list --help'\n"),
        (["list", "adaptors"], "invalid choice: 'adaptors'"),
    ],
)
def test_usage_errors(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and err.startswith("visadapt: error: ")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("no such\nthing"), 2, "visadapt: error: no such thing\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/runs/a.pth"),
            2,
            "no space left on device while writing /runs/a.pth",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "mine.txt"), 2, "mine.txt: no such file"),
        (PermissionError(errno.EACCES, "Permission denied", "given.txt"), 2, "given.txt: permission denied"),
        (PermissionError(errno.EACCES, "Permission denied", "/inner/file"), 2, "/inner/file: permission denied"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), 2, "lower num_workers"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            2,
            "batch size",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "out of memory; lower the batch size"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_one_line_and_an_exit_code(failing, capsys, error, code, message):
    assert failing(error, "mine.txt", "data.root=given.txt") == code
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("bug"), FileNotFoundError(errno.ENOENT, "No such file", "/inner/file")])
def test_bugs_show_their_traceback(failing, capsys, error):
    assert failing(error, "mine.txt") == 1
    assert "Traceback" in capsys.readouterr().err


def test_debug_shows_the_traceback_of_an_input_error(failing, capsys):
    assert failing(InputError("wrong"), "--debug") == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("visadapt: error: wrong\n")


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m visadapt list --json | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[\n", "")


def test_a_closed_output_is_no_error():
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m visadapt list >&-"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("folder", None, "it is a folder"),
        ("file.txt/below/a.txt", None, "a file stands where a folder is needed"),
        ("x" * 300, None, "the name is too long"),
        ("", None, "it names no file"),
        ("file.txt", ValueError("I/O error: Permission denied (os error 13)"), "permission denied; the file that was"),
        ("file.txt", OSError(errno.ENOSPC, "No space left on device"), "no space left on device; the file that was"),
        ("file.txt", InputError("told (os error 13)"), "told (os error 13)"),
    ],
)
def test_what_cannot_be_written(tmp_path, monkeypatch, place, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("old")
    with pytest.raises(InputError) as caught, atomic(place) as temporary:
        temporary.write_text("new")
        if error is not None:
            raise error
    assert message in str(caught.value)
    assert (tmp_path / "file.txt").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.txt", "folder"]


def test_an_error_about_another_place_stays_what_it_is(tmp_path):
    with pytest.raises(PermissionError), atomic(tmp_path / "a.txt"):
        raise PermissionError(errno.EACCES, "Permission denied", "/another/place")


def test_only_refusals_of_other_packages_are_the_users():
    """An error that arises in the package's own files is a bug and keeps its traceback."""

    def fails(file):
        exec(compile("raise ValueError('no such size')", file, "exec"))

    with pytest.raises(InputError, match="train_dataloader: no such size"), refusals("train_dataloader"):
        fails("/somewhere/torch/loader.py")
    with pytest.raises(ValueError, match=r"^no such size") as caught, refusals("train_dataloader"):
        fails(str(PACKAGE / "datasets" / "base.py"))
    assert not isinstance(caught.value, InputError)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_script(name):
    assert f'main(["{name}", *sys.argv[1:]])' in (REPOSITORY / "tools" / f"{name}.py").read_text()


def test_a_script_runs(tmp_path):
    done = subprocess.run([sys.executable, REPOSITORY / "tools" / "list.py", "heads"], capture_output=True, text=True)
    assert done.returncode == 0 and "LinearHead" in done.stdout


def rows(capsys, *argv: str):
    assert cli.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_list_rows(capsys):
    lora = next(row for row in rows(capsys, "list", "adapters") if row["name"] == "LoRA")
    assert lora["kinds"] == ["delta"] and lora["mergeable"] is True and lora["needs"] == []
    assert "2106.09685" in lora["paper"] and lora["vit_b_params"] == 294_912
    assert cli.main(["list", "adapters"]) == 0
    assert re.search(r"^LoRA +delta +294,912 +yes", capsys.readouterr().out, re.M)
    assert any(path.startswith("configs/lora/") for path in lora["configs"])
    assert "vit" in lora["tested_backbones"]
    everything = rows(capsys, "list")
    assert {row["group"] for row in everything} == {"adapters", "backbones", "heads", "tasks", "datasets"}
    assert len({frozenset(row) for row in everything}) == 1


def test_list_says_what_is_registered(capsys):
    for row in rows(capsys, "list"):
        cls = importlib.import_module("visadapt.commands.list").GROUPS[row["group"]].get(row["name"])
        if row["group"] == "adapters":
            assert row["kinds"] == [*cls.kinds] and row["mergeable"] == cls.mergeable and row["paper"] == cls.paper
            assert [n for n in row["needs"] if "[" not in n] == sorted(cls.needs)
        extra = getattr(cls, "extra", None)
        assert [n for n in row["needs"] if "[" in n] == ([f"visadapt[{extra}]"] if extra else [])
        assert extra in (None, *doctor.EXTRAS)
        assert row["summary"]


def test_backbones_without_what_an_adapter_needs_are_not_tested(monkeypatch, capsys, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "cases.py").write_text(
        'CAPABILITIES: dict = {"plain": ("maps",), "full": ("prompts", "tokens")}\n'
        'ROLES: dict = {"plain": "q v norm", "full": "block fc1 q v"}\n'
        'CASES = [Case("VPT"), Case("LoRA"), Case("SSF", dict(targets=("fc1",))), Case("Pfeiffer")]\n'
    )
    monkeypatch.setattr(importlib.import_module("visadapt.commands.list"), "REPOSITORY", tmp_path)
    found = {row["name"]: row["tested_backbones"] for row in rows(capsys, "list", "adapters")}
    assert found["VPT"] == ["full"] and found["LoRA"] == ["plain", "full"] and found["BitFit"] == []
    assert found["SSF"] == ["full"] and found["Pfeiffer"] == []


@pytest.mark.parametrize("name", ["test_vit", "TimmViT:test_vit"])
def test_sites_of_a_name(capsys, name):
    found = rows(capsys, "sites", name)
    (q,) = [site for site in found if site["key"] == "trunk_00_q"]
    assert q == {
        **{"key": "trunk_00_q", "role": "q", "layer": 0, "path": "blocks.0.attn.qkv"},
        **{"dim_in": 64, "dim_out": 64, "rows": [0, 64], "layout": "NLC"},
    }
    assert len({site["key"] for site in found}) == len(found)


def test_sites_of_a_convolutional_network(capsys):
    assert {"patch", "conv", "down", "norm1"} <= {site["role"] for site in rows(capsys, "sites", "test_resnet")}
    assert {site["layout"] for site in rows(capsys, "sites", "DSCF")} == {"NCHW"}


def test_sites_of_a_config_need_no_weights(capsys, config_file):
    assert rows(capsys, "sites", config_file) == rows(capsys, "sites", "test_vit")
    assert cli.main(["sites", config_file]) == 0
    head = capsys.readouterr().out.splitlines()[0]
    assert head.split() == ["key", "role", "layer", "path", "dim_in", "dim_out", "rows", "layout"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("TimmViT", "name one, as in TimmViT:"),
        ("TimVit:test_vit", "unknown backbone 'TimVit' (did you mean 'TimmViT'?)"),
        ("no_such_vit", "timm has no model 'no_such_vit'"),
        ("resnet5", "timm has no model 'resnet5' (did you mean 'resnet5"),
        ("efficientnet_b0", "timm's 'efficientnet_b0' belongs to none of the families"),
        ("gone.py", "no config file gone.py"),
    ],
)
def test_sites_of_nothing(capsys, name, message):
    assert cli.main(["sites", name]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("name", "code", "said"), [("LoRAPro", 0, "OK"), ("GaLore", 2, "GaLore")])
def test_check_builds_the_optimizer_by_its_name(capsys, name, code, said):
    config = str(REPOSITORY / "configs/lora/lora_dinov2-s-focus_6e_digits-56.py")
    words = ["model.backbone.weights=None", "model.backbone.name=test_vit", f"optim_wrapper.optimizer.type={name}"]
    assert cli.main(["check", config, *words]) == code
    out, err = capsys.readouterr()
    assert said in (err if code else out)


def test_check(capsys, config_file, tmp_path):
    cv2, np = pytest.importorskip("cv2"), pytest.importorskip("numpy")
    for name in "abc":
        (tmp_path / "set" / name).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "set" / name / "1.png"), np.zeros((8, 8, 3), np.uint8))
    root, weights = f"val_dataloader.dataset.root={tmp_path}/set", "model.backbone.weights=None"
    assert cli.main(["check", config_file, root, weights]) == 0
    out = capsys.readouterr().out
    assert (
        re.search(r"val\s+3 samples", out) and re.search(r"main\s+LoRA", out) and out.splitlines()[-1].startswith("OK")
    )
    assert cli.main(["check", config_file, root]) == 2
    assert "no/such/file.pth" in capsys.readouterr().err
    assert cli.main(["check", config_file, weights]) == 2
    assert "no/such/folder" in capsys.readouterr().err
    assert cli.main(["check", config_file, root, weights, "val_dataloader.batch_size=0"]) == 2
    assert "val_dataloader: batch_size should be a positive" in capsys.readouterr().err
    assert cli.main(["check", config_file, root, weights, "model.head.num_classes=4"]) == 2
    assert "val_dataloader: the data set has 3 classes, the head has 4" in capsys.readouterr().err
    assert cli.main(["check", config_file, weights, "--debug", root, "model.head.num_clases=4"]) == 2
    assert "no key 'num_clases'" in capsys.readouterr().err


def test_info(capsys, tmp_path, config_file):
    from visadapt.config import load
    from visadapt.registry import TASKS

    task = TASKS.build(load(config_file, ["model.backbone.weights=None"]).model)
    path = tmp_path / "a.safetensors"
    task.adapted.save(path, heads=task.heads, extra={"classes": ["x", "y", "z"], "metrics": {"top1": 0.5}})
    manifest = rows(capsys, "info", str(path))
    assert manifest["adapters"]["main"]["type"] == "LoRA" and manifest["bytes"] == path.stat().st_size
    assert cli.main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    trained = sum(p.numel() for p in task.adapted.adapters["main"].parameters())
    assert "main: LoRA(rank=2, " in out and f"{trained:,} parameters" in out and "(q, v)" in out
    assert "main: LinearHead(num_classes=3" in out and "3: x, y, z" in out and "top1 0.5000" in out
    assert manifest["backbone"]["fingerprint"] in out and manifest["sha256"] in out
    path.write_bytes(path.read_bytes()[:100])
    assert cli.main(["info", str(path)]) == 2
    assert "a.safetensors" in capsys.readouterr().err


def test_doctor_on_this_machine(capsys):
    found = rows(capsys, "doctor")
    assert found["problems"] == [] and found["versions"]["torch"] and found["device"]["threads"] >= 1
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "OK" and "dinov2_vits14_focus" in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timm": None}, "visadapt needs timm>=1.0.26, which is missing; run: pip install 'timm>=1.0.26'"),
        ({"torch": "2.8.1"}, "visadapt needs torch>=2.9, which is there as 2.8.1"),
        ({"albumentations": "2.0.9"}, "albumentations==2.0.8, which is there as 2.0.9"),
        ({"mmengine": "0.10.7"}, "mmengine is installed over onedl-mmengine"),
        ({"albumentationsx": "2.5.1"}, "albumentationsx is installed over albumentations"),
    ],
)
def test_doctor_finds_what_is_wrong(monkeypatch, capsys, changes, message):
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: changes[name] if name in changes else real(name))
    assert cli.main(["doctor"]) == 2
    assert message in capsys.readouterr().out


def test_doctor_knows_a_wrong_pair():
    versions = {"torch": "2.13.0+cpu"}
    assert doctor.unmet(["torch (>=2.13)"], versions, "torchvision") == []
    (problem,) = doctor.unmet(["torch==2.14.1"], versions, "torchvision")
    assert problem.startswith("torchvision needs torch==2.14.1, which is there as 2.13.0+cpu")


def test_doctor_and_setup_agree(monkeypatch):
    import runpy

    import setuptools

    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(REPOSITORY)
    runpy.run_path(str(REPOSITORY / "setup.py"))
    assert list(doctor.REQUIRED) == given["install_requires"]
    named = {
        extra: tuple(re.split(r"[\[><=]", p)[0] for p in packages)
        for extra, packages in given["extras_require"].items()
    }
    assert {extra: packages for extra, (packages, _) in doctor.EXTRAS.items()} == {n: named[n] for n in doctor.EXTRAS}
    assert set(named) == {*doctor.EXTRAS, "points", "demo", "all", "dev"}
    assert not {"pytest", "ruff"} & set(named["all"]) and set(named["demo"]) == set(named["weights"])


def test_notices_are_one_line_without_a_place(capsys, monkeypatch):
    def warn(args):
        warnings.warn("clips are short", Notice, stacklevel=1)
        warnings.warn("from elsewhere", UserWarning, stacklevel=1)
        return 0

    monkeypatch.setattr("visadapt.commands.doctor.run", warn)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda *a: print(warnings.formatwarning(*a[:4]), end=""))
        assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "visadapt: warning: clips are short\n" in out and "UserWarning: from elsewhere" in out
