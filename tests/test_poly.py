"""Polytropon and Multi-Head Routing: whose mixture an image gets, what is exported and merged, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from training import Run

from visadapt.adapters.lora import LoRA
from visadapt.adapters.poly import Poly
from visadapt.backbones.base import Backbone
from visadapt.backbones.timm_vit import TimmViT
from visadapt.core.adapted import Adapted
from visadapt.core.sites import Site
from visadapt.datasets.base import collate
from visadapt.errors import InputError
from visadapt.tasks.classify import ImageClassifier
from visadapt.testing import assert_close, difference, noise, progress, tiny_backbone

VIT = dict(type="TimmViT", name="test_vit", arch=dict(depth=2, embed_dim=48, num_heads=3, img_size=28, patch_size=14))
BASE = tiny_backbone(VIT)
X = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(1))
TASKS = torch.tensor([2, 0, 2, 1])
MHR = dict(n_tasks=3, n_skills=4, n_splits=3, rank=2, targets=["q", "fc1", "fc2"])


def adapt(**options):
    """A tiny ViT with the adapter "a", away from its start; the logits of tasks differ clearly."""
    adapted = Adapted(copy.deepcopy(BASE)).eval()
    torch.manual_seed(0)
    adapter = adapted.add("a", Poly(**(MHR | options)))
    noise(adapter)
    noise([p.logits for p in adapter.pieces.values()], std=1.0)
    adapted.set_trainable("a")
    return adapted


def run(adapted, x=X, tasks=None):
    adapted.ctx.tasks = None if tasks is None else torch.as_tensor(tasks)
    features = adapted(x)
    return torch.cat([features.native[:, None], features.tokens], 1)


# ---- the mixture ----------------------------------------------------------------------------------------------------
class Two(Backbone):
    """A linear that sees (B m, L, C), windows image-major, and one that sees (L, B, C)."""

    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(dim_in, dim_out), nn.Linear(dim_in, dim_out)])

    def sites(self):
        size = dict(dim_in=self.body[0].in_features, dim_out=self.body[0].out_features)
        windowed = Site("0", "proj", 0, **size, windows=True)
        return [windowed, Site("1", "proj", 1, **size, layout="LNC", batch_dim=1)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(*[st.integers(1, 3)] * 6, *[st.booleans()] * 2, st.sampled_from(["relaxed", "sigmoid", "rounded"]))
def test_every_image_has_the_update_of_its_task(splits, skills, rank, tasks, width, windows, correction, shared, how):
    adapter = Poly(tasks, skills, splits, rank, 3.0, how, correction, shared, targets=["proj"])
    adapted = Adapted(Two(splits * rank * width, splits * rank)).eval()
    adapted.add("a", adapter)
    noise(adapter, std=1.0)
    numbers = adapted.ctx.tasks = torch.arange(5) % tasks
    for piece, linear, m in zip(adapter.pieces.values(), adapted.backbone.body, (windows, 1)):
        z = piece.logits.sigmoid()
        z = z.round() if how == "rounded" else z
        z = torch.cat([z[:, :, :-1], torch.ones(tasks, splits, 1)], 2) if shared else z
        z = z * (splits / skills) ** 0.5 if correction else z / (z.sum(2, keepdim=True) + 1e-12)
        x, turn = torch.randn(5 * m, 4, linear.in_features), piece.site.batch_dim
        y = linear(x.movedim(0, turn)).movedim(turn, 0)
        for i, t in enumerate(numbers.tolist()):
            a = torch.cat([sum(z[t, s, k] * piece.a[s, k] for k in range(skills)) for s in range(splits)], 1)
            b = torch.cat([sum(z[t, s, k] * piece.b[s, k] for k in range(skills)) for s in range(splits)], 0)
            of_image = slice(i * m, (i + 1) * m)
            assert_close(y[of_image], x[of_image] @ (linear.weight + 3.0 / rank * b @ a).T + linear.bias)


def test_rounded_weights_that_are_all_zero_have_gradients_of_usual_size():
    adapted = adapt(routing="rounded", targets=["q"])
    pieces = adapted.pieces("a")
    with torch.no_grad():
        for piece in pieces:
            piece.logits[:, 0] = -1e-3
    run(adapted, tasks=TASKS).square().sum().backward()
    first, others = (torch.stack([p.logits.grad[:, part].norm() for p in pieces]) for part in (0, slice(1, None)))
    assert 0 < first.max() < 100 * others.max()


def test_l2_routing_divides_logits_by_their_length():
    piece = next(iter(adapt(routing="l2").adapters["a"].pieces.values()))
    z = piece.logits[[1]]
    assert_close(piece.weights([1]), z / z.square().sum(2, keepdim=True).sqrt())


@pytest.mark.peft
@pytest.mark.parametrize(("splits", "training"), [(1, False), (3, False), (3, True)])
def test_peft_gives_the_same(splits, training):
    """With PEFT's draws in training, one per image, where every image has a task of its own."""
    peft = pytest.importorskip("peft")
    from peft.tuners.poly.layer import Linear
    from torch.distributions.relaxed_bernoulli import RelaxedBernoulli

    adapted = adapt(n_tasks=4, n_splits=splits, rank=2)
    piece, base = adapted.adapters["a"].pieces["trunk_00_fc1"], adapted.backbone.body.blocks[0].mlp.fc1
    plain = copy.deepcopy(base)
    del plain.forward
    theirs = Linear(plain, "default", peft.PolyConfig(r=2, n_tasks=4, n_skills=4, n_splits=splits))
    values = {"poly_lora_A.default": piece.a.mT, "poly_lora_B.default": piece.b.mT}
    values["poly_router.default.module_logits"] = piece.logits.flatten(1)
    assert not theirs.load_state_dict(values, strict=False).unexpected_keys
    x, tasks = torch.randn(4, 5, 48), torch.tensor([3, 0, 1, 2])
    for model in (adapted, theirs):
        model.train(training)
    torch.manual_seed(0)
    expected = theirs(x, task_ids=tasks)
    torch.manual_seed(0)  # what PEFT drew, in our order
    z = RelaxedBernoulli(1.0, logits=piece.logits[tasks]).sample()
    piece.noise[tasks] = (z.logit() - piece.logits[tasks]).detach()
    adapted.ctx.tasks = tasks
    assert_close(base(x), expected)


def test_two_tasks_in_one_batch_are_two_passes_of_one_task():
    adapted = adapt()
    mixed = run(adapted, tasks=TASKS)
    for task in range(3):
        of_task = task == TASKS
        alone = run(adapted, X[of_task], TASKS[of_task])
        assert_close(mixed[of_task], alone)
        others = run(adapted, X[of_task], (TASKS[of_task] + 1) % 3)
        assert difference(alone, others) > 1e-2
    adapted.ctx.tasks = TASKS
    twice = adapted(X, views=2).tokens
    assert_close(twice[:4], twice[4:])


def test_tasks_may_change_between_passes_of_the_whole_network():
    adapted = adapt()
    run(adapted, tasks=TASKS)
    linear, x = adapted.backbone.body.blocks[0].mlp.fc1, torch.randn(4, 5, 48)
    before = linear(x)
    adapted.ctx.tasks = TASKS.roll(1)
    assert difference(linear(x), before) > 1e-2


def test_gradients_of_a_mixed_batch_are_the_sum_of_those_of_its_tasks():
    adapted = adapt().train()
    adapted.adapters["a"].on_step(progress(0))
    parameters = list(adapted.adapters["a"].parameters())
    whole = torch.autograd.grad(run(adapted, tasks=TASKS).square().sum(), parameters)
    parts = [run(adapted, X[t == TASKS], TASKS[t == TASKS]).square().sum() for t in range(3)]
    for mixed, single in zip(whole, torch.autograd.grad(sum(parts), parameters)):
        assert_close(mixed, single, "gradient")


# ---- one task -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("training", [False, True])
def test_fixed_exported_and_merged_are_the_routed_task(training):
    """In training too the mean of the draws is exported and merged, not the last draw."""
    adapted = adapt()
    adapter = adapted.adapters["a"]
    routed = {t: run(adapted, tasks=[t] * 4) for t in range(3)}
    adapter.on_step(progress(0))
    for task, expected in routed.items():
        adapter.set_task(task)
        assert_close(run(adapted), expected)
        assert torch.equal(run(adapted, tasks=TASKS), run(adapted)), "the fixed task counts"
        adapted.train(training)
        lora = adapter.to_lora(adapted, f"task{task}", task)
        adapted.merge("a")
        adapted.eval()
        assert type(lora) is LoRA and not adapted.is_enabled(f"task{task}")
        assert_close(run(adapted), expected)
        adapted.unmerge()
        with adapted.only(f"task{task}"):
            assert_close(run(adapted), expected)
    adapter.set_task(None)
    assert_close(run(adapted, tasks=[1] * 4), routed[1])


def test_equal_logits_are_the_mean_of_the_skills():
    adapted = adapt()
    adapter = adapted.adapters["a"]
    adapter.to_lora(adapted, "mean", None)
    before = run(adapted, tasks=TASKS)
    with adapted.only("mean"):
        mean = run(adapted)
    for piece in adapter.pieces.values():
        piece.logits.data.fill_(0.7)
    assert_close(run(adapted, tasks=TASKS), mean)
    assert difference(before, mean) > 1e-2


def test_a_file_keeps_the_tasks_and_the_fixed_one(tmp_path):
    adapted = adapt()
    adapted.adapters["a"].on_step(progress(0))
    adapted.ctx.tasks = TASKS
    adapted.save(str(tmp_path / "all.safetensors"))
    assert adapted.ctx.tasks is TASKS
    adapted.adapters["a"].set_task(2)
    adapted.save(str(tmp_path / "two.safetensors"))
    fresh = Adapted(copy.deepcopy(BASE)).eval()
    fresh.load(str(tmp_path / "two.safetensors"))
    assert torch.equal(run(fresh), run(adapted))
    other = Adapted(copy.deepcopy(BASE)).eval()
    other.load(str(tmp_path / "all.safetensors"))
    adapted.adapters["a"].set_task(None)
    assert torch.equal(run(other, tasks=TASKS), run(adapted, tasks=TASKS))
    assert not any(p.noise.any() for p in other.adapters["a"].pieces.values())


# ---- training -------------------------------------------------------------------------------------------------------
def test_draws_come_from_the_step_and_count_in_training_only():
    adapted, twin = adapt().train(), adapt().train()
    for model in (adapted, twin):
        model.adapters["a"].on_step(progress(3))
    first = run(adapted, tasks=TASKS)
    assert torch.equal(first, run(twin, tasks=TASKS)) and torch.equal(first, run(adapted, tasks=TASKS))
    adapted.adapters["a"].on_step(progress(4))
    assert difference(first, run(adapted, tasks=TASKS)) > 1e-3
    assert torch.equal(run(adapted.eval(), tasks=TASKS), run(adapt(), tasks=TASKS))
    adapted.adapters["a"].finalize()
    assert torch.equal(run(adapted.train(), tasks=TASKS), run(adapt(), tasks=TASKS))
    for routing in ("sigmoid", "rounded", "l2"):
        still = adapt(routing=routing).train()
        still.adapters["a"].on_step(progress(3))
        assert torch.equal(run(still, tasks=TASKS), run(still.eval(), tasks=TASKS))


def test_draws_are_a_relaxed_bernoulli_variable():
    """P(z < 1/2) = sigmoid(-logit), whatever the temperature, and the mean of z at temperature 1 by integration."""
    torch.manual_seed(0)
    adapter = Poly(n_tasks=1, n_skills=4000, targets=["q"], layers=[0])
    Adapted(copy.deepcopy(BASE)).add("a", adapter)
    (piece,) = adapter.pieces.values()
    piece.logits.data.fill_(1.5)
    adapter.on_step(progress(0))
    z = (piece.logits + piece.noise).sigmoid()
    u = (torch.arange(10_000) + 0.5) / 10_000
    assert (z < 0.5).float().mean().item() == pytest.approx(torch.tensor(-1.5).sigmoid().item(), abs=0.02)
    assert z.mean().item() == pytest.approx((u.logit() + 1.5).sigmoid().mean().item(), abs=0.01)


def test_activation_checkpointing_gives_equal_gradients_of_a_mixed_batch():
    adapted = adapt().train()
    adapted.adapters["a"].on_step(progress(0))
    parameters = list(adapted.adapters["a"].parameters())
    plain = torch.autograd.grad(run(adapted, tasks=TASKS).square().sum(), parameters)
    adapted.backbone.body.set_grad_checkpointing(True)
    for saving, gradient in zip(torch.autograd.grad(run(adapted, tasks=TASKS).square().sum(), parameters), plain):
        assert_close(saving, gradient, "gradient")


def test_a_run_goes_on_as_it_was_after_a_stop():
    options = dict(n_tasks=2, n_skills=3, task=1, targets=["q", "fc2"])
    whole = Run(Poly(**options)).go()
    stopped = Run(Poly(**options)).go(stop=5)
    resumed = stopped.resumed(Poly(**options)).go()
    for (name, value), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(value, other), name
    groups = {g["lr"]: len(g["params"]) for g in whole.optim_wrapper.optimizer.param_groups}
    assert groups == {1e-2: 2 * 4 + 2, 1.0: 4}  # a and b of four sites and the head; their logits


@pytest.mark.compile
def test_a_mixed_batch_compiles_as_one_graph():
    adapted = adapt()
    adapted.ctx.tasks = TASKS
    torch.compiler.reset()
    compiled = torch.compile(lambda x: adapted(x).tokens, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(X), adapted(X).tokens)
        adapted.ctx.tasks = torch.tensor([1, 1, 0, 2])
        assert_close(compiled(X), adapted(X).tokens)
        adapted.ctx.tasks = torch.tensor([1, 1, 0, -1])
        with pytest.raises(RuntimeError, match="task numbers are 0 to 2"):
            compiled(X)


@pytest.mark.parametrize(
    ("targets", "skills", "router"), [(["qkv"], 294_912, 6_144), (["qkv", "proj", "fc1", "fc2"], 1_179_648, 24_576)]
)
def test_number_of_values_on_a_vit_b(targets, skills, router):
    with torch.device("meta"):
        backbone = TimmViT("vit_base_patch16_224")
        adapter = Poly(n_tasks=5, n_splits=64, targets=targets)
        adapter.build(backbone)
    counts = {True: 0, False: 0}
    for name, parameter in adapter.named_parameters():
        counts[name.endswith(".logits")] += parameter.numel()
    assert counts == {False: skills, True: 5 * router}


# ---- batches with tasks ---------------------------------------------------------------------------------------------
def classifier(**options):
    adapters = {"a": dict(type="Poly", **(MHR | options))}
    task = ImageClassifier(VIT, dict(type="LinearHead", num_classes=3), adapters)
    noise(task.adapted.adapters)
    noise([p.logits for p in task.adapted.adapters["a"].pieces.values()], std=1.0)
    noise(task.head)
    return task.eval()


def test_the_task_field_of_a_batch_reaches_every_site():
    names = dict(index=0, path="", valid=True, unreadable="")
    samples = [dict(inputs=x, label=n % 3, task=t, **names) for n, (x, t) in enumerate(zip(X, TASKS.tolist()))]
    batch, task = collate(samples), classifier()
    assert torch.equal(batch["task"], TASKS)
    assert "task" not in collate([{k: v for k, v in s.items() if k != "task"} for s in samples])
    data = task.data_preprocessor(batch)
    logits = task(**data)
    for n, number in enumerate(TASKS.tolist()):
        task.adapted.adapters["a"].set_task(number)
        assert_close(task(data["inputs"][n : n + 1])[0], logits[n])
    task.adapted.adapters["a"].set_task(None)
    scores = torch.stack([p["scores"] for p in task(**data, mode="predict")])
    assert_close(scores, logits.softmax(1))
    assert_close(task(**data, mode="loss")["loss"], nn.functional.cross_entropy(logits, data["labels"]))
    with pytest.raises(InputError, match="the images have no task numbers"):
        task(data["inputs"])


def test_images_of_different_tasks_are_not_mixed():
    task = ImageClassifier(VIT, dict(type="LinearHead", num_classes=3), mix=dict(mixup=0.8))
    with pytest.raises(InputError, match="mix would blend images of different tasks"):
        task.loss(X, torch.tensor([0, 1, 2, 0]), task=TASKS)


# ---- what is refused ------------------------------------------------------------------------------------------------
def refused(message, function, *arguments, **options):
    with pytest.raises(InputError, match=message) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_tasks_that_do_not_fit_are_refused():
    adapted = adapt()
    adapter = adapted.adapters["a"]
    refused(r"adapter 'a' was made for 3 tasks and the images have no task numbers", run, adapted)
    for number in (3, -1):
        refused(rf"Poly: no task {number}; n_tasks=3 are numbered 0 to 2", run, adapted, X, [0, 1, 2, number])
        refused(rf"Poly: no task {number}; n_tasks=3", adapter.set_task, number)
        refused(rf"Poly: no task {number}; n_tasks=3", adapter.to_lora, adapted, "b", number)
    refused("Poly: no task 5; n_tasks=3", Poly, n_tasks=3, task=5)
    refused(r"Poly: no task 1; n_tasks=1", run, adapt(n_tasks=1), X, [0, 0, 0, 1])
    refused(r"ctx.tasks is \[3\] of int64; 4 images need 4 numbers of int64", run, adapted, X, [0, 1, 2])
    refused(r"ctx.tasks is \[4\] of float32; 4 images", run, adapted, X, [0.0, 1.0, 2.0, 0.0])


def test_merging_and_routing_need_one_task():
    adapted = adapt()
    adapted.ctx.tasks = torch.tensor([1, 1, 1, 1])
    before = {k: v.clone() for k, v in adapted.backbone.body.state_dict().items()}
    refused(r"adapter 'a' has another weight for each of its 3 tasks; fix one with set_task", adapted.merge, "a")
    assert all(torch.equal(v, before[k]) for k, v in adapted.backbone.body.state_dict().items())
    one = run(adapted, tasks=[1] * 4)
    adapted.route(["a", None, "a", None])
    refused(r"adapter 'a' is routed to images; fix its task with set_task", run, adapted, X, [1] * 4)
    adapted.adapters["a"].set_task(1)
    assert_close(run(adapted)[::2], one[::2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(n_splits=5), "Poly: n_splits 5 does not divide trunk_00_q of 48 x 48"),
        (dict(rank=49), "Poly: rank 49 exceeds the site trunk_00_q"),
        (dict(routing="sigmoi"), r"Poly: no routing 'sigmoi' \(did you mean 'sigmoid'"),
        (dict(routing="l2", shared_skill=True), "routing 'l2' has no sigmoid"),
        (dict(n_skills=0), "n_skills must be a whole number of at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    refused(message, lambda: Adapted(copy.deepcopy(BASE)).add("a", Poly(**(MHR | options))))
