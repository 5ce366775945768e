"""Self-training on a target domain: class mix, teacher, what trains, and pairs of source and target images."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from visadapt.checkpoint import trained_state
from visadapt.datasets.base import ClassificationDataset, Draw
from visadapt.datasets.masks import SegmentationDataset
from visadapt.datasets.sampler import EpochSampler
from visadapt.datasets.source_target import SourceTarget, collate_source_target
from visadapt.errors import InputError
from visadapt.tasks.segment import Segmenter
from visadapt.tasks.self_train import SelfTraining, class_mix
from visadapt.testing import assert_close, noise

ARCH = dict(depth=4, embed_dim=32, num_heads=2, img_size=56, init_values=1.0)
BACKBONE = dict(type="TimmViT", name="vit_small_patch14_dinov2", arch=ARCH, out_indices=[0, 1, 2, 3])
LORA = dict(main=dict(type="LoRA", rank=2))
LINEAR = dict(type="LinearSegHead", num_classes=3)
SETS = dict(type="Mask2FormerHead", num_classes=3, width=32, queries=4, heads=2, encoder_layers=1, decoder_layers=1)
SETS |= dict(encoder_hidden=32, decoder_hidden=32, points=64)


def trainer(head=LINEAR, adapters=LORA, start=0, **options):
    torch.manual_seed(0)
    task = SelfTraining(BACKBONE, head, adapters=adapters, start=start, **options)
    noise(p for p in task.parameters() if p.requires_grad)
    return task.train()


def domains(seed, n=2, side=56):
    """Source images whose brightness is the class, their masks with a border to ignore, and darker target images."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, 3, (n, 4, 4), generator=generator).repeat_interleave(side // 4, 1)
    masks = masks.repeat_interleave(side // 4, 2)
    bright = masks[:, None].float().sub(1).repeat(1, 3, 1, 1)
    images, target = (bright + 0.1 * torch.randn(bright.shape, generator=generator) for _ in range(2))
    masks[:, 0] = 255
    return dict(inputs=images, masks=list(masks), target=0.5 * target.flip(0) - 0.5)


def steps(task, numbers, lr=1e-2, look=lambda task: None):
    """SGD on one batch per number; the seed of a step is its number, as in a real run."""
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr)
    history = []
    for number in numbers:
        torch.manual_seed(number)
        losses = task(**domains(number), mode="loss")
        look(task)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({k: v.item() for k, v in losses.items()})
    return history


def student(task):
    return {n: p.detach().clone() for n, p in task.named_parameters() if p.requires_grad}


def test_mixing_pastes_half_of_the_label_values():
    masks = torch.tensor([[[0, 1], [2, 255]], [[1, 1], [1, 0]], [[2, 2], [2, 2]]])
    images, target = torch.arange(1.0, 13).view(3, 1, 2, 2), -torch.arange(1.0, 13).view(3, 1, 2, 2)
    labels = torch.tensor([[[5, 6], [7, 8]]] * 3)
    before = [t.clone() for t in (images, masks, target, labels)]
    drawn = set()
    for seed in range(40):
        torch.manual_seed(seed)
        x, y = class_mix(images, masks, target, labels)
        pasted = x > 0
        assert torch.equal(x, torch.where(pasted, images, target))
        assert torch.equal(y, torch.where(pasted[:, 0], masks, labels))
        values = [sorted(set(m[p[0]].tolist())) for m, p in zip(masks, pasted)]
        assert [len(v) for v in values] == [2, 1, 1]  # of 4, 2 and 1 values; 255 is one of them
        assert all(p[0][m == v].all() for m, p, vs in zip(masks, pasted, values) for v in vs)  # whole classes
        drawn.add((tuple(values[0]), tuple(values[1])))
    assert {a for a, _ in drawn} == {(0, 1), (0, 2), (0, 255), (1, 2), (1, 255), (2, 255)}
    assert {b for _, b in drawn} == {(0,), (1,)}
    assert all(torch.equal(a, b) for a, b in zip((images, masks, target, labels), before))


def test_teacher_starts_as_the_student_and_is_its_moving_average():
    task, seen = trainer(momentum=0.7), []
    noise(task.head, seed=1)  # what changes before the first batch, such as a start from data, counts too
    steps(task, range(6), lr=0.1, look=lambda t: seen.append((student(t), copy.deepcopy(t.teacher.values()))))
    average = seen[0][0]
    assert set(average) == set(seen[0][1])
    for i, (current, teacher) in enumerate(seen):
        kept = 0 if i == 0 else min(1 - 1 / i, 0.7)  # i batches have passed; the last of them has number i - 1
        average = {n: kept * average[n] + (1 - kept) * v for n, v in current.items()}
        for name, value in teacher.items():
            assert_close(value, average[name], f"{name} at batch {i}")
    moved = [n for n, v in seen[5][0].items() if not torch.allclose(v, seen[5][1][n], atol=1e-5)]
    assert any("adapters" in n for n in moved) and any("head" in n for n in moved)


@pytest.mark.parametrize("name", ["LoRA", "Convpass", "VPT", "FullFineTune"])
def test_pseudo_labels_are_those_of_the_teacher_alone(name):
    task = trainer(adapters=dict(main=dict(type=name)))
    task.head.norm.momentum = 1.0  # with the statistics of one batch, classes differ from patch to patch
    noise(task.head, std=1.0, seed=2)
    steps(task, range(2))
    images = 3 * domains(9)["inputs"]
    with torch.no_grad():
        twin = copy.deepcopy(task)
        for key, value in task.teacher.values().items():
            twin.get_parameter(key).copy_(value)
        wanted = twin.eval()(images).argmax(1)
        modes, kept = [m.training for m in task.modules()], student(task)
        assert torch.equal(task.pseudo_labels(images), wanted) and len(wanted.unique()) > 1
        assert [m.training for m in task.modules()] == modes and task.training
        assert all(torch.equal(kept[n], v) for n, v in student(task).items())
        noise((p for p in task.parameters() if p.requires_grad), std=1.0, seed=5)
        assert not torch.equal(task.eval()(images).argmax(1), wanted)
        assert torch.equal(task.train().pseudo_labels(images), wanted)  # the student plays no part


def test_losses_are_the_source_and_half_of_the_mixed_images():
    task = trainer(start=1)
    history = steps(task, range(2))
    assert [sorted(h) for h in history] == [["loss_task"]] * 2
    batch, twin = domains(7), copy.deepcopy(task)
    twin.teacher.follow(student(twin), 0.5)
    torch.manual_seed(7)
    losses = task(**batch, mode="loss")
    source = Segmenter.loss(twin, batch["inputs"], batch["masks"])
    torch.manual_seed(7)
    labels = twin.pseudo_labels(batch["target"])
    mixed, target = class_mix(batch["inputs"], torch.stack(batch["masks"]), batch["target"], labels)
    assert_close(losses["loss_task"], source["loss_task"])
    assert_close(losses["mixed_loss_task"], 0.5 * twin.criterion(twin.scores(mixed), target))


def test_adapter_losses_count_once():
    task = trainer(adapters=dict(main=dict(type="SoRA", rank=2, penalty=0.5)))
    losses = steps(task, range(2))[1]
    assert set(losses) == {"loss_task", "loss_main_sparsity", "mixed_loss_task"}


def test_a_shifted_domain_trains():
    task, teacher = trainer(start=3), {}
    base = {n: p.detach().clone() for n, p in task.adapted.backbone.named_parameters()}
    history = steps(task, range(20), look=lambda t: teacher.update(t.teacher.values()))
    assert all(math.isfinite(v) for losses in history for v in losses.values())
    assert [set(h) for h in history] == [{"loss_task"}] * 4 + [{"loss_task", "mixed_loss_task"}] * 16
    assert history[-1]["loss_task"] < history[0]["loss_task"]
    assert all(p.grad.abs().sum() > 0 for p in task.parameters() if p.requires_grad)
    assert not any(v.requires_grad or v.grad is not None for v in teacher.values())
    assert all(torch.equal(base[n], p) and p.grad is None for n, p in task.adapted.backbone.named_parameters())


def test_heads_with_a_loss_of_their_own():
    task = trainer(SETS, neck=dict(type="Pyramid"))
    history = steps(task, range(2))
    own = {"loss_cls", "loss_mask", "loss_dice"}
    assert [set(h) for h in history] == [own, own | {f"mixed_{n}" for n in own}]
    assert all(math.isfinite(v) for v in history[1].values())


def test_a_resumed_run_is_the_same():
    whole, first = trainer(start=1), trainer(start=1)
    wanted = steps(whole, range(6))
    steps(first, range(3))
    second = trainer(start=1)
    noise(second.head, seed=8)
    report = second.load_state_dict(trained_state(first), strict=False)
    assert not report.unexpected_keys and all(k.startswith("adapted.backbone") for k in report.missing_keys)
    assert steps(second, range(3, 6)) == wanted[3:]
    a, b = trained_state(whole), trained_state(second)
    assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)
    assert "batches" in a and a["batches"] == 6 and any(k.startswith("teacher.") for k in a)


def test_evaluation_and_files_take_the_student():
    task = trainer()
    steps(task, range(3))
    batch = domains(4)
    plain = Segmenter(BACKBONE, LINEAR, adapters=LORA)
    plain.load_state_dict({k: v for k, v in task.state_dict().items() if k in plain.state_dict()})
    assert torch.equal(task.eval()(batch["inputs"]), plain.eval()(batch["inputs"]))
    assert task.card() == plain.card()
    before = trained_state(task)
    assert set(task(**batch, mode="loss")) == {"loss_task"}  # a start from data measures in eval mode
    assert all(torch.equal(v, before[k]) for k, v in trained_state(task).items())
    assert "mask" in task(batch["inputs"], batch["masks"], mode="predict")[0]


def test_both_domains_are_normalised():
    task, batch = trainer(), domains(0)
    ready = task.data_preprocessor({k: [v] if k == "masks" else 255 * v for k, v in batch.items() if k != "masks"})
    for key in ("inputs", "target"):
        assert torch.equal(ready[key], task.data_preprocessor.normalize(255 * batch[key]))
    assert set(task.data_preprocessor({"inputs": batch["inputs"]})) == {"inputs"}


def test_refusals():
    for wrong in (dict(weight=0.0), dict(start=-1), dict(momentum=1.0)):
        with pytest.raises(InputError, match="weight must be above 0"):
            trainer(**wrong)
    task, batch = trainer(), domains(0)
    for wrong, said in (
        (dict(target=None), "no target images"),
        (dict(masks=None), "source images have no masks"),
        (dict(masks=[None, None]), "source images have no masks"),
        (dict(target=batch["target"][..., :14]), r"target images are \[2, 3, 56, 14\], source images \[2, 3, 56, 56\]"),
        (dict(target=batch["target"][:1]), r"target images are \[1, 3"),
    ):
        with pytest.raises(InputError, match=said):
            task(**batch | wrong, mode="loss")
    task.adapted.set_trainable(heads=[task.head])
    with pytest.raises(InputError, match="trained tensors came, went or changed shape"):
        task(**batch, mode="loss")


# ---- pairs of images ----------------------------------------------------------------------------------------------
CROP = [dict(type="RandomCrop", height=8, width=8)]
SHARED = dict(classes=["a", "b", "c"], transform=CROP, training=True)


def source_set(folder):
    """Five images whose first band is their number; the mask is that number modulo 3."""
    files = [write(folder / f"source{i}.png", i) for i in range(5)], [folder / f"mask{i}.png" for i in range(5)]
    for i, path in enumerate(files[1]):
        Image.fromarray(np.full((16, 16), i % 3, np.uint8)).save(path)
    return SegmentationDataset(*files, **SHARED)


def target_set(folder, **other):
    """Four images whose first band is 100 and their number, without masks."""
    paths = [write(folder / f"target{i}.png", 100 + i) for i in range(4)]
    return ClassificationDataset(paths, [0] * 4, **SHARED | other)


def write(path, number):
    """An image (16, 16, 3): the number, the column and the row of each pixel."""
    ramp = np.arange(16, dtype=np.uint8)
    Image.fromarray(np.stack([np.full((16, 16), number, np.uint8), *np.meshgrid(ramp, ramp)], 2)).save(path)
    return path


@pytest.fixture
def pairs(tmp_path):
    return SourceTarget(source_set(tmp_path), target_set(tmp_path))


def test_every_source_sample_gets_a_target_image(pairs):
    assert len(pairs) == 5 and pairs.classes == ("a", "b", "c") and pairs.channels == 3
    loader = DataLoader(pairs, 2, sampler=EpochSampler(pairs, seed=0, endless=True), collate_fn=collate_source_target)
    batches = [batch for batch, _ in zip(loader, range(40))]
    assert {*batches[0]} == {"inputs", "masks", "target", "index", "path", "valid", "unreadable"}
    for batch in batches:
        assert batch["target"].shape == (2, 3, 8, 8) and batch["target"].dtype == torch.uint8
        for image, mask, number in zip(batch["inputs"], batch["masks"], batch["index"]):
            assert (image[0] == number).all() and (mask == number % 3).all()
    drawn = torch.cat([batch["target"][:, 0, 0, 0] for batch in batches]) - 100
    assert drawn.bincount().tolist() == [pytest.approx(20, abs=10)] * 4


def test_a_pair_depends_on_seed_epoch_and_index_alone(pairs):
    draws = [Draw(epoch, index) for epoch in range(30) for index in range(5)]
    found = [pairs[draw]["target"]["inputs"] for draw in draws]
    assert all(torch.equal(x, pairs[draw]["target"]["inputs"]) for x, draw in zip(found[::-1], draws[::-1]))
    assert len({tuple(int(x[0, 0, 0]) for x in found[i : i + 5]) for i in range(0, 150, 5)}) > 20  # new every epoch
    assert len({tuple(x[:, 0, 0].tolist()) for x in found}) > 100  # and an image that comes again is cropped elsewhere
    assert torch.equal(pairs[-1]["target"]["inputs"], pairs[4]["target"]["inputs"])
    other = SourceTarget(pairs.source, pairs.target, seed=1)
    assert not all(torch.equal(x, other[draw]["target"]["inputs"]) for x, draw in zip(found, draws))


def test_unreadable_target_images_are_replaced_and_named(pairs):
    broken = Path(pairs.target.paths[2])
    broken.write_bytes(b"no image")
    batch = collate_source_target([pairs[Draw(epoch, 0)] for epoch in range(12)])
    assert set(batch["unreadable"]) == {str(broken)} and not (batch["target"][:, 0] == 102).any()


def test_data_that_make_no_pairs(pairs, tmp_path):
    sample = pairs[0]
    wide = sample | {"target": sample["target"] | {"inputs": torch.zeros(3, 8, 9), "path": "wide.png"}}
    with pytest.raises(InputError, match=r"differ in size: .*target.*png is \(3, 8, 8\), wide.png is \(3, 8, 9\)"):
        collate_source_target([sample, wide])
    balanced = target_set(tmp_path, transform=[dict(type="BalancedCrop", height=8, width=8)])
    for source, target, said in (
        (pairs.target, pairs.target, r"source \(ClassificationDataset\) is no data set with masks"),
        (pairs.source, pairs, r"target \(SourceTarget\) is no data set of images"),
        (pairs.source, target_set(tmp_path, training=False), "give target training=True"),
        (pairs.source, target_set(tmp_path, channels=1), "source has 3 bands, target 1"),
        (pairs.source, balanced, "BalancedCrop looks at the masks of the target"),
    ):
        with pytest.raises(InputError, match=said):
            SourceTarget(source, target)
    with pytest.raises(InputError, match="seed must be 0 or more"):
        SourceTarget(pairs.source, pairs.target, seed=-1)
