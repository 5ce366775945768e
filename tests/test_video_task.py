"""Clips through a task: frames, views, pooling over time, files, and a task that needs motion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import TINY
from PIL import Image

from visadapt.core.io import read_manifest
from visadapt.datasets.clips import collate_clips
from visadapt.datasets.moving_crop import MovingCrop
from visadapt.errors import InputError
from visadapt.registry import TASKS
from visadapt.testing import assert_close, difference, noise
from visadapt.visualization.picture import four_frames

SHIFT = dict(clip=dict(type="ZeroI2V", num_frames=4, offsets=[[1, 1], [-1, 1]]))


def classifier(**arguments):
    torch.manual_seed(0)
    model = dict(type="VideoClassifier", backbone=TINY["clip"], num_frames=4, adapters=SHIFT)
    task = TASKS.build({**model, "head": dict(type="LinearHead", num_classes=5), **arguments})
    for part in (*task.heads.values(), task.adapted.adapters):
        noise(part)
    return task.eval()


def clips(count=2, frames=4, seed=0):
    return torch.randn(count, frames, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_are_the_head_on_the_mean_of_the_frames():
    task, x = classifier(), clips()
    frames = task.adapted(x.flatten(0, 1)).native.view(2, 4, -1)
    assert_close(task(x), task.head(frames.mean(1)))
    assert difference(task(x), task(x.flip(1))) > 1e-4  # the shift sees the order


@torch.no_grad()
def test_without_an_adapter_the_mean_knows_no_order_and_attention_does():
    x = clips()
    mean = classifier(adapters=None)
    assert_close(mean(x), mean(x.flip(1)))
    attention = classifier(adapters=None, frame_pool="attention", pool_heads=4)
    assert difference(attention(x), attention(x.flip(1))) > 1e-4


@torch.no_grad()
def test_views_are_averaged_as_probabilities():
    task, a, b = classifier(), clips(), clips(seed=1)
    found = task(torch.cat([a, b], 1), mode="predict")
    expected = (task(a).softmax(1) + task(b).softmax(1)) / 2
    assert_close(torch.stack([o["scores"] for o in found]), expected)


@torch.no_grad()
def test_attention_over_frames_sees_one_view_at_a_time():
    task, a, b = classifier(frame_pool="attention", pool_heads=4), clips(), clips(seed=1)
    assert_close(task(torch.cat([a, b], 1)), torch.stack([task(a), task(b)], 1))


def test_what_trains_is_adapter_head_and_pooling():
    task = classifier(frame_pool="attention", pool_heads=4).train()
    task.loss(clips(), torch.tensor([0, 3]))["loss"].backward()
    trained = {n for n, p in task.named_parameters() if p.grad is not None}
    assert {n.split(".")[0] for n in trained} == {"adapted", "head", "pooling"}
    assert not any("backbone" in n for n in trained)


def test_a_file_rebuilds_the_task(tmp_path):
    from visadapt.core.io import save_adapter

    task = classifier(frame_pool="attention", pool_heads=4)
    path = save_adapter(task.adapted, tmp_path / "a.safetensors", heads=task.heads, extra=task.card())
    manifest = read_manifest(path)
    head = manifest["heads"]["main"]
    again = TASKS.build(
        {**manifest["task"], "backbone": TINY["clip"], "head": {"type": head["type"], **head["arguments"]}}
    ).eval()
    again.adapted.backbone.load_state_dict(task.adapted.backbone.state_dict())
    report = again.adapted.load(path, heads=again.heads)
    assert report.probe_error < 1e-5 and not report.unexpected
    with torch.no_grad():
        assert torch.equal(again(clips()), task(clips()))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (dict(frame_pool="max"), "unknown frame_pool 'max'.*mean"),
        (dict(frame_pool="attention", pool_heads=5), "pool_heads=5 does not divide the width 48"),
        (dict(num_frames=0), "num_frames must be a whole number"),
        (dict(loss=dict(type="Consistency")), "compares views"),
    ],
)
def test_wrong_arguments_are_named(arguments, said):
    with pytest.raises(InputError, match=said):
        classifier(**arguments)


def test_clips_of_other_lengths_are_refused():
    task = classifier()
    with pytest.raises(InputError, match=r"takes clips .B, 4 frames or a multiple.*got \(2, 3, 3, 32, 32\)"):
        task(clips(frames=3))
    with pytest.raises(InputError, match="takes clips"):
        task(clips()[:, 0])
    with pytest.raises(InputError, match="training clips have 8 frames, the model takes 4"):
        task.loss(clips(frames=8), torch.tensor([0, 1]))


def test_a_batch_that_nobody_collated_is_told():
    data = dict(inputs=[*clips()], labels=[0, 1])
    with pytest.raises(InputError, match=r"are no tensor; give the loader a collate_fn: .*collate_clips for clips"):
        classifier().data_preprocessor(data)


# ---- motion ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def pictures(tmp_path):
    """One picture whose red grows to the right and whose green grows downwards."""
    ramp = np.linspace(0, 255, 120)
    picture = np.zeros((120, 120, 3), np.uint8)
    picture[..., 0], picture[..., 1] = ramp[None, :], ramp[:, None]
    (tmp_path / "scene").mkdir()
    Image.fromarray(picture).save(tmp_path / "scene" / "1.png")
    return tmp_path / "scene"


def test_windows_move_as_their_class_says(pictures):
    data = MovingCrop([pictures], suffix=".png", size=8, num_frames=3)
    found = {data.classes[data[i]["label"]]: data[i]["inputs"].float() for i in range(5)}
    red = {name: x[:, 0].mean((1, 2)) for name, x in found.items()}  # where the window is, from left to right
    span = {name: x[:, 0, 0, -1] - x[:, 0, 0, 0] for name, x in found.items()}  # how wide it is
    assert (red["left"].diff() < -3).all() and (red["right"].diff() > 3).all()
    assert (span["zoom in"].diff() < -3).all() and (span["zoom out"].diff() > 3).all()
    assert (red["still"].diff() == 0).all() and (found["still"].diff(dim=0) == 0).all()
    for name in ("zoom in", "zoom out"):
        assert red[name].diff().abs().max() < 2
    assert data[0]["inputs"].shape == (3, 3, 8, 8) and data[0]["inputs"].dtype == torch.uint8


def test_left_and_right_are_the_same_frames_backwards(pictures):
    data = MovingCrop([pictures], suffix=".png", num_frames=4)
    there, back = (data._windows(m, 120, 160, np.random.default_rng(0)) for m in ("left", "right"))
    np.testing.assert_allclose(there, back[::-1])
    there, back = (data._windows(m, 120, 160, np.random.default_rng(0)) for m in ("zoom in", "zoom out"))
    np.testing.assert_allclose(there, back[::-1])
    assert there.min() >= 0 and there[:, 2].max() <= 160 and there[:, 3].max() <= 120


def test_shuffled_frames_are_the_same_in_another_order(pictures):
    plain, mixed = (MovingCrop([pictures], suffix=".png", num_frames=8, shuffled=s) for s in (False, True))
    a, b = plain[0]["inputs"], mixed[0]["inputs"]
    assert not torch.equal(a, b)
    assert sorted(f.sum().item() for f in a) == sorted(f.sum().item() for f in b)
    batch = collate_clips([mixed[0], mixed[1]])
    assert batch["inputs"].shape == (2, 8, 3, 56, 56)


def test_pictures_of_clips_show_four_frames():
    clip = np.broadcast_to(np.arange(7, dtype=np.uint8)[:, None, None, None], (7, 3, 1, 3))
    strip, square, sized = four_frames(clip), four_frames(clip, 2), four_frames(clip, 2, side=20)
    assert strip.shape == (1, 18, 3) and square.shape == (4, 8, 3) and sized.shape == (8, 20, 3)
    gap = [255, 255]
    assert strip[0, :, 0].tolist() == [0, 0, 0, *gap, 2, 2, 2, *gap, 4, 4, 4, *gap, 6, 6, 6]
    assert square[:, ::5, 0].tolist() == [[0, 2], gap, gap, [4, 6]]
    assert sized[::5, ::11, 0].tolist() == [[0, 2], [4, 6]] and (sized[3:5] == 255).all()
