"""Optimizers with rules of their own for pairs of factors or for weights that train in place."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from cases import TINY
from mmengine.optim import build_optim_wrapper
from torch import nn
from training import Run

from visadapt.adapters.adaptformer import AdaptFormer
from visadapt.adapters.full import FullFineTune
from visadapt.adapters.lora import LoRA
from visadapt.core.adapted import Adapted
from visadapt.errors import InputError
from visadapt.optim.allora import ALLoRA
from visadapt.optim.galore import PROJECTIONS, GaLore
from visadapt.optim.groups import TrainableGroups
from visadapt.optim.lora_pro import LoRAPro
from visadapt.optim.sst import SST
from visadapt.optim.wrapper import AutocastOptimWrapper
from visadapt.testing import noise, tiny_backbone

LR = 1e-2
SHORT = dict(rank=24, update_gap=2, warmup=2)  # of 48 singular vectors: a round takes 4 steps

CASES = {
    "LoRAPro": (LoRA, dict(type=LoRAPro)),
    "LoRAPro-official": (LoRA, dict(type=LoRAPro, variant="official")),
    "ALLoRA": (LoRA, dict(type=ALLoRA)),
    "ALLoRA-grad": (LoRA, dict(type=ALLoRA, mode="grad")),
    "SST": (FullFineTune, dict(type=SST, **SHORT)),
}
CASES |= {
    f"GaLore-{name}": (FullFineTune, dict(type=GaLore, rank=4, update_proj_gap=2, proj_type=name))
    for name in PROJECTIONS
}
every_optimizer = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def run_of(case, **settings):
    adapter, optimizer = case
    return Run(adapter(), **{"lr": LR, **optimizer, **settings})


def values(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def moved(model, before):
    return torch.cat([(p - before[name]).flatten() for name, p in values(model).items()]).norm().item()


# ---- what all of them do ---------------------------------------------------------------------------------------------
@every_optimizer
def test_a_resumed_run_ends_with_the_same_bits(case):
    """Stopped within an accumulation, within a draw or projection, and read as checkpoints are."""
    run = run_of(case, total=14, every=2).go(stop=7)
    file = io.BytesIO()
    torch.save(run.optim_wrapper.state_dict(), file)
    file.seek(0)
    kept = torch.load(file, weights_only=True)
    run.optim_wrapper.state_dict = lambda: kept
    adapter, optimizer = case
    resumed = run.resumed(adapter(), every=2, lr=LR, **optimizer).go()
    straight = run_of(case, total=14, every=2).go()
    for name, value in values(straight.model).items():
        assert torch.equal(value, values(resumed.model)[name]), name


@every_optimizer
def test_it_learns_under_autocast_with_parameters_in_full_precision(case):
    run = run_of(case, total=30, lr=1e-3)
    wrapper = AutocastOptimWrapper(run.optim_wrapper.optimizer, dtype="bfloat16", clip_grad=dict(max_norm=1.0))
    losses = []
    for _ in range(run.max_iters):
        with wrapper.optim_context(run.model):
            losses.append(run.model.loss(0))
        wrapper.update_params(losses[-1])
    assert losses[-1] < 0.8 * losses[0]
    tensors = [v for s in wrapper.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert {t.dtype for t in tensors if t.is_floating_point()} == {p.dtype for p in run.model.parameters()}
    assert {torch.float32} == {p.dtype for p in run.model.parameters()}


@every_optimizer
def test_a_step_inside_autocast_is_the_same(case):
    ends = []
    for inside in (False, True):
        run = run_of(case)
        noise((p for p in run.model.adapter.parameters()), 0.1)
        for number in range(2):
            run.model.loss(number).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                run.optim_wrapper.optimizer.step()
        ends.append(values(run.model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@every_optimizer
def test_clipped_gradients_are_what_it_steps_along(case):
    """Adam's steps do not depend on the size of gradients before that comes down to eps."""
    far = []
    for largest in (1.0, 1e-11):
        run = run_of(case, total=1, weight_decay=0.0)
        run.optim_wrapper.clip_grad_kwargs["max_norm"] = largest
        before = values(run.model)
        far.append(moved(run.go().model, before))
    assert far[1] < 0.05 * far[0]


@pytest.mark.parametrize("case", [c for n, c in CASES.items() if "GaLore" not in n])
def test_what_has_no_rule_trains_as_by_adamw_of_torch(case):
    run = run_of(case, weight_decay=0.3)
    head = copy.deepcopy(run.model.head)
    reference = torch.optim.AdamW(head.parameters(), lr=LR, weight_decay=0.3)
    for number in range(3):
        run.optim_wrapper.optimizer.zero_grad()
        run.model.loss(number).backward()
        for ours, theirs in zip(run.model.head.parameters(), head.parameters()):
            theirs.grad = ours.grad.clone()
        run.optim_wrapper.optimizer.step()
        reference.step()
    assert all(torch.equal(p, q) for p, q in zip(run.model.head.parameters(), head.parameters()))


@every_optimizer
def test_parameters_without_a_gradient_stay(case):
    run = run_of(case)
    before = values(run.model)
    run.optim_wrapper.optimizer.step()
    assert moved(run.model, before) == 0
    run.model.loss(0).backward()
    still = next(p for p in run.optim_wrapper.optimizer.param_groups[0]["params"][1::2] if p.grad is not None)
    still.grad, value = None, still.detach().clone()
    run.optim_wrapper.optimizer.step()
    assert torch.equal(still, value) and moved(run.model, before) > 0


@every_optimizer
def test_a_closure_is_called_with_gradients(case):
    run = run_of(case)

    def closure():
        loss = run.model.loss(0)
        loss.backward()
        return loss

    before = values(run.model)
    assert run.optim_wrapper.optimizer.step(closure).item() == pytest.approx(run_of(case).model.loss(0).item())
    assert moved(run.model, before) > 0


# ---- groups ----------------------------------------------------------------------------------------------------------
class Task(nn.Module):
    def __init__(self, *adapters):
        super().__init__()
        self.adapted = Adapted(tiny_backbone(TINY["vit"]))
        for n, adapter in enumerate(adapters):
            self.adapted.add(f"a{n}", adapter, enable=n == 0)
        self.head = nn.Linear(48, 3)
        self.adapted.set_trainable(*self.adapted.adapters, heads=[self.head])


def wrapper_for(model, paramwise=None, **optimizer):
    wrapper = dict(type=AutocastOptimWrapper, constructor=TrainableGroups, paramwise_cfg=paramwise)
    return build_optim_wrapper(model, {**wrapper, "optimizer": {"lr": LR, **optimizer}})


def rate(optimizer, parameter):
    return next(g["lr"] for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


@pytest.mark.parametrize("kind", [LoRAPro, "ALLoRA", "visadapt.optim.lora_pro.LoRAPro"])
def test_pairs_come_as_a_and_b_with_their_scale(kind):
    """By class, name and dotted name; of two adapters with other ranks and strengths, at blocks with other rates."""
    task = Task(LoRA(rank=2, alpha=6), LoRA(rank=3), AdaptFormer(width=4))
    task.adapted.enable("a0", scale=0.5)
    optimizer = wrapper_for(task, dict(layer_decay=0.5), type=kind).optimizer
    found = {}
    for group in optimizer.param_groups:
        if "pairs" in group:
            params = group["params"]
            found |= {(id(a), id(b)): (s, group["lr"]) for a, b, s in zip(params[::2], params[1::2], group["pairs"])}
            assert len(params) == 2 * len(group["pairs"])
    scales = {"a0": 0.5 * 3, "a1": 1.0}
    pieces = [p for name in scales for p in task.adapted.pieces(name)]
    assert found == {(id(p.a), id(p.b)): (scales[p.owner], LR * 0.5 ** (2 - p.site.layer)) for p in pieces}
    plain = [p for g in optimizer.param_groups if "pairs" not in g for p in g["params"]]
    wanted = [*task.head.parameters(), *task.adapted.adapters["a2"].parameters()]
    assert sorted(map(id, plain)) == sorted(map(id, wanted))


def test_matrices_are_the_weights_of_the_backbone_that_train():
    """Convolutions too; no vectors, no tokens or positions, no head, nothing of adapters that sit beside."""
    task = Task(FullFineTune(), AdaptFormer(width=4))
    optimizer = wrapper_for(task, type=GaLore).optimizer
    names = {id(p): name for name, p in task.named_parameters()}
    found = {names[id(p)] for g in optimizer.param_groups if "matrices" in g for p in g["params"]}
    body = task.adapted.backbone.body
    layers = {n for n, m in body.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert found == {f"adapted.backbone.body.{name}.weight" for name in layers}
    trained = [p for p in task.parameters() if p.requires_grad]
    assert sorted(id(p) for g in optimizer.param_groups for p in g["params"]) == sorted(map(id, trained))


def test_lora_plus_speeds_up_b_alone():
    task = Task(LoRA(rank=2), AdaptFormer(width=4))
    optimizer = wrapper_for(task, dict(layer_decay=0.5, loraplus_lr_ratio=16.0), type="AdamW").optimizer
    for piece in task.adapted.pieces():
        here = LR * 0.5 ** (2 - piece.site.layer)
        for name, parameter in piece.named_parameters():
            times = 16 if piece.owner == "a0" and name == "b" else 1
            assert rate(optimizer, parameter) == pytest.approx(times * here), name
    assert rate(optimizer, task.head.weight) == LR


class Tied(LoRA):
    """All sites have one A."""

    def make(self, site, backbone, shared):
        piece = super().make(site, backbone, shared)
        self.first = piece.a = getattr(self, "first", piece.a)
        return piece


@pytest.mark.parametrize(
    ("adapter", "optimizer", "paramwise", "message"),
    [
        (AdaptFormer(width=4), dict(type=LoRAPro), {}, "LoRAPro works on pairs of factors and none trains.*LoRA"),
        (FullFineTune(), dict(type=ALLoRA), {}, "ALLoRA works on pairs of factors and none trains"),
        (LoRA(), dict(type=GaLore), {}, "GaLore works on weight matrices of the backbone and none.*FullFineTune"),
        (LoRA(), dict(type=SST), {}, "SST works on weight matrices"),
        (LoRA(), dict(type=LoRAPro, variant="oficial"), {}, r"variant 'oficial' \(did you mean 'official'\?\)"),
        (LoRA(), dict(type=LoRAPro, delta=0.0), {}, "delta must be above 0"),
        (LoRA(), dict(type=LoRAPro, lr=-1.0), {}, "LoRAPro: lr must be at least 0, got -1"),
        (LoRA(), dict(type=ALLoRA, mode="grads"), {}, r"mode 'grads' \(did you mean 'grad'\?\)"),
        (LoRA(), dict(type=ALLoRA, eta=0.0), {}, "eta must be above 0"),
        (LoRA(), dict(type=ALLoRA, betas=[0.9]), {}, "betas are two numbers"),
        (FullFineTune(), dict(type=GaLore, proj_type="lft"), {}, r"proj_type 'lft' \(did you mean 'left'\?\)"),
        (FullFineTune(), dict(type=GaLore, rank=0), {}, "GaLore: rank must be at least 1, got 0"),
        (FullFineTune(), dict(type=GaLore, update_proj_gap=0), {}, "update_proj_gap must be at least 1"),
        (FullFineTune(), dict(type=SST, rank=0), {}, "SST: rank must be at least 1, got 0"),
        (FullFineTune(), dict(type=SST, update_gap=0), {}, "update_gap must be at least 1"),
        (FullFineTune(), dict(type="AdamW"), dict(loraplus_lr_ratio=16.0), "loraplus_lr_ratio .* no pair trains"),
        (LoRA(), dict(type="AdamW"), dict(loraplus_lr_ratio=0.0), "loraplus_lr_ratio must be above 0"),
        (LoRA(), dict(type=LoRAPro), dict(loraplus_lr_ratio=16.0), "one learning rate; leave out loraplus_lr_ratio"),
        (Tied(), dict(type=LoRAPro), {}, "a tensor is in several"),
    ],
)
def test_mistakes_are_told_in_one_line(adapter, optimizer, paramwise, message):
    with pytest.raises(InputError, match=message) as caught:
        wrapper_for(Task(adapter), paramwise, **optimizer)
    assert "\n" not in str(caught.value)
