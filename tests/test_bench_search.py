"""A search chooses by validation images alone, however it is run, and ends in cells of the table."""

from __future__ import annotations

import builtins
import json
import random

import pytest

from visadapt import __version__
from visadapt.benchmark import search as searching
from visadapt.benchmark.cells import Cell
from visadapt.benchmark.recipes import methods, recipe
from visadapt.benchmark.results import Store
from visadapt.benchmark.search import Study, own_values, search, share
from visadapt.benchmark.suites import SPLITS, SUITES, BenchTask, Protocol, Suite
from visadapt.benchmark.sweep import Outcome
from visadapt.benchmark.watch import Watch
from visadapt.cli import main
from visadapt.errors import InputError

pytest.importorskip("optuna")

PLACES = [("digits", "LinearProbe"), ("digits", "AdaptFormer"), ("more", "AdaptFormer")]


def tiny_suite() -> Suite:
    """Two tasks of the embedded digits, with a different data set for each split."""
    tasks = {
        name: BenchTask(name, "scans", 10, {split: dict(type="Digits", split=split, seed=n) for split in SPLITS})
        for n, name in enumerate(("digits", "more"))
    }
    return Suite("tiny", Protocol("test_vit", None, 32, 1, 50), tasks)


def peak(cell: Cell) -> float:
    """A value of a cell that is highest at three times the recipe's lr."""
    return 1 / (1 + abs(cell.hyperparameters["lr"] / (3 * recipe(cell.method).lr) - 1))


class FakePool:
    """Cells that end at once, in an order of their own.

    Args:
        value: of a cell; an exception is how it fails.
        stop: cells after which Ctrl-C is pressed.
    """

    def __init__(self, workers=1, value=peak, stop=10**9):
        self.workers, self.value, self.left, self.running, self.ran = workers, value, stop, [], []

    def submit(self, cell, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_last.safetensors").touch()
        self.running.append(cell)

    def wait(self, seconds):
        random.Random(len(self.ran)).shuffle(self.running)
        if not self.left:
            raise KeyboardInterrupt
        cell, self.left = self.running.pop(), self.left - 1
        self.ran.append(cell)
        try:
            value = self.value(cell)
        except ValueError as error:
            return [(cell, Outcome(error=str(error)))]
        line = dict(config_hash=cell.key, version=__version__, value=value, metric="top1", seconds=1.0)
        return [(cell, Outcome(line | dict(hyperparameters=dict(cell.hyperparameters))))]

    def close(self):
        self.running = []


def searched(folder, pool, trials=10, places=PLACES) -> list[Study]:
    suite = tiny_suite()
    found = [Study(suite, suite.tasks[task], method, 0) for task, method in places]
    search(found, trials, pool, Store(folder / "tiny_search.jsonl"), folder / "runs", Watch())
    return found


def tried(found: list[Study]) -> list[list[dict]]:
    return [[dict(cell.hyperparameters) for cell, _ in study.scores] for study in found]


def test_the_first_trial_is_the_recipe_and_others_are_around_it(tmp_path):
    for study in searched(tmp_path, FakePool()):
        first, *others = (dict(cell.hyperparameters) for cell, _ in study.scores)
        assert (
            first == study.own == study.study.trials[0].params
            and len(others) == 9
            and len({str(o) for o in others}) > 4
        )
        assert first["lr"] == recipe(study.method).lr and first["weight_decay"] == recipe(study.method).weight_decay
        for values in others:
            assert values.keys() == first.keys() and values["weight_decay"] in searching.DECAYS
            for name in values.keys() - {"weight_decay"}:
                assert 0.0995 * first[name] <= values[name] <= 10.05 * first[name]
                assert values[name] == float(f"{values[name]:.3g}")


@pytest.mark.parametrize(
    "method, scale",
    [
        *(("AdaptFormer", 0.1), ("QWHA", 200.0), ("IncreLoRA", 16), ("LinearProbe", None), ("SSF", None)),
        *((name, 8) for name in ("LoRA", "LoRA+", "ALLoRA", "LoRA-Pro", "DiffoRA", "DyLoRA", "SoRA", "WaRA")),
        *(("ConvLoRA", 4), ("LoRAXS", 32), ("TLoRA", 4), ("MoSA", 0.1)),
    ],
)
def test_a_scale_is_searched_from_what_the_adapter_has(method, scale):
    """Also where the adapter's own default is the rank, twice the rank, or what belongs to a style."""
    assert own_values(method).get("scale") == scale


def test_every_scale_is_searched():
    assert [m for m in methods() if ("scale" in own_values(m)) != (recipe(m).scale_argument is not None)] == []


@pytest.mark.parametrize(
    "usual, probed", [({}, {}), ({"a": 2.0}, {"a": 2.0}), ({"a": 3.0, "b": 5.0}, {"a": 1, "b": 1})]
)
def test_a_scale_that_is_not_clear_is_refused(monkeypatch, usual, probed):
    """No number moves with it, or two disagree."""
    found = iter([usual, probed])
    monkeypatch.setattr(searching, "_numbers", lambda cfg, backbone: next(found))
    searching._meant.cache_clear()
    with pytest.raises(InputError, match="LoRA cannot be searched: what alpha=None of LoRA stands for is not clear"):
        own_values("LoRA")


def test_time_left_is_that_of_all_generations_and_the_final_runs(tmp_path, capsys):
    """Two studies of ten trials, of one second each, and seven runs behind them."""
    suite = tiny_suite()
    found = [Study(suite, suite.tasks[task], method, 0) for task, method in PLACES[:2]]
    search(found, 10, FakePool(), Store(tmp_path / "tiny_search.jsonl"), tmp_path / "runs", Watch(later=7))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert len(said) == 20
    assert [int(line.rpartition("; ")[2].removesuffix(" s left")) for line in said] == list(range(26, 6, -1))


@pytest.mark.parametrize("method", methods())
def test_every_recipe_can_be_the_first_trial(method):
    suite = tiny_suite()
    (cell,) = Study(suite, suite.tasks["digits"], method, 0).ask(1)
    assert cell.hyperparameters == own_values(method) and cell.config.optim_wrapper.optimizer.lr == recipe(method).lr


def test_the_number_of_workers_changes_nothing(tmp_path):
    one, three = searched(tmp_path / "1", FakePool(1)), searched(tmp_path / "3", FakePool(3))
    assert tried(one) == tried(three) and [s.best for s in one] == [s.best for s in three]


def test_results_lead_the_later_trials(tmp_path):
    """Until Optuna has seen eight trials they are random; then they follow what was measured."""
    up = searched(tmp_path / "1", FakePool(), 12, PLACES[:1])
    down = searched(tmp_path / "2", FakePool(value=lambda cell: 1 - peak(cell)), 12, PLACES[:1])
    (one,), (other,) = tried(up), tried(down)
    assert one[:8] == other[:8] and one[8:] != other[8:]


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path):
    whole, broken = FakePool(2), FakePool(2, stop=17)
    wanted = searched(tmp_path / "whole", whole)
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "broken", broken)
    rest = FakePool(2)
    assert tried(searched(tmp_path / "broken", rest)) == tried(wanted)
    ran = [cell.key for cell in broken.ran + rest.ran]
    assert len(broken.ran) == 17 and sorted(ran) == sorted(cell.key for cell in whole.ran)


def test_more_trials_go_on_from_fewer(tmp_path):
    few, more = FakePool(), FakePool()
    begun = tried(searched(tmp_path, few, 6))
    assert [t[:6] for t in tried(searched(tmp_path, more, 10))] == begun
    assert len(few.ran) == 18 and len(more.ran) == 12


def test_a_trial_that_fails_is_counted_and_never_chosen(tmp_path, capsys):
    def fragile(cell):
        if cell.method == "LinearProbe" or cell.hyperparameters["lr"] > 2e-3:
            raise ValueError("loss is nan")
        return float("nan") if cell.hyperparameters["lr"] < 5e-4 else cell.hyperparameters["lr"]

    probe, first, _ = searched(tmp_path, FakePool(value=fragile))
    assert probe.best is None and str(probe) == ("nothing is chosen for LinearProbe on digits; 10 of 10 trials failed")
    good = [cell.hyperparameters["lr"] for cell, score in first.scores if score is not None]
    assert 1 < len(good) < 10 and all(5e-4 <= lr <= 2e-3 for lr in good)
    assert first.best[0].hyperparameters["lr"] == first.best[1] == max(good)
    assert f"{10 - len(good)} of 10 trials failed" in str(first) and "recipe 0.1 %" in str(first)
    assert capsys.readouterr().out.count("search, on train and val: trials ") == 3


def test_results_of_another_version_count_for_nothing(tmp_path):
    def broken(cell):
        raise ValueError("it worked once")

    searched(tmp_path, FakePool(), 1)
    store = tmp_path / "tiny_search.jsonl"
    store.write_text(store.read_text().replace(f'"version": "{__version__}"', '"version": "0.0.1"'))
    assert [study.best for study in searched(tmp_path, FakePool(value=broken), 1)] == [None] * 3


def test_of_equals_the_earlier_trial_wins(tmp_path):
    for study in searched(tmp_path, FakePool(value=lambda cell: 0.5)):
        assert study.best[0].hyperparameters == study.own


def test_trials_leave_no_weights(tmp_path):
    searched(tmp_path, FakePool(), 2)
    assert len(list((tmp_path / "runs").glob("*/"))) > 5 and not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("name", sorted(SUITES))
def test_trials_never_see_test_images(name):
    """Their config names the data of train and val, and nothing that is in test; val is no part of train."""
    suite = SUITES[name]()
    for task in suite.tasks.values():
        train, val, trainval, test = (task.data[split] for split in SPLITS)
        assert val not in (train, trainval, test) and train != test
        assert (train == trainval) == (name == "fewshot")  # its final model is not trained on val
        cell = Cell(suite, task, "AdaptFormer", 0, own_values("AdaptFormer"), select=True)
        try:
            found = cell.config.to_dict()
        except InputError:  # the mean of their bands is read from the images, which are not here
            assert task.channels != 3
            continue
        assert "test_dataloader" not in found
        for loader, wanted in (("train_dataloader", train), ("val_dataloader", val)):
            assert wanted.items() <= found[loader]["dataset"].items()
            assert "test" not in found[loader]["dataset"].values()


def test_chosen_values_that_are_the_recipes_are_not_run_again(tmp_path):
    """The line of the table without search is stored once more, under the values that were chosen."""
    suite, store = tiny_suite(), Store(tmp_path / "tiny.jsonl")
    default = [Cell(suite, suite.tasks["digits"], "LinearProbe", seed) for seed in (0, 1)]
    chosen = [Cell(suite, suite.tasks["digits"], "LinearProbe", s, own_values("LinearProbe")) for s in (0, 1, 2)]
    other = Cell(suite, suite.tasks["digits"], "LinearProbe", 0, dict(lr=0.1, weight_decay=0.0))
    for cell in default:
        store.append(dict(config_hash=cell.key, version=__version__, hyperparameters={}, value=0.5))
    store.append(dict(config_hash=other.key, version="0.0.1", hyperparameters={}, value=0.1))
    for _ in range(2):
        share([*chosen, other, *default], store)
    lines = [json.loads(line) for line in store.path.read_text().splitlines()]
    assert [line["hyperparameters"] for line in lines[3:]] == [own_values("LinearProbe")] * 2
    assert [line["config_hash"] for line in lines[3:]] == [cell.key for cell in default]
    assert chosen[2].key not in store.finished()


def test_a_table_without_search_takes_what_a_search_has_run(tmp_path):
    suite, store = tiny_suite(), Store(tmp_path / "tiny.jsonl")
    default, chosen = (Cell(suite, suite.tasks["digits"], "BitFit", 0, found) for found in ({}, own_values("BitFit")))
    store.append(dict(config_hash=chosen.key, version=__version__, hyperparameters=own_values("BitFit"), value=0.5))
    share([default], store)
    assert json.loads(store.path.read_text().splitlines()[1])["hyperparameters"] == {}


@pytest.fixture
def tiny_sweeps(tmp_path, monkeypatch):
    """The command in an empty folder, with the tiny suite in place of "offline" and a pool that runs nothing."""
    from visadapt.benchmark import local_pool, report, suites

    pools = []

    def pool(workers, threads):
        pools.append(FakePool(workers))
        return pools[-1]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(suites.SUITES, "offline", tiny_suite)
    monkeypatch.setattr(local_pool, "LocalPool", pool)
    monkeypatch.setattr(report, "write_report", lambda: [])
    return pools


def test_the_command_searches_and_then_runs_what_was_chosen(tiny_sweeps, tmp_path, capsys, monkeypatch):
    from visadapt.commands import _sweeps

    monkeypatch.setattr(
        _sweeps, "_on_disk", lambda chosen, tasks, splits, draws: (tasks if splits == SPLITS else [], [])
    )
    words = ["bench", "offline", "--adapters", "LinearProbe", "AdaptFormer", "--tasks", "digits", "--seeds", "3", "4"]
    assert main([*words, "--search", "5", "--workers", "2"]) == 0
    ran = tiny_sweeps[0].ran
    trials, final = ran[:10], ran[10:]
    assert all(cell.select and cell.seed == 3 for cell in trials) and not any(cell.select for cell in final)
    assert sorted((c.method, c.seed) for c in final) == [(m, s) for m in ("AdaptFormer", "LinearProbe") for s in (3, 4)]
    for cell in final:
        best = max((t for t in trials if t.method == cell.method), key=peak)
        assert peak(cell) == peak(best) and cell.hyperparameters == best.hyperparameters
    said = capsys.readouterr().out
    parts = [
        said.index(t) for t in ("trials 1 to 4 of 5", "trials 5 to 5 of 5", "chosen for AdaptFormer", "final runs")
    ]
    assert parts == sorted(parts)
    assert len((tmp_path / "benchmark_results/offline_search.jsonl").read_text().splitlines()) == 10
    assert len((tmp_path / "benchmark_results/offline.jsonl").read_text().splitlines()) == 4


def test_where_everything_fails_there_is_no_report_to_write(tiny_sweeps, capsys, monkeypatch):
    from visadapt.benchmark import local_pool, report
    from visadapt.commands import _sweeps

    def broken(cell):
        raise ValueError("it is broken")

    monkeypatch.setattr(_sweeps, "_on_disk", lambda chosen, tasks, *rest: (tasks, []))
    monkeypatch.setattr(local_pool, "LocalPool", lambda workers, threads: FakePool(workers, broken))
    monkeypatch.setattr(report, "write_report", lambda: pytest.fail("there are no results"))
    assert main(["bench", "offline", "--adapters", "LinearProbe", "--tasks", "digits", "--seeds", "1", "1"]) == 1
    assert capsys.readouterr().err == "failed: LinearProbe digits seed 1: it is broken\n"  # a seed counts once


def test_without_optuna(tiny_sweeps, capsys, monkeypatch):
    from visadapt.commands import _sweeps

    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "optuna":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(_sweeps, "_on_disk", lambda chosen, tasks, *rest: (tasks, []))
    monkeypatch.setattr(builtins, "__import__", missing)
    assert main(["bench", "offline", "--adapters", "LinearProbe", "--search", "2"]) == 2
    assert "pip install 'visadapt[search]'" in capsys.readouterr().err
