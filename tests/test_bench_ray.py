"""A cell on Ray is the cell that it is in one process; what goes wrong there is told, and costs one cell."""

from __future__ import annotations

import builtins
import os
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from visadapt import __version__
from visadapt.benchmark import ray_pool
from visadapt.benchmark.cells import Cell, run_cell
from visadapt.benchmark.ray_pool import RayPool, work
from visadapt.benchmark.suites import BenchTask, Protocol, Suite
from visadapt.benchmark.sweep import Outcome
from visadapt.core import products
from visadapt.errors import InputError, Notice


def cell(seed=0) -> Cell:
    """LoRA on a tiny ViT of random weights, for ten steps on 500 scans of digits."""
    train, test = dict(type="Digits", split="train"), dict(type="Digits", split="test")
    task = BenchTask("digits", "scans", 10, dict(train=train, val=test, trainval=train, test=test))
    return Cell(Suite("tiny", Protocol("test_vit", None, 32, 1, 50, 250), {"digits": task}), task, "LoRA", seed)


# ---- on a Ray of our own --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def pool(home):
    """Two workers, started in a folder of their own with data in a place of their own."""
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISADAPT_DATA", str(home / "somewhere"))
        pool = RayPool("local", 2, 1)
        yield pool
        pool.close()
        assert not pool.ray.is_initialized()


def all_of(pool) -> dict[int, Outcome]:
    """Outcomes of everything that runs, by seed."""
    found, end = {}, time.monotonic() + 120
    while pool.running and time.monotonic() < end:
        found |= {cell.seed: outcome for cell, outcome in pool.wait(1.0)}
    return found


def test_two_workers_give_the_numbers_of_one_process(pool, home, monkeypatch, small_products):
    monkeypatch.chdir(home)
    monkeypatch.setattr(products, "SMALL", small_products)  # as it is in the workers
    for one in (cell(0), cell(1)):
        pool.submit(one, Path("runs") / one.key)
    found = all_of(pool)
    line, wanted = found[0].line, run_cell(cell(0), home / "alone", 1)
    for key in wanted.keys() - {"seconds", "step_time_ratio", "adapter_file"}:
        assert line[key] == wanted[key], key
    assert line["adapter_file"] == f"runs/{cell(0).key}/adapter_last.safetensors"
    assert Path(line["adapter_file"]).read_bytes() == Path(wanted["adapter_file"]).read_bytes()
    assert "epoch 1/1" in (home / "runs" / cell(0).key / "sweep.log").read_text()
    assert found[1].line["metrics"] != line["metrics"]


def test_how_tasks_end(pool, home):
    """A process that dies is no fault of its cell; an exception is."""

    def dies():
        os.kill(os.getpid(), signal.SIGKILL)

    def fails():
        raise ModuleNotFoundError("No module named 'visadapt'")

    def tells():
        return {"error": os.environ["VISADAPT_DATA"]}

    for seed, task in enumerate((dies, fails, tells)):
        reference = pool.ray.remote(max_calls=1, max_retries=0)(task).remote()
        pool.running[reference] = (cell(seed), Path("run"))
    found = all_of(pool)
    assert found[0].killed and "WorkerCrashedError" in found[0].error and "run/sweep.log" in found[0].error
    assert found[1] == Outcome(error="ModuleNotFoundError: No module named 'visadapt'")
    assert found[2] == Outcome(error=f"{home / 'somewhere'} (see run/sweep.log)")


def test_a_cluster_that_is_gone_ends_the_sweep(pool, monkeypatch):
    def gone(reference):
        raise pool.ray.exceptions.LocalRayletDiedError

    monkeypatch.setattr(pool.ray, "get", gone)
    with pytest.raises(InputError, match="'local' is gone; start one and run the command again"):
        pool._outcome(None, Path("run"))


# ---- without one ----------------------------------------------------------------------------------------------------
class FakeRay(SimpleNamespace):
    """Clusters that have nodes and never run anything."""

    def __init__(self, *nodes):
        self.inits, self.cancelled, self.options = [], [], None
        self.nodes = lambda: [dict(Alive=i < 3, Resources=node) for i, node in enumerate(nodes)]

    def init(self, address, **more):
        self.inits.append((address, more))

    def is_initialized(self):
        return bool(self.inits)

    def remote(self, **options):
        self.options = options
        return lambda function: SimpleNamespace(remote=lambda *given: f"result of {given[0].seed}")

    def cancel(self, reference, force):
        self.cancelled.append((reference, force))

    def shutdown(self):
        self.inits = []


@pytest.mark.parametrize(
    "nodes, threads, slots, gpus",
    [
        ([{"CPU": 5.0}, {"CPU": 1.0}, {}], 2, 2, 0),
        ([{"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 3.0, "GPU": 4.0}], 2, 3, 1),
        ([{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 64.0}], 1, 3, 0),  # the last node is lost
    ],
)
def test_no_more_cells_than_there_is_room_for(monkeypatch, nodes, threads, slots, gpus):
    fake = FakeRay(*nodes)
    monkeypatch.setattr(ray_pool, "_ray", lambda address: fake)
    with pytest.warns(Notice, match=f"room for {slots} cells at a time, not for 9"):
        assert RayPool("auto", 9, threads).workers == slots
    assert fake.options == dict(max_calls=1, max_retries=0, num_cpus=threads, num_gpus=gpus)
    assert RayPool("auto", 1, threads).workers == 1


def test_no_node_is_large_enough(monkeypatch):
    monkeypatch.setattr(ray_pool, "_ray", lambda address: FakeRay({"CPU": 2.0}, {"CPU": 2.0, "GPU": 1.0}))
    with pytest.raises(InputError, match=r"no node .* has 4 CPUs and a GPU, which --threads asks for"):
        RayPool("auto", 1, 4)


def test_closing_stops_what_runs_and_submitting_opens_again(monkeypatch, tmp_path):
    monkeypatch.setenv("VISADAPT_DATA", "/here")
    monkeypatch.delenv("VISADAPT_CACHE", raising=False)
    fake = FakeRay({"CPU": 2.0})
    monkeypatch.setattr(ray_pool, "_ray", lambda address: fake)
    pool = RayPool("local", 2, 1)
    ((address, more),) = fake.inits
    assert address == "local" and more["num_cpus"] == 2 and not more["log_to_driver"] and not more["include_dashboard"]
    assert more["runtime_env"] == {"env_vars": {"VISADAPT_DATA": "/here", "VISADAPT_CACHE": ""}}
    pool.submit(cell(7), tmp_path)
    pool.close()
    assert fake.cancelled == [("result of 7", True)] and not pool.running and not fake.inits
    pool.submit(cell(8), tmp_path)
    assert fake.inits and list(pool.running) == ["result of 8"]


def test_a_node_that_is_not_like_the_sweep_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = cell()
    gone = work(one, Path("run"), 1, str(tmp_path / "gone"), (one.key, __version__))
    assert f"has no folder {tmp_path / 'gone'}" in gone["error"]
    for identity in ((one.key, "0.0.1"), ("0123", __version__)):
        assert "install the same on all nodes" in work(one, Path("run"), 1, str(tmp_path), identity)["error"]


def test_without_ray(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "ray":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r"pip install 'visadapt\[ray\]'"):
        RayPool("local", 1, 1)


@pytest.mark.parametrize("address", ["lokal", "host", "ray://host", "host:port", ":6379"])
def test_no_address(monkeypatch, address):
    monkeypatch.setattr(ray_pool, "_ray", lambda address: FakeRay())
    with pytest.raises(InputError, match=r"is no address of a Ray cluster; it is 'local', 'auto', host:port or ray://"):
        RayPool(address, 1, 1)


def test_no_cluster_on_this_machine(monkeypatch):
    """What Ray says names an option that the command does not have."""

    def nothing(address, **more):
        raise ConnectionError("Please specify the one to connect to by setting `--address` flag")

    fake = FakeRay()
    fake.init, fake.exceptions = nothing, SimpleNamespace(RayError=RuntimeError)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_pool, "_ray", lambda address: fake)
    with pytest.raises(InputError) as found:
        RayPool("auto", 1, 1)
    said = "no Ray cluster on this machine; start one with 'ray start --head', or give --ray local"
    assert str(found.value) == said


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "auto"])
def test_nobody_answers(monkeypatch, form):
    """It is said at once; Ray alone would try for many minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = form.format(free.getsockname()[1])  # bound, but nobody listens
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free.getsockname()[1]}")
        monkeypatch.setattr(ray_pool, "_ray", lambda address: FakeRay())
        with pytest.raises(InputError, match=r"no Ray cluster at '.*127.0.0.1:\d+': .*refused.*ray start --head"):
            RayPool(address, 1, 1)
