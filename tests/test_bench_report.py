"""The report says what the stored lines say: nothing is averaged that is unlike, and what is missing is said."""

from __future__ import annotations

import csv
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from visadapt.benchmark.report import stale, write_report
from visadapt.benchmark.report.notes import facts, notes, protocol
from visadapt.benchmark.report.page import _columns
from visadapt.benchmark.report.plots import Point, as_bytes, front
from visadapt.benchmark.report.significance import compare, holm, reference
from visadapt.benchmark.report.stored import SUITES, join, read_suite
from visadapt.benchmark.report.tables import build
from visadapt.benchmark.suites import SUITES as RUN
from visadapt.errors import InputError

COMMITTED = Path(__file__).parents[1] / "benchmark_results"


def line(method="LoRA", task="eurosat", seed=0, value=0.5, **changes) -> dict:
    found = dict(suite="offline", method=method, task=task, group="remote sensing", seed=seed, value=value)
    found |= dict(backbone="vit, dinov2_vits14_focus", metric="top1", metrics={"top1": value}, hyperparameters={})
    found |= dict(protocol={"size": 56, "epochs": 8}, train_images=1000, test_images=500, trainable_params=5000)
    found |= dict(head_params=3850, stored_bytes=20_000, step_time_ratio=1.25, memory_ratio=None, seconds=60.0)
    found |= dict(threads=1, machine="x86_64", config=f"benchmark_results/configs/offline/{method}_{task}.py")
    found |= dict(adapter_file=f"work_dirs/bench/{method}{task}{seed}/a.safetensors", config_hash="0", version="0.1.0")
    return found | changes


def stored(folder: Path, lines: list[dict], suite: str = "offline") -> Path:
    folder = folder / "benchmark_results"
    folder.mkdir(exist_ok=True)
    (folder / f"{suite}.jsonl").write_text("".join(json.dumps(found) + "\n" for found in lines))
    return folder


def table_of(lines: list[dict], suite: str = "offline"):
    scores, aside = join(lines)
    return build(suite, scores), aside


def test_the_report_knows_every_suite():
    assert set(SUITES) == set(RUN)


def test_committed_files_are_those_of_the_stored_lines():
    """If this fails run `visadapt bench report` and commit what it wrote."""
    assert stale(COMMITTED) == []


def test_versions_are_not_averaged():
    """0.10 is newer than 0.9; a method that only the older one has run is shown and averaged with nothing newer."""
    lines = [line(version="0.10.0", value=0.6), line(version="0.9.0", value=0.2), line(seed=1, version="0.9.0")]
    lines += [line("SSF", version="0.9.0"), line("SSF", "omniglot", version="0.10.0"), line("LoRA", "omniglot")]
    table, aside = table_of(lines)
    lora, ssf = (next(row for row in table.rows if row.label == name) for name in ("LoRA", "SSF"))
    assert lora.scores["eurosat"].by_seed == {0: 0.6} and aside.versions == {"0.9.0": 2}
    assert lora.stat(table.means[0].weights) is None and ssf.stat(table.means[0].weights) is None
    said = " ".join(notes(table, aside))
    assert "2 results of version 0.9.0 are set aside; run the sweep again" in said
    assert "Not yet run by version 0.10.0" in said and "SSF on eurosat (0.9.0)" in said


def test_only_runs_made_alike_are_joined_and_the_last_of_a_seed_counts():
    lines = [line(value=0.1, protocol={"size": 112}), line(seed=1, value=0.3, test_images=10)]
    lines += [line(value=0.4), line(value=0.5), line(seed=1, value=0.7)]
    table, aside = table_of(lines)
    score = table.rows[0].scores["eurosat"]
    assert score.by_seed == {0: 0.5, 1: 0.7} and (aside.settings, aside.repeated) == (2, 1)
    assert score.stat == pytest.approx((0.6, 0.02**0.5))
    assert any("1 result is stored twice" in note for note in notes(table, aside))


def test_a_trial_displaces_no_run_and_stands_in_no_table():
    """What most methods of a task share is shown, whatever came last; learning rates are the methods' own."""

    def run(method, seed=0, epochs=8, lr=0.1, **changes):
        return line(method, seed=seed, protocol={"epochs": epochs, "lr": lr, "weight_decay": 0.0}, **changes)

    full = [run(method, seed, lr=lr) for method, lr in (("LoRA", 0.1), ("SSF", 0.2)) for seed in range(3)]
    trials = [run("LoRA", seed, epochs=1) for seed in range(7)]  # more runs than all others, of fewer methods
    table, aside = table_of([*full, *trials, run("VPT", backbone="vit, timm")])
    shown = {row.label: row.scores["eurosat"] for row in table.rows}
    assert {method: list(score.by_seed) for method, score in shown.items()} == {"LoRA": [0, 1, 2], "SSF": [0, 1, 2]}
    assert shown["LoRA"]["protocol"]["epochs"] == 8 and aside.settings == 8
    assert table_of([*full, trials[0]])[0].rows == table.rows
    assert any(note.startswith("8 runs made otherwise") and note.endswith("not shown.") for note in notes(table, aside))
    table, aside = table_of([*full, run("LoRA", seed=3, lr=0.3)])  # a recipe that changed
    assert {row.label: len(row.scores["eurosat"].runs) for row in table.rows} == {"LoRA": 1, "SSF": 3}
    assert aside.settings == 3


@pytest.mark.parametrize(
    "second, shown",
    [([{}], 1), ([{}, {"seed": 1}], 9), ([{"version": "0.10.0"}], 9), ([{"version": "0.0.9"}, {"seed": 1}], 9)],
)
def test_of_two_protocols_with_equally_many_methods(second, shown):
    """The newest version, then the most runs, then the first stored."""
    table, _ = table_of([line(protocol={"epochs": 1}), *(line(protocol={"epochs": 9}, **found) for found in second)])
    assert table.score_of("eurosat")["protocol"] == {"epochs": shown}


def test_settings_that_differ_are_said():
    lines = [line(protocol={"epochs": 8, "lr": 0.1}), line("SSF", protocol={"epochs": 8, "lr": 0.01})]
    assert protocol(table_of(lines)[0]) == "Training: epochs 8; lr 0.01 to 0.1, by method or task."
    lines[0]["protocol"] = {"epochs": 8, "lr": None}
    assert protocol(table_of(lines)[0]) == "Training: epochs 8; lr 0.01 or None, by method or task."


@pytest.mark.parametrize(
    "bad, said",
    [
        ("{", "no JSON object"),
        ("[1]", "no JSON object"),
        (json.dumps({k: v for k, v in line().items() if k != "stored_bytes"}), "no stored_bytes"),
        (json.dumps(line(value=93.1)), "93.1 is no fraction"),
        (json.dumps(line(suite="vtab")), "suite 'vtab'"),
        (json.dumps(line(seed="0")), "wrong type of seed"),
        (json.dumps(line(version="new")), "'new' is no version"),
        (json.dumps(line(protocol={})), "no epochs in its protocol"),
    ],
)
def test_a_broken_line_is_named(tmp_path, bad, said):
    folder = stored(tmp_path, [line()])
    with open(folder / "offline.jsonl", "a") as file:
        file.write(bad + "\n")
    with pytest.raises(InputError, match=rf"offline.jsonl:2: .*{said}.*; mend or remove the line"):
        read_suite(folder, "offline")
    with pytest.raises(InputError):
        stale(folder)


def test_vtab_means():
    """The mean of the group means is not the mean of the tasks: groups differ in size."""
    values = {("cifar", "natural"): (0.9, 0.7), ("dtd", "natural"): (0.5, 0.5), ("kitti", "structured"): (0.2, 0.4)}
    lines = [
        line("SSF", task, seed, value, suite="vtab", group=group)
        for (task, group), found in values.items()
        for seed, value in enumerate(found)
    ]
    table, aside = table_of(lines, "vtab")
    found = {mean.name: table.rows[0].stat(mean.weights) for mean in table.means}
    assert list(found) == ["mean of 2 group means", "mean of 3 tasks", "natural (2)", "structured (1)"]
    assert [stat.mean for stat in found.values()] == pytest.approx([0.475, 1.6 / 3, 0.65, 0.3])
    assert found["mean of 2 group means"].std == pytest.approx(0.05 / 2**0.5)  # 0.45 and 0.5 of the seeds
    assert notes(table, aside)[0].startswith("3 of the 19 tasks were run")


def test_there_is_no_mean_over_unlike_metrics():
    """Neither of values nor of differences; the task that most methods have ranks, and its column comes first."""
    tasks = {"dubai": "miou", "eurosat": "top1", **{f"t{n}": "top1" for n in range(6)}}
    lines = [
        line(method, task, value=value, metric=metric)
        for method, value in (("LoRA", 0.5), ("SSF", 0.6))
        for task, metric in tasks.items()
    ]
    lines += [line("VPT", "t3", value=0.9)]
    table, aside = table_of(lines)
    assert table.means == [] and table.headline.name == "t3"
    assert [row.label for row in table.rows] == ["VPT", "SSF", "LoRA"]
    assert {c.label: c.tasks for c in compare(table)} == {"VPT": 1, "SSF": 7}
    names = [head["name"] for head, _ in _columns(table, Path("results"))]
    assert names[:2] == ["t3", "trainable"] and sorted(names[5:]) == sorted(set(tasks) - {"t3"})
    assert not any("mean" in note for note in notes(table, aside))
    grouped = [
        line(task=t, metric=m, group=g) for t, m, g in (("a", "top1", "x"), ("b", "miou", "x"), ("c", "top1", "y"))
    ]
    assert [mean.name for mean in table_of(grouped, "vtab")[0].means] == ["y (1)"]


def test_shots_are_not_averaged_with_each_other():
    """Groups come in the order of their numbers; published means are over eleven sets each."""
    shots = {"a-2shot": 0.4, "b-2shot": 0.6, "a-16shot": 0.9}
    lines = [
        line(method, task, value=value + more, group=f"{task[2:-4]}-shot", suite="fewshot")
        for method, more in (("LoRA", 0), ("SSF", 0.05))
        for task, value in shots.items()
    ]
    table, aside = table_of(lines, "fewshot")
    assert [mean.name for mean in table.means] == ["2-shot (2)", "16-shot (1)"] and table.headline is table.means[0]
    assert table.rows[1].stat(table.headline.weights).mean == pytest.approx(0.5)
    assert [c.tasks for c in compare(table)] == [2]
    said = "2 of the 11 tasks of 2-shot, 1 of the 11 tasks of 16-shot were run: no mean over them is that of papers."
    assert notes(table, aside)[0] == said
    only = [found for found in lines if found["task"] == "a-16shot"] + [line("VPT", "a-2shot", group="2-shot")]
    assert table_of(only, "fewshot")[0].headline.name == "16-shot (1)"  # the first mean that half of the rows have


def test_rank_is_by_the_mean_where_most_have_it_and_else_by_the_widest_task():
    both = [line(m, t, value=v) for m, v in (("A", 0.4), ("B", 0.8)) for t in ("eurosat", "omniglot")]
    few = [line(m, value=v) for m, v in (("C", 0.9), ("D", 0.6), ("E", 0.5))]
    table, _ = table_of(both + few[:1])
    assert (table.headline.name, [row.label for row in table.rows]) == ("mean of 2 tasks", ["B", "A", "C"])
    table, aside = table_of(both + few)
    assert (table.headline.name, [row.label for row in table.rows]) == ("eurosat", ["C", "B", "D", "E", "A"])
    assert "2 of 5 methods were run on omniglot." in notes(table, aside)


def test_costs_are_over_the_tasks_of_the_headline_or_there_are_none(tmp_path):
    lines = [line(m, t, stored_bytes=b) for m in ("A", "B") for t, b in (("eurosat", 10_000), ("omniglot", 30_000))]
    lines += [line("C"), line("D"), line("D", "omniglot", step_time_ratio=None)]
    table, _ = table_of(lines)
    cost = {row.label: row.cost("stored_bytes", table.headline.weights) for row in table.rows}
    assert cost == {"A": 20_000, "B": 20_000, "C": None, "D": 20_000}
    assert [row.cost("step_time_ratio", table.headline.weights) for row in table.rows] == [1.25, 1.25, None, None]
    write_report(stored(tmp_path, lines))
    assert "| C | 50.0 | - | - | 1 | - | - | - |" in (tmp_path / "model_zoo.md").read_text()


def test_memory_is_said_to_leave_out_what_is_held():
    table, said = table_of([line()])[0], "without weights and optimizer moments"
    heads = {head["name"]: head for head, _ in _columns(table, Path("results"))}
    assert said in dict(facts([table]))["cost"] and said in heads["memory"]["tip"]


def test_hyperparameters_are_not_picked_on_test_images():
    """One choice per task shares a row; of several choices for a task each has its own."""
    lines = [line(), line(hyperparameters={"lr": 0.1}), line(task="omniglot", hyperparameters={"lr": 0.2})]
    assert {row.label for row in table_of(lines)[0].rows} == {"LoRA", "LoRA (chosen per task)"}
    lines.append(line(hyperparameters={"lr": 0.2}))
    assert {row.label for row in table_of(lines)[0].rows} == {"LoRA", "LoRA (lr 0.1)", "LoRA (lr 0.2)"}


def test_significance_is_paired_and_never_of_few_pairs():
    tasks = [f"t{n}" for n in range(6)]
    base = [0.1, 0.9, 0.5, 0.3, 0.7, 0.2]
    lines = [line("LoRA", t, value=v) for t, v in zip(tasks, base)]
    lines += [line("Better", t, value=v + 0.01 * (n + 1)) for n, (t, v) in enumerate(zip(tasks, base))]
    lines += [line("Equal", t, value=v + 0.05 * (n == 0)) for n, (t, v) in enumerate(zip(tasks, base))]
    lines += [line("Five", t, value=v - 0.05) for t, v in zip(tasks[:5], base)]
    lines += [line("Old", t, version="0.0.1") for t in tasks]  # another version pairs with nothing
    table, _ = table_of(lines)
    found = {c.label: c for c in compare(table)}
    assert reference(table).label == "LoRA" and set(found) == {"Better", "Equal", "Five"}
    better = found["Better"]
    assert (better.tasks, better.pairs, better.better, better.worse) == (6, 6, 6, 0)
    assert better.difference == pytest.approx(0.035) and better.p == pytest.approx(2 / 2**6)  # all signs equal
    assert found["Equal"].p is None and found["Five"].p is None and found["Five"].worse == 5


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_front_keeps_what_no_other_beats():
    points = [Point(name, x, y, "") for name, x, y in (("a", 1, 1), ("b", 2, 1), ("c", 2, 3), ("d", 3, 2), ("e", 4, 4))]
    assert [point.name for point in front(points)] == ["a", "c", "e"]


def test_sizes_for_people():
    assert [as_bytes(v) for v in (512, 30_949, 2_716_552, 88_284_000)] == ["512 B", "30.9 kB", "2.72 MB", "88.3 MB"]


class Page(HTMLParser):
    """Text, links and what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.links, self.fetched, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.open += [tag] if tag not in ("meta", "br") else []
        self.links += [attrs["href"]] if tag == "a" else []
        self.fetched += [tag] if tag in ("link", "img", "iframe") or "src" in attrs else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of two suites in which a run diverged, a seed is missing and a name is hostile."""
    folder = tmp_path_factory.mktemp("report")
    lines = [line(m, t, s, 0.5 + 0.01 * s) for m in ("LoRA", "SSF") for t in ("eurosat", "omniglot") for s in (0, 1)]
    lines += [line("<b>$x", value=0.9, step_time_ratio=math.nan), line("<b>$x", "omniglot", value=math.nan)]
    stored(folder, [line("Hydra", "kitti", value=0.25, suite="vtab", group="structured")], "vtab")
    folder = stored(folder, lines)
    assert {path.name for path in write_report(folder)} == {"model_zoo.md", "report.csv", "report.html"}
    return folder


def test_the_page_opens_offline_and_links_to_configs(written):
    text = (written / "report.html").read_text()
    page = Page(text)
    assert (
        not page.fetched
        and not page.open
        and "http" not in text.replace('"http://www.w3.org/', "")
        and "url(h" not in text
    )
    assert "<b>$x" in page.text and "<b>" not in text
    assert {"configs/offline/LoRA_eurosat.py", "../work_dirs/bench/SSFomniglot1/a.safetensors"} <= set(page.links)
    assert "1 of 2 seeds" in page.text and "not finite" in page.text
    said = " ".join(page.text)
    assert "fine-tuned for saliency" in said and "No finite value in every run: <b>$x on omniglot." in said
    assert "too few pairs" in said and text.count("<svg") == 2  # one method of VTAB makes no plot


def test_csv_has_a_line_per_setting(written):
    with open(written / "report.csv", newline="") as file:
        rows = {(row["suite"], row["task"], row["method"]): row for row in csv.DictReader(file)}
    assert len(rows) == 7
    row = rows["offline", "eurosat", "SSF"]
    assert (row["mean"], row["n"], row["seeds"], row["stored_bytes"]) == ("0.505", "2", "0 1", "20000")
    assert float(row["std"]) == pytest.approx(0.01 / 2**0.5, abs=1e-6) and row["memory_ratio"] == ""
    assert rows["offline", "omniglot", "<b>$x"]["mean"] == "nan"


def test_zoo_has_the_offline_suite(written):
    zoo = (written.parent / "model_zoo.md").read_text()
    assert "| LoRA | 50.5 ± 0.7 | 50.5 ± 0.7 | 50.5 ± 0.7 | 2 | 5,000 | 20.0 kB | 1.25 |" in zoo
    assert "under one protocol, 8 epochs, with" in zoo and "Backbone: vit, dinov2_vits14_focus. This DINOv2" in zoo
    assert "hydra" not in zoo.lower() and "Single runs" not in zoo


def test_zoo_says_what_the_lines_say(tmp_path):
    """Another backbone, and lengths by task."""
    lines = [line(task=t, backbone="vit, timm", protocol={"epochs": e}) for t, e in (("a", 8), ("b", 1), ("c", 8))]
    write_report(stored(tmp_path, lines))
    zoo = (tmp_path / "model_zoo.md").read_text()
    assert "under one protocol, 8 epochs (a, c) or 1 epoch (b), with" in zoo
    assert "Backbone: vit, timm.\n" in zoo and "saliency" not in zoo and "focus" not in zoo


def test_equal_lines_give_equal_files_and_others_make_them_stale(written, tmp_path):
    again = tmp_path / "benchmark_results"
    again.mkdir()
    for suite in ("offline", "vtab"):
        (again / f"{suite}.jsonl").write_bytes((written / f"{suite}.jsonl").read_bytes())
    assert stale(again) == ["model_zoo.md", "report.csv", "report.html"]
    write_report(again)
    assert stale(again) == []
    for name in ("../model_zoo.md", "report.csv", "report.html"):
        assert (again / name).read_bytes() == (written / name).read_bytes()
    (again / "report.csv").write_text("edited")
    assert stale(again) == ["report.csv"]
    with open(again / "vtab.jsonl", "a") as file:
        file.write(json.dumps(line("SSF", "kitti", suite="vtab")) + "\n")
    assert stale(again) == ["report.csv", "report.html"]


def test_without_results_there_is_no_report(tmp_path):
    with pytest.raises(InputError, match="no results"):
        write_report(tmp_path / "benchmark_results")
