"""Hooks: what they compute, write and remember. Whole runs stand in test_end_to_end.py."""

from __future__ import annotations

import copy
import json
import uuid
from types import SimpleNamespace

import pytest
import torch
from cases import TINY
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

from visadapt import checkpoint
from visadapt.core.io import read_manifest
from visadapt.datasets.base import collate
from visadapt.datasets.sampler import EpochSampler
from visadapt.engine import AdaptRunner
from visadapt.errors import InputError
from visadapt.hooks.cache import CacheFeatures, cached
from visadapt.hooks.files import AdapterFiles, Checkpoints, Console, MetricsFile
from visadapt.hooks.steps import EarlyStop, StepSeed, TrainableEMA
from visadapt.optim.groups import TrainableGroups
from visadapt.optim.wrapper import AutocastOptimWrapper
from visadapt.tasks.classify import ImageClassifier
from visadapt.testing import assert_close, noise

NAN = float("nan")


# ---- tiny runs -------------------------------------------------------------------------------------------------------
class Pictures(Dataset):
    """Six random images of three classes, of which one can be unreadable."""

    classes = ("a", "b", "c")
    metainfo = {"classes": classes}

    def __init__(self, unreadable=None, transform=None):
        self.unreadable, self.transform = unreadable, transform
        self.images = torch.randint(0, 256, (6, 3, 28, 28), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return 6

    def __getitem__(self, item):
        index = item if isinstance(item, int) else item.index
        path, valid = f"{index}.png", index != self.unreadable
        sample = dict(inputs=self.images[index], label=index % 3, index=index, path=path)
        return sample | dict(valid=valid, unreadable="" if valid else path)


class Scripted(BaseMetric):
    """Gives the metrics that the test wants, one validation after another."""

    default_prefix = None

    def __init__(self, values):
        super().__init__()
        self.values = list(values)

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return {"top1": self.values.pop(0)}


def classifier(rank=2, seed=0, **settings):
    torch.manual_seed(seed)
    adapters = {"main": dict(type="LoRA", rank=rank)} if rank else None
    return ImageClassifier(TINY["vit"], head=dict(type="LinearHead", num_classes=3), adapters=adapters, **settings)


def loader(dataset=None, **sampler):
    dataset = dataset or Pictures()
    return DataLoader(dataset, 2, sampler=EpochSampler(dataset, seed=5, **sampler), collate_fn=collate)


OPTIMIZER = dict(type=AutocastOptimWrapper, constructor=TrainableGroups, optimizer=dict(type="AdamW", lr=0.01))


def train(folder, values, *hooks, checkpoints=None, resume=False, **loop):
    """A finished run of three steps per epoch, whose validations after every epoch give `values`, if there are any."""
    loop = loop or dict(by_epoch=True, max_epochs=len(values))
    validation = dict(val_dataloader=loader(shuffle=False), val_cfg={}, val_evaluator=Evaluator([Scripted(values)]))
    runner = AdaptRunner(
        classifier(),
        str(folder),
        train_dataloader=loader(endless=not loop["by_epoch"]),
        train_cfg=loop,
        **(validation if values else {}),
        optim_wrapper=copy.deepcopy(OPTIMIZER),
        default_hooks=dict(checkpoint=checkpoints, logger=None),
        resume=resume,
        randomness=dict(seed=0),
        log_level="ERROR",
        experiment_name=uuid.uuid4().hex,
    )
    runner.register_custom_hooks([StepSeed(), *hooks])
    runner.train()
    return runner


def weights(runner):
    return {n: p.detach().clone() for n, p in runner.model.named_parameters() if p.requires_grad}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], v) for k, v in wanted.items())


# ---- steps -----------------------------------------------------------------------------------------------------------
def test_draws_depend_on_run_step_and_rank_alone():
    def draw(seed=1, step=4, rank=0):
        StepSeed().before_train_iter(SimpleNamespace(seed=seed, iter=step, rank=rank), 0)
        return torch.rand(1).item()

    assert draw() == draw()
    assert len({draw(), draw(seed=2), draw(step=5), draw(rank=1), draw(seed=None)}) == 5


class Look(Hook):
    """Notes the trainable weights behind every other hook."""

    priority = 99

    def __init__(self):
        self.seen = []

    def note(what):
        def hook(self, runner, *args, **kwargs):
            self.seen.append((what, weights(runner)))

        return hook

    before_train, after_train = note("start"), note("end")
    before_train_iter, after_train_iter = note("before"), note("step")
    before_val_epoch, after_val_epoch = note("val"), note("val")


def test_moving_average_is_that_by_hand_and_is_in_the_model_for_validation_only(tmp_path):
    train(tmp_path, [0.1, 0.2], look := Look(), TrainableEMA(momentum=0.3))
    average, raw = look.seen[0][1], look.seen[0][1]
    for what, values in look.seen[1:]:
        if what == "step":
            raw = values
            average = {n: 0.7 * average[n] + 0.3 * raw[n] for n in average}
        elif what == "before":
            assert_same(values, raw)
        else:
            for name, value in values.items():
                assert_close(value, average[name], f"{what} {name}", 1e-6)
    assert [what for what, _ in look.seen].count("val") == 4
    assert (average["head.fc.weight"] - raw["head.fc.weight"]).abs().max() > 1e-3


def test_moving_average_goes_through_its_state_also_while_it_is_in_the_model():
    runner, other = (SimpleNamespace(model=classifier()) for _ in "12")
    ema, later = TrainableEMA(0.5), TrainableEMA(0.5)
    ema.before_train(runner)
    noise(p for p in runner.model.parameters() if p.requires_grad)
    raw = weights(runner)
    ema.after_train_iter(runner, 0)
    ema.before_val_epoch(runner)
    assert not torch.equal(weights(runner)["head.fc.weight"], raw["head.fc.weight"])
    other.model.load_state_dict(runner.model.state_dict())
    later.load_state_dict(ema.state_dict(), other)
    later.before_train(other)
    later.before_train_iter(other, 0)
    assert_same(weights(other), raw)
    later.after_train(other)
    assert_same(weights(other), weights(runner))


@pytest.mark.parametrize(
    ("values", "settings", "stops"),
    [
        ([0.5, 0.6, 0.6, 0.7, 0.7, 0.7], dict(patience=2), 6),
        ([0.5, 0.4, 0.6, 0.5], dict(patience=1, rule="less"), 3),
        ([0.5, 0.54, 0.56, 0.6], dict(patience=1, min_delta=0.05), 2),
        ([0.5, 0.54, 0.56, 0.6, 0.61], dict(patience=2, min_delta=0.05), 5),
        ([NAN, 0.1, NAN, 0.2, NAN, NAN], dict(patience=2), 6),
        ([NAN, NAN, 0.1], dict(patience=2), 2),
        ([0.1, 0.2, 0.3], dict(patience=1), None),
    ],
)
def test_early_stop(values, settings, stops):
    """The validation after which training stops; every time in a fresh hook that takes over the state."""
    runner, state = SimpleNamespace(train_loop=SimpleNamespace(stop_training=False)), None
    count = 0
    for value in values:
        hook = EarlyStop(**settings)
        if state is not None:
            hook.load_state_dict(state, runner)
        hook.before_train(runner)
        assert not runner.train_loop.stop_training
        hook.after_val_epoch(runner, {"top1": value})
        state, count = hook.state_dict(), count + 1
        if runner.train_loop.stop_training:
            break
    assert (count if runner.train_loop.stop_training else None) == stops
    hook.before_train(runner)
    assert runner.train_loop.stop_training == (stops is not None)  # a resume does not go on either


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainableEMA(0.0), r"momentum must be in \(0, 1\], got 0"),
        (lambda: EarlyStop(rule="more"), "rule is 'greater' or 'less', got 'more'"),
        (lambda: EarlyStop(patience=0), "patience must be at least 1, got 0"),
        (lambda: AdapterFiles(rule="more"), "rule is 'greater' or 'less', got 'more'"),
        (lambda: Checkpoints(interval=0), "interval and keep must be at least 1, got 0 and 2"),
        (lambda: EarlyStop("f1").after_val_epoch(None, {"top1": 1.0}), "EarlyStop: no metric 'f1'; .* gives top1"),
        (lambda: AdapterFiles("f1").after_val_epoch(None, {}), "AdapterFiles: no metric 'f1'; .* gives none"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


# ---- files -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "rule", "best"),
    [
        ([0.5, 0.3, 0.4], "less", 2),
        ([0.5, 0.3, 0.5], "greater", 1),
        ([NAN, 0.3, NAN], "greater", 2),
        ([NAN, NAN, 0.3], "less", 3),
    ],
)
def test_the_best_file_is_that_of_the_best_validation(tmp_path, values, rule, best):
    """With the weights of that moment, which are the moving average's; the last file has those of the end."""
    runner = train(tmp_path, values, look := Look(), TrainableEMA(0.3), AdapterFiles(rule=rule))
    at_end_of = [seen for what, seen in look.seen if what == "val"][1::2]
    for name, epoch in (("best", best), ("last", len(values))):
        tensors = load_file(tmp_path / f"adapter_{name}.safetensors")
        manifest = read_manifest(tmp_path / f"adapter_{name}.safetensors")
        assert torch.equal(tensors["heads/main/fc.weight"], at_end_of[epoch - 1]["head.fc.weight"])
        assert (manifest["epoch"], manifest["iter"], manifest["seed"]) == (epoch, 3 * epoch, runner.seed)
        assert str(manifest["metrics"]["top1"]) == str(values[epoch - 1])
        assert manifest["classes"] == ["a", "b", "c"]


def test_a_run_without_validation_leaves_the_moving_average(tmp_path):
    train(tmp_path, [], look := Look(), AdapterFiles(), TrainableEMA(0.3), by_epoch=True, max_epochs=1)
    (_, raw), (what, end) = look.seen[-2:]
    assert what == "end" and not torch.equal(end["head.fc.weight"], raw["head.fc.weight"])
    tensors = load_file(tmp_path / "adapter_last.safetensors")
    assert torch.equal(tensors["heads/main/fc.weight"], end["head.fc.weight"])


@pytest.mark.parametrize(
    ("loop", "settings"),
    [
        (dict(by_epoch=True, max_epochs=3), dict()),
        (dict(by_epoch=False, max_iters=9, val_interval=3), dict(by_epoch=False, interval=3)),
    ],
)
def test_a_checkpoint_holds_the_outcome_of_the_validation_at_its_step(tmp_path, loop, settings):
    values = [0.5, 0.9, 0.7]
    train(tmp_path, values, AdapterFiles(), EarlyStop(), checkpoints=Checkpoints(**settings, keep=3), **loop)
    for i, path in enumerate(checkpoint.numbered(tmp_path)):
        hooks = checkpoint.read(path)["hooks"]
        assert hooks["AdapterFiles"]["best"] == hooks["EarlyStop"]["best"] == max(values[: i + 1])
        assert hooks["AdapterFiles"]["metrics"] == {"top1": values[i]}


def test_a_resumed_run_knows_its_best_metric(tmp_path):
    train(tmp_path, [0.5, 0.9, 0.7], AdapterFiles(), EarlyStop(patience=2), checkpoints=Checkpoints())
    (tmp_path / "epoch_3.pth").unlink()
    files, stop = AdapterFiles(), EarlyStop(patience=2)
    loop = dict(by_epoch=True, max_epochs=4)
    runner = train(tmp_path, [0.7, 0.8], files, stop, checkpoints=Checkpoints(), resume=True, **loop)
    assert read_manifest(tmp_path / "adapter_best.safetensors")["epoch"] == 2
    assert (files.best, stop.best, stop.waited, runner.epoch) == (0.9, 0.9, 2, 4)


@pytest.mark.parametrize(
    ("loop", "settings", "left"),
    [
        (dict(by_epoch=True, max_epochs=5), dict(interval=2, keep=1), ["epoch_4.pth"]),
        (dict(by_epoch=True, max_epochs=3), dict(), ["epoch_2.pth", "epoch_3.pth"]),
        (dict(by_epoch=False, max_iters=11), dict(by_epoch=False, interval=5), ["iter_10.pth", "iter_5.pth"]),
    ],
)
def test_checkpoints_come_at_their_interval_and_old_ones_go(tmp_path, loop, settings, left):
    train(tmp_path, [0.1] * 5, checkpoints=Checkpoints(**settings), **loop)
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == left
    for path in tmp_path.glob("*.pth"):
        meta, number = checkpoint.read(path)["meta"], int(path.stem.split("_")[1])
        assert meta["iter" if "iter" in path.name else "epoch"] == number


def metrics_run(folder, step, rates=None, **changes):
    wrapper = SimpleNamespace(get_lr=lambda: rates or {"lr": [0.5]})
    settings = dict(work_dir=str(folder), iter=step, epoch=step // 4, max_iters=10, rank=0, optim_wrapper=wrapper)
    return SimpleNamespace(**settings | changes)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_come_every_few_steps_at_the_end_and_with_each_validation(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')  # of a run that began anew
    hook = MetricsFile(interval=4)
    hook.before_train(metrics_run(tmp_path, 0))
    for step in range(10):
        hook.after_train_iter(metrics_run(tmp_path, step), 0, outputs={"loss": torch.tensor(step / 2)})
    hook.after_val_epoch(metrics_run(tmp_path, 10), {"top1": 0.25})
    hook.after_val_epoch(metrics_run(tmp_path, 10, rank=1), {"top1": 0.5})
    entries = lines_of(tmp_path)
    assert all(entry.pop("seconds") >= 0 for entry in entries)
    assert entries == [
        {"step": 4, "epoch": 1, "loss": 1.5, "lr": 0.5},
        {"step": 8, "epoch": 2, "loss": 3.5, "lr": 0.5},
        {"step": 10, "epoch": 3, "loss": 4.5, "lr": 0.5},
        {"step": 10, "epoch": 2, "val/top1": 0.25},
    ]


def test_the_rate_is_the_one_that_was_set_where_groups_have_factors(tmp_path):
    hook = MetricsFile(interval=1)
    hook.before_train(metrics_run(tmp_path, 0))
    hook.after_train_iter(metrics_run(tmp_path, 0, {"base_lr": [0.1], "lr": [0.001, 0.01]}), 0, outputs={})
    assert lines_of(tmp_path)[0]["lr"] == 0.1


def test_a_resumed_run_drops_the_metrics_it_will_write_again(tmp_path):
    text = "".join(json.dumps({"step": s, "loss": s / 10}) + "\n" for s in (2, 4, 6, 8))
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 10, "lo')  # killed while writing
    hook = MetricsFile(interval=2)
    hook.before_train(metrics_run(tmp_path, 4, rank=1))
    assert (tmp_path / "metrics.jsonl").read_text().startswith(text)
    hook.before_train(metrics_run(tmp_path, 4))
    hook.after_train_iter(metrics_run(tmp_path, 5), 0, outputs={})
    assert [line["step"] for line in lines_of(tmp_path)] == [2, 4, 6]


def test_the_console_says_metrics_and_every_unreadable_image_once(capsys):
    hook = Console()
    runner = SimpleNamespace(rank=0, iter=9, epoch=1, max_epochs=2, max_iters=10)
    hook.before_train(runner)
    hook.after_train_iter(runner, 0, {"unreadable": ["x.png", "y.png"]}, {"loss": torch.tensor(0.5)})
    hook.after_val_iter(runner, 0, {"unreadable": ["x.png", *(f"{i}.png" for i in range(5))]})
    hook.after_val_epoch(runner, {"top1": 0.25})
    hook.after_train(runner)
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/2  step 9  loss 0.5000  top1 0.2500",
        "7 unreadable files were skipped: x.png, y.png, 0.png, 1.png, 2.png and 2 more",
    ]
    runner.rank = 1
    hook.after_train(runner)
    assert not capsys.readouterr().out


# ---- cached features -------------------------------------------------------------------------------------------------
def test_cached_features_are_those_of_the_task_in_the_order_of_the_data_set():
    """Whatever the order and the mode of training; images that cannot be read are left out."""
    task, data = classifier(rank=None, pool="cls_avg").train(), Pictures(unreadable=2)
    found = cached(task, loader(data, shuffle=True))
    assert task.training and found.source is data and found.classes == data.classes
    assert found.paths == ["0.png", "1.png", "3.png", "4.png", "5.png"] and found.labels == [0, 1, 0, 1, 2]
    images = task.data_preprocessor.normalize(data.images[[0, 1, 3, 4, 5]])
    assert_close(found.features, task.eval().encode(images).detach())


def test_loaders_draw_the_same_samples_from_the_cache(tmp_path):
    loops = [SimpleNamespace(dataloader=loader()), SimpleNamespace(dataloader=loader(shuffle=False, round_up=False))]
    before = [[draw.index for draw in loop.dataloader.sampler] for loop in loops]
    runner = SimpleNamespace(model=classifier(rank=None), train_loop=loops[0], val_loop=loops[1], work_dir=tmp_path)
    CacheFeatures().before_train(runner)
    for loop, order in zip(loops, before):
        assert [draw.index for draw in loop.dataloader.sampler] == order
        assert [p for batch in loop.dataloader for p in batch["path"]] == [f"{i}.png" for i in order]
        assert set(next(iter(loop.dataloader))) >= {"features", "labels"}


@pytest.mark.parametrize(
    ("task", "random", "message"),
    [
        (dict(), False, "needs a wholly frozen backbone; the adapters main change"),
        (dict(rank=None, base_mode="train"), False, "needs base_mode='eval'"),
        (dict(rank=None, mix=dict(mixup=0.5)), False, "cache_features and mix exclude each other"),
        (dict(rank=None), True, "needs training transforms without chance"),
    ],
)
def test_features_that_differ_from_step_to_step_are_not_cached(task, random, message):
    data = Pictures(transform=SimpleNamespace(is_random=random))
    runner = SimpleNamespace(model=classifier(**task), train_loop=SimpleNamespace(dataloader=loader(data)))
    with pytest.raises(InputError, match=message):
        CacheFeatures().before_train(runner)
