"""Features of frozen parts: kept once for many runs, never out of date, and the same training as without them."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from cases import TINY
from mmengine.optim import build_optim_wrapper
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

from visadapt.datasets.base import collate
from visadapt.datasets.sampler import EpochSampler
from visadapt.engine import AdaptRunner
from visadapt.errors import InputError, Notice
from visadapt.hooks import cache
from visadapt.hooks.cache import CacheFeatures, cached
from visadapt.hooks.prefix import Start, first_block
from visadapt.hooks.steps import StepSeed
from visadapt.optim.groups import TrainableGroups
from visadapt.optim.wrapper import AutocastOptimWrapper
from visadapt.tasks.classify import ImageClassifier
from visadapt.testing import assert_close, noise, tiny_backbone

SIZE = (30, 40)
"""Not square, and no multiple of any patch: what stands in for images must give the grid of padded ones."""

OPTIMIZER = dict(type=AutocastOptimWrapper, constructor=TrainableGroups, optimizer=dict(type="AdamW", lr=0.01))


class Pictures(Dataset):
    """Random images of three classes, of which one can be unreadable."""

    classes = ("a", "b", "c")
    metainfo = {"classes": classes}

    def __init__(self, count=6, seed=0, unreadable=None, size=SIZE):
        self.unreadable, draw = unreadable, torch.Generator().manual_seed(seed)
        self.images = torch.randint(0, 256, (count, 3, *size), generator=draw, dtype=torch.uint8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, item):
        index = item if isinstance(item, int) else item.index
        sample = dict(inputs=self.images[index], label=index % 3, index=index, path=f"{index}.png")
        return sample | dict(valid=index != self.unreadable, unreadable="")


def loader(dataset=None, batch=2, shuffle=False):
    dataset = dataset or Pictures()
    return DataLoader(dataset, batch, sampler=EpochSampler(dataset, shuffle, seed=5), collate_fn=collate)


def classifier(adapter=None, backbone="vit", seed=0, depth=3, **settings):
    """A tiny classifier whose adapter is away from its start."""
    config = copy.deepcopy(TINY[backbone])
    if "depth" in config["arch"]:
        config["arch"]["depth"] = depth
    adapters = None if adapter is None else {"main": dict(adapter)}
    head = dict(type="LinearHead", num_classes=3)
    torch.manual_seed(seed)
    task = ImageClassifier(tiny_backbone(config, seed), head, adapters, **settings)
    noise(task.adapted.adapters, seed=seed)
    return task


def passes(task):
    """Counts passes of the first block's attention, which a pass that skips the block does not reach."""
    count = []
    task.adapted.backbone.blocks()[0].attn.register_forward_hook(lambda *_: count.append(1))
    return count


# ---- files that runs share -------------------------------------------------------------------------------------------
def test_a_second_run_reads_what_the_first_has_kept(tmp_path, capsys):
    """Whatever else differs: the head, how the adapter trains, the order of training, labels and names."""
    first, second = classifier(seed=0), classifier(seed=0)
    noise(second.head)
    kept = cached(first, loader(Pictures(unreadable=2)), tmp_path)
    count, data = passes(second), Pictures(unreadable=2)
    data.classes = ("x", "y", "z")
    read = cached(second.train(), loader(data, shuffle=True), tmp_path)
    assert not count and second.training and torch.equal(kept.features, read.features)
    assert read.paths == ["0.png", "1.png", "3.png", "4.png", "5.png"] and read.classes == data.classes
    (path,) = tmp_path.iterdir()
    assert torch.equal(load_file(path)["features"], kept.features) and kept.features.dtype == torch.float32
    said = capsys.readouterr().out.splitlines()
    assert (
        len(said) == 2
        and "computed" in said[0]
        and "read" in said[1]
        and f"5 images (pool native, {0.0:.1f} MB)" in said[1]
    )


def test_nothing_is_read_that_something_else_decides(tmp_path):
    """Images and their order, weights, arguments of the backbone, the pool and the batch have files of their own."""
    plain = classifier
    moved = Pictures()
    moved.images = moved.images.flip(0)
    changed = classifier()
    changed.adapted.backbone.body.norm.bias.data[0] += 1e-3
    other_mean = classifier()
    other_mean.adapted.backbone.mean = (1.0, 2.0, 3.0)
    for task, images in (
        *(
            (plain(), loader(data))
            for data in (Pictures(), Pictures(seed=1), Pictures(5), moved, Pictures(unreadable=1))
        ),
        *((task, loader()) for task in (plain(pool="avg"), changed, other_mean, plain(seed=1), plain(depth=2))),
        (plain(), loader(batch=3)),
    ):
        before, count = len([*tmp_path.iterdir()]), passes(task)
        cached(task, images, tmp_path)
        assert count and len([*tmp_path.iterdir()]) == before + 1
    count = passes(task := plain())
    cached(task, loader(), tmp_path)
    assert not count


@pytest.mark.parametrize("damage", ["cut", "bit", "other", "empty"])
def test_a_damaged_file_is_computed_again_and_said_once(tmp_path, damage):
    task = classifier()
    wanted = cached(task, loader(), tmp_path).features.clone()
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    path.write_bytes({"cut": whole[:-9], "bit": flipped, "other": b"no features at all", "empty": b""}[damage])
    with pytest.warns(Notice, match="are damaged .* computed again"):
        assert torch.equal(cached(task, loader(), tmp_path).features, wanted)
    assert path.read_bytes() == whole
    with warnings.catch_warnings(action="error"):
        assert torch.equal(cached(task, loader(), tmp_path).features, wanted)


def test_two_that_compute_the_same_at_once_are_both_right(tmp_path, monkeypatch):
    """The second finds nothing, computes and writes while the first is still at it."""
    compute, both = cache._computed, []

    def slow(*arguments):
        monkeypatch.setattr(cache, "_computed", compute)
        both.append(cached(classifier(), loader(), tmp_path))
        return compute(*arguments)

    monkeypatch.setattr(cache, "_computed", slow)
    both.append(cached(classifier(), loader(), tmp_path))
    assert torch.equal(both[0].features, both[1].features) and len([*tmp_path.iterdir()]) == 1
    assert torch.equal(both[0].features, cached(classifier(), loader()).features)


def test_a_folder_that_cannot_be_written_is_said_and_costs_no_run(tmp_path):
    (tmp_path / "features").touch()
    with pytest.warns(Notice, match="a file stands where a folder is needed; every run computes"):
        found = cached(classifier(), loader(), tmp_path / "features")
    assert torch.equal(found.features, cached(classifier(), loader()).features)


# ---- passes that start at a block ------------------------------------------------------------------------------------
def step(task, images, mode="loss"):
    """Losses or scores of the first batch, and gradients of all that trains."""
    batch = next(iter(images))
    torch.manual_seed(7)  # a loader draws too
    if mode == "predict":
        with torch.no_grad():
            return torch.stack([row["scores"] for row in task.eval()(**task.data_preprocessor(batch), mode="predict")])
    losses = task.train()(**task.data_preprocessor(batch), mode="loss")
    trained = [p for p in task.parameters() if p.requires_grad]
    return [*losses.values(), *torch.autograd.grad(sum(losses.values()), trained)]


def runner_of(task, folder, dtype=None):
    wrapper = build_optim_wrapper(task, copy.deepcopy(OPTIMIZER) | dict(dtype=dtype))
    train, val = (
        SimpleNamespace(dataloader=loader()),
        SimpleNamespace(dataloader=loader(Pictures(4, seed=1, size=(44, 28)))),
    )
    return SimpleNamespace(model=task, train_loop=train, val_loop=val, optim_wrapper=wrapper, work_dir=folder)


def hooked(runner, hook, loop, mode):
    """As `step`, on a batch that the hook has seen."""
    name = "train" if loop is runner.train_loop else "val"
    batch = next(iter(loop.dataloader))
    getattr(hook, f"before_{name}_iter")(runner, 0, batch)
    found = step(runner.model, [batch], mode)
    getattr(hook, f"after_{name}_iter")(runner, 0, batch)
    return found


LATE = {
    "LoRA": dict(type="LoRA", targets=["all-linear"], rank=2, dropout=0.2, layers=[-1]),
    "FullFineTune": dict(type="FullFineTune", layers=[-1]),
    "LinearProbe": dict(type="LinearProbe"),
    "LayerNormTuning": dict(type="LayerNormTuning", targets=["norm"]),
    "AdaptFormer": dict(type="AdaptFormer", width=4, layers=[1, 2]),
    "VPT": dict(type="VPT", layers=[-1]),
}
"""Methods in late blocks, and behind the last one."""


@pytest.mark.parametrize("backbone", ["vit", "dinov2", "eva02"])
@pytest.mark.parametrize("method", LATE)
def test_steps_on_kept_tokens_are_those_on_images(tmp_path, method, backbone):
    """Loss, gradients and scores; without a pass of the frozen blocks, in training and in validation."""
    if method == "VPT" and backbone == "eva02":
        pytest.skip("no prompts with rotary positions")
    task = classifier(LATE[method], backbone)
    runner = runner_of(task, tmp_path)
    wanted = [step(task, runner.train_loop.dataloader), step(task, runner.val_loop.dataloader, "predict")]
    hook, state = CacheFeatures(), {k: v.clone() for k, v in task.state_dict().items()}
    hook.before_train(runner)
    count = passes(task)
    found = [hooked(runner, hook, runner.train_loop, "loss"), hooked(runner, hook, runner.val_loop, "predict")]
    assert not count and len(found[0]) == len(wanted[0]) > 1
    for one, other in zip([*found[0], found[1]], [*wanted[0], wanted[1]]):
        assert_close(one, other, f"{method} on {backbone}", 1e-5)
    assert all(torch.equal(state[k], v) for k, v in task.state_dict().items())
    assert_close(step(task, loader())[0], wanted[0][0], "loss on images behind it")
    assert count


def test_two_views_and_recomputed_blocks(tmp_path):
    """Both views of an image start from its tokens, and blocks that run again in the backward pass from the same."""
    for settings in (dict(loss=dict(type="Consistency")), dict(checkpointing=True)):
        task = classifier(LATE["LoRA"], **settings)
        runner = runner_of(task, tmp_path)
        wanted, hook = step(task, runner.train_loop.dataloader), CacheFeatures(tmp_path / "shared")
        hook.before_train(runner)
        for one, other in zip(hooked(runner, hook, runner.train_loop, "loss"), wanted, strict=True):
            assert_close(one, other, str(settings), 1e-5)
    assert not (tmp_path / "features").exists() and len([*(tmp_path / "shared").iterdir()]) == 2


def tokens_of(task, folder):
    return cached(task, loader(), folder, Start(task.adapted, first_block(task.adapted))).features


def test_tokens_are_shared_by_methods_and_states_that_start_at_one_block(tmp_path):
    """A method that has trained for a while, as in a resumed run, comes to the same tokens."""
    kept = tokens_of(classifier(LATE["LoRA"]), tmp_path)
    assert kept.shape == (6, 1 + 3 * 3, 48)
    for method in ("FullFineTune", "VPT"):
        task = classifier(LATE[method])
        noise(p for p in task.adapted.backbone.parameters() if p.requires_grad)
        count = passes(task)
        assert torch.equal(tokens_of(task, tmp_path), kept) and not count
    tokens_of(classifier(LATE["AdaptFormer"]), tmp_path)
    assert len([*tmp_path.iterdir()]) == 2


def test_a_run_ends_with_the_weights_that_it_has_without_a_cache(tmp_path):
    """Of two epochs in any order, validations between; dropout draws the same."""
    ends = []
    for folder, hooks in ((tmp_path / "plain", []), (tmp_path / "cached", [CacheFeatures(tmp_path / "shared")])):
        task = classifier(LATE["LoRA"])
        runner = AdaptRunner(
            task,
            str(folder),
            train_dataloader=loader(shuffle=True),
            train_cfg=dict(by_epoch=True, max_epochs=2),
            optim_wrapper=copy.deepcopy(OPTIMIZER),
            default_hooks=dict(checkpoint=None, logger=None),
            custom_hooks=[StepSeed(), *hooks],
            randomness=dict(seed=3),
            experiment_name=f"{folder.name}{tmp_path.name}",
        )
        count = passes(task)
        runner.train()
        ends.append({n: p.detach().clone() for n, p in task.named_parameters() if p.requires_grad})
        assert len(count) == (3 if hooks else 6)
    for name, value in ends[0].items():
        assert_close(ends[1][name], value, name)


def test_tokens_that_would_fill_the_memory_are_not_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "LIMIT", 1000)
    task = classifier(LATE["LoRA"])
    runner, hook = runner_of(task, tmp_path), CacheFeatures()
    wanted, images = step(task, runner.train_loop.dataloader), runner.train_loop.dataloader
    hook.before_train(runner)
    assert runner.train_loop.dataloader is images and "the backbone runs whole" in capsys.readouterr().out
    for one, other in zip(hooked(runner, hook, runner.train_loop, "loss"), wanted, strict=True):
        assert torch.equal(one, other)


# ---- what is not the same in every step ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("adapter", "backbone", "message"),
    [
        (dict(type="BitFit", targets=["patch"]), "vit", "from the first block on"),
        (dict(type="LoRA", targets=["q"], layers=[0]), "vit", "from the first block on"),
        (dict(type="LoRA", targets=["q"], layers=[0, 2]), "dinov2", "from the first block on"),
        (dict(type="FullFineTune"), "eva02", "from the first block on"),
        (dict(type="FullFineTune", layers=[0]), "vit", "from the first block on"),
        (dict(type="VPT", deep=False), "vit", "from the first block on"),
        (dict(type="CloudAdapter", width=8, rank=2, layers=[-1]), "vit", "read the image beside it"),
        (dict(type="LoRA", targets=["fc1"], layers=[-1]), "convnext", "TimmConv has no single chain of blocks"),
    ],
)
def test_what_changes_early_features_or_reads_the_image_is_refused(adapter, backbone, message):
    with pytest.raises(InputError, match=f"needs a wholly frozen backbone.*{message}"):
        CacheFeatures.check(classifier(adapter, backbone), Pictures())


def test_values_that_stand_in_the_base_count_without_training(tmp_path):
    """A base whose values an adapter replaces is not the one that the file names."""
    task = classifier(dict(type="FullFineTune", layers=[1]))
    task.adapted.set_trainable()
    assert first_block(task.adapted) == 1
    task.adapted.adapters["main"].n_tasks = 2
    with pytest.raises(InputError, match="depend on the task of an image"):
        first_block(task.adapted)


def test_half_precision_and_images_of_several_sizes_are_refused(tmp_path):
    task = classifier(LATE["LoRA"])
    with pytest.raises(InputError, match="full precision"):
        CacheFeatures().before_train(runner_of(task, tmp_path, "bfloat16"))
    mixed = torch.utils.data.ConcatDataset([Pictures(2), Pictures(2, size=(40, 30))])
    with pytest.raises(InputError, match=r"images of one size, not \[\(30, 40\), \(40, 30\)\]"):
        cached(task, loader(mixed), None, Start(task.adapted, 2))


def test_what_reads_a_missing_image_is_not_overheard():
    """No numbers stand where images were: a method that looked at them would have no loss."""
    task = classifier(LATE["LoRA"])
    start, data = Start(task.adapted, first_block(task.adapted)), Pictures()
    batch = next(iter(loader(cached(task, loader(data), None, start))))
    start.begin(batch, SimpleNamespace(size=SIZE))
    assert batch["inputs"].shape == (2, 3, *SIZE) and batch["inputs"].isnan().all() and "features" not in batch
    assert task.encode(batch["inputs"]).isfinite().all()
    start.end()
    assert not task.encode(batch["inputs"]).isfinite().any()
