"""Checkpoints for resuming, without a run around them; test_end_to_end.py resumes whole runs."""

from __future__ import annotations

import uuid
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import TINY
from mmengine.logging import MessageHub
from mmengine.optim import LinearLR, build_optim_wrapper
from torch import nn

from visadapt import checkpoint
from visadapt.adapters.full import FullFineTune
from visadapt.errors import InputError
from visadapt.hooks.steps import EarlyStop
from visadapt.optim.groups import TrainableGroups
from visadapt.optim.wrapper import AutocastOptimWrapper
from visadapt.tasks.classify import ImageClassifier
from visadapt.testing import noise


def classifier(rank=2, seed=0, **arch):
    torch.manual_seed(seed)
    backbone = {**TINY["vit"], "arch": {**TINY["vit"]["arch"], **arch}}
    torch.manual_seed(0)
    task = ImageClassifier(
        backbone, head=dict(type="LinearHead", num_classes=3), adapters={"main": dict(type="LoRA", rank=rank)}
    )
    noise((p for p in task.parameters() if p.requires_grad), seed=seed)
    return task


def run(task=None, schedulers=1, hooks=(), world_size=1, **paramwise):
    """What a checkpoint reads and sets of a runner; two batches per optimizer step."""
    task = task or classifier()
    optimizer = dict(type="AdamW", lr=0.1)
    settings = dict(type=AutocastOptimWrapper, constructor=TrainableGroups, optimizer=optimizer, accumulative_counts=2)
    wrapper = build_optim_wrapper(task, {**settings, "paramwise_cfg": paramwise or None})
    made = SimpleNamespace(model=task, optim_wrapper=wrapper, seed=7, world_size=world_size, hooks=list(hooks))
    made.param_schedulers = [LinearLR(wrapper, begin=0, end=9) for _ in range(schedulers)]
    made.message_hub = MessageHub(uuid.uuid4().hex)
    made.train_loop, made._randomness_cfg = SimpleNamespace(_epoch=0, _iter=0), {}
    made.set_randomness = lambda seed: setattr(made, "seed", seed)
    return made


def advance(made, batches, seed):
    """Batches of random images, with a step of the scheduler behind every update."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        inputs = torch.randn(2, 3, 28, 28, generator=generator)
        made.optim_wrapper.update_params(made.model.loss(inputs, torch.tensor([0, 1]))["loss"])
        if made.optim_wrapper.should_update():
            made.param_schedulers[0].step()


def values_of(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    assert not [k for k, v in wanted.items() if not torch.equal(found[k], v)]


def test_what_trains_is_in_it_and_nothing_of_the_frozen_base():
    """Adapters with their buffers, heads, and the base values that an adapter trains."""
    task = classifier()
    task.adapted.adapters["main"].register_buffer("mask", torch.ones(2))
    task.adapted.add("full", FullFineTune(layers=[1]))
    task.adapted.set_trainable("main", "full", heads=[task.head])
    state = checkpoint.trained_state(task)
    block = {f"adapted.backbone.body.blocks.1.{n}" for n, _ in task.adapted.backbone.body.blocks[1].named_parameters()}
    own = {f"adapted.adapters.{n}" for n in task.adapted.adapters.state_dict()}
    assert set(state) == own | block | {"head.fc.weight", "head.fc.bias"} and "adapted.adapters.main.mask" in own
    kept = state["head.fc.weight"].clone()
    noise(task.head)
    assert torch.equal(state["head.fc.weight"], kept)  # a copy, not a view


def test_a_restored_run_goes_on_bit_for_bit(tmp_path):
    """Saved in the middle of an accumulation: weights, moments, rates, waiting gradients, counters, seed and log."""
    first = run()
    advance(first, 5, seed=1)
    log = first.message_hub
    log.update_scalar("train/loss", 1.5)
    log.update_scalar("train/loss", np.float64(0.5))
    log.update_info("epoch", np.int64(2))
    log.update_info("metainfo", object())  # what is no plain value stays out
    checkpoint.save(first, tmp_path / "epoch_2.pth", epoch=2, step=5)
    second = run(classifier(seed=9))
    second.seed = 1
    checkpoint.restore(second, tmp_path / "epoch_2.pth")
    assert_same(values_of(second.model), values_of(first.model))
    waiting = {n for n, p in first.model.named_parameters() if p.grad is not None}
    assert waiting and {n for n, p in second.model.named_parameters() if p.grad is not None} == waiting
    assert second.seed == 7 and vars(second.train_loop) == {"_epoch": 2, "_iter": 5}
    assert second.message_hub.get_scalar("train/loss").mean() == 1.0
    assert second.message_hub.runtime_info == {"epoch": 2}
    second.optim_wrapper._inner_count = 5  # the runner's part
    for made in (first, second):
        advance(made, 3, seed=2)
    assert_same(values_of(second.model), values_of(first.model))
    assert second.optim_wrapper.get_lr() == first.optim_wrapper.get_lr()


def test_gradients_are_kept_only_while_they_wait_for_more(tmp_path):
    made = run()
    for batches, waiting in ((3, True), (1, False)):
        advance(made, batches, seed=0)
        checkpoint.save(made, tmp_path / "a.pth", epoch=0, step=0)
        assert bool(checkpoint.read(tmp_path / "a.pth")["gradients"]) == waiting


def test_nothing_is_written_while_the_loss_is_no_number(tmp_path):
    made = run()
    for loss, written in ((float("nan"), False), (1.0, True)):
        made.optim_wrapper.update_params(loss * made.model.head.fc.weight.sum())
        checkpoint.save(made, tmp_path / "a.pth", epoch=0, step=0)
        assert (tmp_path / "a.pth").exists() == written


def test_every_hook_finds_its_own_state(tmp_path):
    def hooks():
        return EarlyStop("top1"), EarlyStop("loss", rule="less")

    first, second = run(hooks=hooks()), run(hooks=(*hooks(), EarlyStop("top5")))
    for hook, value in zip(first.hooks, (0.25, 3.0)):
        hook.after_val_epoch(None, {hook.monitor: value})
    checkpoint.save(first, tmp_path / "a.pth", epoch=1, step=1)
    checkpoint.restore(second, tmp_path / "a.pth")
    assert [h.best for h in second.hooks] == [0.25, -3.0, float("-inf")]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: run(world_size=2), "was written by 1 processes, this run has 2"),
        (
            lambda: run(classifier(depth=3)),
            r"was made for the base with fingerprint [0-9a-f]{12}; this backbone has [0-9a-f]{12}",
        ),
        (lambda: run(classifier(rank=3)), "belongs to another model: 8 tensors differ, first adapted.adapters.main"),
        (lambda: run(layer_decay=0.5), "was written with other optimizer settings .*param"),
        (lambda: run(schedulers=2), "was written with other optimizer settings"),
    ],
    ids=["processes", "base", "model", "groups", "schedulers"],
)
def test_what_does_not_fit_is_refused(tmp_path, other, message):
    checkpoint.save(run(), tmp_path / "a.pth", epoch=1, step=1)
    with pytest.raises(InputError, match=rf"a\.pth {message}"):
        checkpoint.restore(other(), tmp_path / "a.pth")


class Code:
    def __reduce__(self):
        return open, ("ran.txt", "w")


def test_damaged_and_foreign_files_are_refused_and_no_code_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save(run(), tmp_path / "good.pth", epoch=1, step=1)
    whole = (tmp_path / "good.pth").read_bytes()
    middle = whole.index(checkpoint.read("good.pth")["state_dict"]["head.fc.weight"].numpy().tobytes())
    contents = {
        "cut": (whole[: len(whole) // 2], "is damaged or cut off"),
        "bit": (whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], "is damaged or cut off"),
        "marks": (whole.replace(b"PK", b"XX"), "is damaged or cut off"),
        "empty": (b"", "is damaged or cut off"),
        "zeros": (bytes(1000), "is damaged or cut off"),
        "text": (b"hello, this is no checkpoint\n" * 9, "is damaged or cut off"),
    }
    for name, (content, message) in contents.items():
        (tmp_path / f"{name}.pth").write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}\.pth {message}"):
            checkpoint.read(tmp_path / f"{name}.pth")
    for name, content in (("code", Code()), ("module", nn.Linear(1, 1))):
        torch.save({"meta": content}, tmp_path / f"{name}.pth")
        with pytest.raises(InputError, match=rf"{name}\.pth holds more than tensors .* is not loaded"):
            checkpoint.read(tmp_path / f"{name}.pth")
    assert not (tmp_path / "ran.txt").exists()
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    for name, message in (("other", "is no checkpoint of a training run"), ("none", "")):
        with pytest.raises(InputError, match=rf"{name}\.pth ?{message}"):
            checkpoint.read(tmp_path / f"{name}.pth")


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    made, path = run(), tmp_path / "a.pth"
    checkpoint.save(made, path, epoch=1, step=1)
    before, save = path.read_bytes(), torch.save

    def breaks(content, target):
        save({"half": 1}, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.torch, "save", breaks)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(made, path, epoch=2, step=2)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_checkpoints_of_a_folder_come_in_order_of_their_numbers(tmp_path):
    for name in ("epoch_10.pth", "epoch_9.pth", "iter_100.pth", "best.pth", "epoch_x.pth", ".epoch_3.1.part.pth"):
        (tmp_path / name).touch()
    assert [p.name for p in checkpoint.numbered(tmp_path)] == ["epoch_9.pth", "epoch_10.pth", "iter_100.pth"]


def test_the_task_is_found_inside_a_wrapper():
    task = nn.Linear(1, 1)
    assert checkpoint.unwrap(task) is task and checkpoint.unwrap(SimpleNamespace(module=task)) is task
