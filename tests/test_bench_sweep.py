"""A sweep runs each cell once, whatever happens to it or to the workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
from PIL import Image

from visadapt import __version__, config
from visadapt.benchmark.cells import Cell, run_cell
from visadapt.benchmark.local_pool import LocalPool
from visadapt.benchmark.results import Store
from visadapt.benchmark.suites import BenchTask, Protocol, Suite, suite
from visadapt.benchmark.sweep import Outcome, sweep
from visadapt.benchmark.watch import Watch, spoken
from visadapt.errors import InputError

DIGITS = {split: {"type": "Digits", "split": "train"} for split in ("train", "val", "trainval")}
DIGITS["test"] = {"type": "Digits", "split": "test"}
TASK = BenchTask("digits", "digits", 10, DIGITS)
SUITE = Suite("tiny", Protocol("vit_tiny_patch16_224", None, 32, 1, 32), {"digits": TASK})


def cells(*methods: str, seeds=(0,)) -> list[Cell]:
    return [Cell(SUITE, TASK, method, seed) for seed in seeds for method in methods]


def result(cell: Cell, **changes) -> dict:
    line = {"method": cell.method, "metric": "top1", "value": 0.5, "seconds": 60.0}
    return line | {"config_hash": cell.key, "version": __version__} | changes


class Scripted:
    """A pool whose outcomes are given beforehand, by method, one per attempt; without any a cell succeeds."""

    def __init__(self, workers: int = 1, **script: list[Outcome]) -> None:
        self.workers, self.script, self.begun, self.running = workers, script, [], []

    def submit(self, cell, folder):
        self.begun.append((cell.method, cell.seed))
        self.running.append(cell)
        assert len(self.running) <= self.workers

    def wait(self, seconds):
        cell = self.running.pop(0)
        outcomes = self.script.get(cell.method)
        return [(cell, outcomes.pop(0) if outcomes else Outcome(result(cell)))]

    def close(self):
        self.running = []


@pytest.fixture
def run(tmp_path):
    def run(wanted, pool):
        store = Store(tmp_path / "results" / "tiny.jsonl")
        return sweep(wanted, pool, store, tmp_path / "work", Watch(), tmp_path / "results")

    run.path = tmp_path / "results" / "tiny.jsonl"
    return run


def stored(run) -> list[dict]:
    return [json.loads(text) for text in run.path.read_text().splitlines()]


def test_finished_cells_do_not_run_again(run):
    wanted = cells("LoRA", "SSF", seeds=(0, 1))
    assert run(wanted[:3], Scripted()) == []
    second = Scripted(workers=2)
    assert run(wanted, second) == []
    assert second.begun == [("SSF", 1)]
    assert [line["config_hash"] for line in stored(run)] == [cell.key for cell in wanted]


def test_another_version_has_to_run_again(run):
    wanted = cells("LoRA")
    Store(run.path).append(result(wanted[0], version="0.0.9"))
    pool = Scripted()
    run(wanted, pool)
    assert pool.begun == [("LoRA", 0)]
    assert [line["version"] for line in stored(run)] == ["0.0.9", __version__]


def test_a_failing_cell_stops_no_other(run, capsys):
    failed = run(cells("LoRA", "SSF", "VPT"), Scripted(SSF=[Outcome(error="no such thing")]))
    assert [(cell.method, why) for cell, why in failed] == [("SSF", "no such thing")]
    assert [line["method"] for line in stored(run)] == ["LoRA", "VPT"]
    assert "SSF digits seed 0 FAILED: no such thing" in capsys.readouterr().out


def test_a_killed_cell_runs_once_more(run):
    killed = Outcome(error="its worker ended by SIGKILL", killed=True)
    pool = Scripted(LoRA=[killed], SSF=[killed, killed])
    failed = run(cells("LoRA", "SSF", "VPT"), pool)
    assert [method for method, _ in pool.begun] == ["LoRA", "LoRA", "SSF", "SSF", "VPT"]
    assert [cell.method for cell, _ in failed] == ["SSF"]
    assert [line["method"] for line in stored(run)] == ["LoRA", "VPT"]


def test_the_config_of_a_finished_cell_is_kept_and_says_what_ran(run):
    wanted = cells("LoRA", seeds=(3,))
    run(wanted, Scripted())
    kept = stored(run)[0]["config"]
    assert kept.endswith("results/configs/tiny/lora_digits.py")
    loaded = config.load(kept)
    assert loaded.randomness.seed == 0 and loaded.train_dataloader.batch_size == 32
    assert loaded.model.adapters.main.targets == ["all-linear"]


def test_configs_of_another_protocol_stand_beside_the_usual_ones():
    offline = suite("offline")
    cell = Cell(offline, offline.tasks["eurosat"], "LoRA", 0)
    assert cell.config_file.name == "lora_eurosat.py"
    quick = replace(cell, suite=offline.under(epochs=1))
    assert quick.config_file.name == "lora_eurosat_vit_small_patch14_dinov2_56px_1e_b32.py"
    assert (
        replace(cell, method="LoRA+", hyperparameters={"lr": 0.002}).config_file.name == "lora-plus_eurosat_lr-0.002.py"
    )


def test_a_cell_that_is_named_twice_runs_once(run):
    pool = Scripted(workers=2)
    run(cells("LoRA", "LoRA", seeds=(0, 0)), pool)
    assert pool.begun == [("LoRA", 0)] and len(stored(run)) == 1


def test_a_full_disk_leaves_the_lines_that_were_there(run, tmp_path):
    """And nothing of the one that found no room, which would stop every later sweep."""
    store, (cell,) = Store(run.path), cells("LoRA")
    store.append(result(cell))
    before = run.path.read_bytes()
    code = "import resource, sys; from pathlib import Path; from visadapt.benchmark.results import Store\n"
    code += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 100},) * 2)\n"
    code += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += f"Store(Path({str(run.path)!r})).append({{'text': 'x' * 500}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 1
    assert run.path.read_bytes() == before


def test_bytes_that_are_no_text_are_told(run):
    run.path.parent.mkdir()
    run.path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(InputError, match=r"tiny\.jsonl:1: no JSON object"):
        run(cells("LoRA"), Scripted())


def test_results_of_another_version_are_told(run, capsys):
    (cell,) = cells("LoRA")
    Store(run.path).append(result(cell, version="0.0.9"))
    run([cell], Scripted())
    assert f"1 result of other versions in {run.path} left alone" in capsys.readouterr().out


def test_one_sweep_at_a_time(run):
    with Store(run.path).locked(), pytest.raises(InputError, match="another sweep writes"):
        run(cells("LoRA"), Scripted())


def test_a_line_that_a_crash_cut_short_is_told_and_not_joined(run):
    wanted = cells("LoRA", "SSF")
    Store(run.path).append(result(wanted[0]))
    run.path.write_bytes(run.path.read_bytes().rstrip(b"\n"))
    run(wanted, Scripted())
    assert [line["method"] for line in stored(run)] == ["LoRA", "SSF"]
    with open(run.path, "a") as file:
        file.write('{"config_hash": "12')
    with pytest.raises(InputError, match=r"tiny\.jsonl:3: no JSON object; mend or remove the line"):
        run(wanted, Scripted())


def test_cells_differ_by_all_that_decides_them():
    cell = cells("LoRA")[0]
    other = [replace(cell, seed=1), replace(cell, select=True), replace(cell, hyperparameters={"lr": 2e-3})]
    other += [replace(cell, method="SSF"), replace(cell, suite=SUITE.under(epochs=2))]
    assert len({cell.key, *(o.key for o in other)}) == 6
    assert replace(cell, suite=SUITE.under(epochs=None)).key == cell.key
    assert replace(cell, hyperparameters={"scale": 3.0}).config.model.adapters.main.alpha == 3.0
    with pytest.raises(InputError, match="SSF has no scale"):
        replace(cell, method="SSF", hyperparameters={"scale": 3.0}).key  # noqa: B018


def test_time_left():
    watch = Watch()
    wanted = cells("LoRA", "SSF", "VPT")
    watch.begin(wanted, wanted, workers=2)
    assert watch.rest() == "time left is not known yet"
    watch.started(wanted[0])
    watch.finished(wanted[0], result(wanted[0], seconds=600.0))
    assert watch.rest() == "10 min left"
    assert [spoken(s) for s in (45, 89, 720, 12000)] == ["45 s", "89 s", "12 min", "3 h 20 min"]


class Murderous(LocalPool):
    """Kills the first worker of all with SIGKILL."""

    spared = False

    def submit(self, cell, folder):
        super().submit(cell, folder)
        if not self.spared:
            self.spared = True
            os.kill(self.running[-1][2].pid, signal.SIGKILL)


def test_processes(run, tmp_path):
    """A worker that is killed, its second life, and a cell that cannot be built, in processes of their own."""
    broken = Cell(SUITE.under(weights=str(tmp_path / "absent.pth")), TASK, "LinearProbe", 0)
    failed = run([*cells("LinearProbe"), broken], Murderous(2, 1))
    assert [cell for cell, _ in failed] == [broken]
    assert "absent.pth" in failed[0][1] and "\n" not in failed[0][1]
    (line,) = stored(run)
    assert line["value"] == line["metrics"]["top1"] > 0.1 and line["train_images"] == 500
    assert line["trainable_params"] == line["head_params"] == 192 * 10 + 10
    assert line["step_time_ratio"] < 1  # without a backward pass through the backbone
    assert (tmp_path / "work" / line["config_hash"] / "adapter_last.safetensors").stat().st_size == line["stored_bytes"]


@pytest.mark.parametrize("method", ["LinearProbe", "SSF"])
def test_a_damaged_image_fails_the_cell(method, tmp_path, monkeypatch):
    """Left out, it would make the figures of this method those of other images than another's."""
    monkeypatch.setattr("visadapt.benchmark.cells.step_cost", lambda *args: (1.0, 1.0))
    lines = [f"{n}.png {n % 2}" for n in range(6)]
    for n in range(6):
        Image.new("RGB", (32, 32), (40 * n, 0, 0)).save(tmp_path / f"{n}.png")
    (tmp_path / "5.png").write_bytes(b"no picture")
    for name, listed in (("train", lines[:4]), ("test", lines[4:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(listed))
    data = {s: {"type": "ListDataset", "list_file": str(tmp_path / "train.txt")} for s in ("train", "val", "trainval")}
    data["test"] = {"type": "ListDataset", "list_file": str(tmp_path / "test.txt")}
    task = BenchTask("two", "two", 2, data)
    tiny = Suite("tiny", Protocol("test_vit", None, 32, 1, 2), {"two": task})
    with pytest.raises(InputError, match=r"5\.png"):
        run_cell(Cell(tiny, task, method, 0), tmp_path / "run", 1)


def test_workers_end_with_their_sweep():
    """Otherwise a run whose sweep was killed would go on and meet its successor in one folder."""
    code = "import os, threading, time; from visadapt.benchmark.local_pool import _die_with\n"
    code += "child = os.fork()\nif child: print(child, flush=True); time.sleep(60)\n"
    code += "threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start(); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the worker outlived its sweep")


SWEEP = """
from pathlib import Path
from test_bench_sweep import cells
from visadapt.benchmark.local_pool import LocalPool
from visadapt.benchmark.results import Store
from visadapt.benchmark.sweep import sweep
from visadapt.benchmark.watch import Watch

if __name__ == "__main__":
    wanted = cells("LinearProbe", seeds=(0, 1, 2))
    sweep(wanted, LocalPool(1, 1), Store(Path("results/tiny.jsonl")), Path("work"), Watch(), Path("results"))
"""


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on(tmp_path, run):
    """Its worker goes with it, what was stored stays and does not run again."""
    (tmp_path / "run.py").write_text(SWEEP)
    begin = dict(args=[sys.executable, "run.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    begin["env"] = os.environ | {"PYTHONPATH": os.path.dirname(__file__), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(**begin)
    assert "3 to run" in first.stdout.readline() and "[1/3]" in first.stdout.readline()
    workers = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == [] and len(stored(run)) == 1
    second = subprocess.run(**begin, check=True)
    assert "1 stored already, 2 to run" in second.stdout
    assert [line["seed"] for line in stored(run)] == [0, 1, 2]
