"""Parameter groups and optimizer steps."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from cases import TINY
from mmengine.optim import build_optim_wrapper
from torch import nn

from visadapt.adapters.adaptformer import AdaptFormer
from visadapt.adapters.bitfit import BitFit
from visadapt.adapters.conv_branch import ConvBranch
from visadapt.adapters.full import FullFineTune
from visadapt.adapters.lora import LoRA
from visadapt.core.adapted import Adapted
from visadapt.errors import InputError
from visadapt.heads.linear import CosineHead
from visadapt.optim.groups import TrainableGroups, fused_on_cpu
from visadapt.optim.wrapper import AutocastOptimWrapper
from visadapt.tasks.classify import ImageClassifier
from visadapt.testing import assert_close, tiny_backbone

DEPTH, LR, DECAY = 3, 0.1, 0.5


class Task(nn.Module):
    """Adapters on a tiny backbone of three blocks, and a head that has a matrix and a scalar."""

    def __init__(self, *adapters, trainable=None, **arch):
        super().__init__()
        self.adapted = Adapted(tiny_backbone({**TINY["vit"], "arch": {**TINY["vit"]["arch"], "depth": DEPTH, **arch}}))
        for i, adapter in enumerate(adapters):
            self.adapted.add(f"a{i}", adapter)
        self.head = CosineHead(3, 48)
        self.adapted.set_trainable(*(self.adapted.adapters if trainable is None else trainable), heads=[self.head])


def wrapper_for(model, optimizer=None, **paramwise):
    optimizer = optimizer or dict(type="AdamW", lr=LR, weight_decay=0.3)
    wrapper = dict(type=AutocastOptimWrapper, constructor=TrainableGroups, optimizer=optimizer)
    return build_optim_wrapper(model, {**wrapper, "paramwise_cfg": paramwise or None})


def group_of(wrapper, parameter):
    return next(g for g in wrapper.optimizer.param_groups if any(p is parameter for p in g["params"]))


def trained_ids(wrapper):
    return [id(p) for g in wrapper.optimizer.param_groups for p in g["params"]]


# ---- groups ----------------------------------------------------------------------------------------------------------
def test_only_what_trains_enters_the_optimizer_and_once():
    task = Task(LoRA(rank=2), BitFit(), trainable=("a0",))
    wrapper = wrapper_for(task, layer_decay=DECAY, head_lr_mult=3.0, decay_vectors=False)
    wanted = [*task.adapted.adapters["a0"].parameters(), *task.head.parameters()]
    assert sorted(trained_ids(wrapper)) == sorted(id(p) for p in wanted)
    assert isinstance(wrapper, AutocastOptimWrapper) and isinstance(wrapper.optimizer, torch.optim.AdamW)


def test_without_options_everything_is_one_group_of_the_optimizers_own_settings():
    (group,) = wrapper_for(Task(LoRA(rank=2), BitFit())).optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (LR, 0.3)


@pytest.mark.parametrize("arch", [{}, {"final_norm": False}], ids=["norm", "no-norm"])
def test_rates_fall_block_by_block_from_the_head_down(arch):
    """lr * d ** (n - i) in block i, whatever else the network or the adapters have behind the blocks."""
    task = Task(BitFit(), **arch)
    wrapper = wrapper_for(task, layer_decay=DECAY)
    for piece in task.adapted.pieces():
        below = {-1: DEPTH + 1}.get(piece.site.layer, DEPTH - piece.site.layer)
        below = 0 if piece.site.role == "norm" else below
        assert group_of(wrapper, piece.db)["lr"] == pytest.approx(LR * DECAY**below), piece.site.path
    assert group_of(wrapper, task.head.weight)["lr"] == LR
    assert (
        len(wrapper.optimizer.param_groups) == DEPTH + 2
    )  # the stem, the blocks, and what lies beyond them with the head


def test_rates_of_base_values_that_train_follow_their_own_depth():
    task = Task(FullFineTune())
    wrapper, body = wrapper_for(task, layer_decay=DECAY), task.adapted.backbone.body
    places = [(body.pos_embed, DEPTH + 1), (body.patch_embed.proj.bias, DEPTH + 1), (body.norm.weight, 0)]
    places += [(p, DEPTH - i) for i, block in enumerate(body.blocks) for p in block.parameters()]
    for parameter, below in places:
        assert group_of(wrapper, parameter)["lr"] == pytest.approx(LR * DECAY**below)


def test_what_sites_share_has_the_full_rate_and_its_pieces_that_of_their_block():
    task = Task(ConvBranch(width=8), AdaptFormer(width=4))
    wrapper, branch = wrapper_for(task, layer_decay=DECAY), task.adapted.adapters["a0"]
    assert {group_of(wrapper, p)["lr"] for p in branch.common.parameters()} == {LR}
    for piece in task.adapted.pieces("a1"):
        rates = {group_of(wrapper, p)["lr"] for p in piece.parameters()}
        assert rates == {LR * DECAY ** (DEPTH - piece.site.layer)}


def test_one_tensor_that_all_sites_hold_has_the_full_rate():
    class Tied(LoRA):
        def shared(self, sites, backbone):
            self.factor = nn.Linear(48, 2, bias=False)
            return nn.ModuleDict({"factor": self.factor})

        def make(self, site, backbone, shared):
            piece = super().make(site, backbone, shared)
            piece.a = shared["factor"].weight
            return piece

    task = Task(Tied(rank=2))
    wrapper = wrapper_for(task, layer_decay=DECAY)
    assert group_of(wrapper, task.adapted.adapters["a0"].factor.weight)["lr"] == LR
    assert group_of(wrapper, task.adapted.adapters["a0"].pieces["trunk_00_q"].b)["lr"] == LR * DECAY**DEPTH


def test_an_adapter_chooses_factors_for_its_own_parameters():
    class Plus(LoRA):
        def lr_mult(self, name):
            return 4.0 if name.endswith(".b") else 1.0

    task = Task(Plus(rank=2), LoRA(rank=2))
    wrapper = wrapper_for(task, layer_decay=DECAY)
    plus, plain = (task.adapted.adapters[n].pieces["trunk_01_v"] for n in ("a0", "a1"))
    rate = LR * DECAY ** (DEPTH - 1)
    assert [group_of(wrapper, p)["lr"] for p in (plus.a, plus.b, plain.b)] == [rate, 4 * rate, rate]


def test_heads_have_a_factor_of_their_own():
    task = Task(LoRA(rank=2))
    wrapper = wrapper_for(task, head_lr_mult=5.0)
    assert group_of(wrapper, task.head.weight)["lr"] == group_of(wrapper, task.head.log_scale)["lr"] == 5 * LR
    assert group_of(wrapper, next(task.adapted.adapters.parameters()))["lr"] == LR


@pytest.mark.parametrize("given", [0.3, None])
def test_vectors_and_scalars_go_without_weight_decay_where_that_is_asked_for(given):
    """Also against the decay that the optimizer has by default."""
    optimizer = dict(type="AdamW", lr=LR) | ({} if given is None else {"weight_decay": given})
    task = Task(FullFineTune(), LoRA(rank=2))
    wrapper = wrapper_for(task, optimizer, decay_vectors=False)
    decays = {id(p): g["weight_decay"] for g in wrapper.optimizer.param_groups for p in g["params"]}
    for name, parameter in task.named_parameters():
        vector = name.endswith(("bias", "log_scale")) or ("norm" in name and name.endswith("weight"))
        assert decays[id(parameter)] == (0 if vector else given or 0.01), name


def test_norms_and_what_patterns_match_go_without_decay():
    """Everything else decays, biases too; a pattern that matches nothing is a slip."""
    task = Task(FullFineTune(), LoRA(rank=2))
    wrapper = wrapper_for(task, no_decay=["adapted.adapters.a1.pieces.*.b"])
    block = task.adapted.backbone.body.blocks[0]
    piece = next(iter(task.adapted.adapters["a1"].pieces.values()))
    decays = {
        p: group_of(wrapper, p)["weight_decay"] > 0 for p in (block.norm1.weight, block.mlp.fc1.bias, piece.a, piece.b)
    }
    assert list(decays.values()) == [False, True, True, False]
    with pytest.raises(InputError, match="matches no parameter"):
        wrapper_for(task, no_decay=["*.queries"])
    with pytest.raises(InputError, match="is a list"):
        wrapper_for(task, no_decay="*.b")


def test_wrapped_models_are_looked_into():
    task = Task(LoRA(rank=2))
    found = trained_ids(wrapper_for(SimpleNamespace(module=task), layer_decay=DECAY))
    assert found == trained_ids(wrapper_for(task, layer_decay=DECAY))


@pytest.mark.parametrize(
    ("paramwise", "message"),
    [
        (dict(layer_dekay=0.5), r"paramwise_cfg has no option 'layer_dekay' \(did you mean 'layer_decay'"),
        (dict(layer_decay=0.0), r"layer_decay must be in \(0, 1\], got 0"),
        (dict(layer_decay=1.5), "layer_decay must be in"),
        (dict(head_lr_mult=-1.0), "head_lr_mult must be above 0"),
    ],
)
def test_wrong_options_are_refused(paramwise, message):
    with pytest.raises(InputError, match=message):
        wrapper_for(Task(), **paramwise)


def test_no_rate_and_nothing_to_train_are_refused():
    with pytest.raises(InputError, match=r"optim_wrapper\.optimizer has no lr"):
        wrapper_for(Task(), dict(type="AdamW"))
    with pytest.raises(InputError, match="nothing trains"):
        wrapper_for(Task().requires_grad_(False))


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_steps_on_a_cpu_are_fused_and_equal_those_of_the_loop(kind):
    tasks = [Task(LoRA(rank=2)) for _ in range(2)]
    tasks[1].load_state_dict(tasks[0].state_dict())
    fused, loop = (
        wrapper_for(task, dict(type=kind, lr=0.05, weight_decay=0.3, **choice)).optimizer
        for task, choice in zip(tasks, ({}, {"foreach": False}))
    )
    assert [o.param_groups[0]["fused"] for o in (fused, loop)] == [True, None]
    for i in range(3):
        for optimizer in (fused, loop):
            torch.manual_seed(i)
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.randn_like(p)
            optimizer.step()
    for ours, theirs in zip(*(task.parameters() for task in tasks), strict=True):
        assert_close(ours.detach(), theirs.detach())


def test_what_a_fused_step_would_get_wrong_is_not_fused():
    """It reads gradients as they lie in memory; every second column of a matrix lies otherwise than its gradient."""
    parameter = nn.Parameter(torch.randn(3, 8)[:, ::2])
    assert fused_on_cpu(torch.optim.AdamW, [nn.Parameter(torch.randn(3, 4).T)]) == {"fused": True}
    for kind, parameters in ((torch.optim.AdamW, [parameter]), (torch.optim.SGD, [nn.Parameter(torch.randn(3))])):
        assert fused_on_cpu(kind, parameters) == {}


# ---- steps -----------------------------------------------------------------------------------------------------------
def line(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(4, 2)


def batches(count, size=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 4, generator=generator) for _ in range(count)]


def sgd(model, lr=0.1, **settings):
    return AutocastOptimWrapper(torch.optim.SGD(model.parameters(), lr=lr), **settings)


def step(wrapper, model, x):
    with wrapper.optim_context(model):
        loss = model(x).float().square().mean()
    wrapper.update_params(loss)
    return loss


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("clip", [None, dict(max_norm=0.05)])
def test_accumulated_batches_equal_one_big_batch(clip):
    """Seven batches in threes: two full steps, and a last one of a single batch, which the run's end brings."""
    small, big, xs = line(), line(), batches(7)
    accumulating = sgd(small, accumulative_counts=3, clip_grad=copy.copy(clip))
    accumulating.initialize_count_status(small, 0, 7)
    whole = sgd(big, clip_grad=copy.copy(clip))
    for i, x in enumerate(xs):
        before = copy.deepcopy(small)
        step(accumulating, small, x)
        if i in (2, 5, 6):
            step(whole, big, torch.cat(xs[i - i % 3 : i + 1]))
            assert_close(small.weight.detach(), big.weight.detach(), f"after batch {i}", 1e-6)
            assert all(p.grad is None for p in small.parameters())
        else:
            assert same(small, before)


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_clipping_bounds_the_step(dtype):
    model = line()
    before = [p.detach().clone() for p in model.parameters()]
    step(sgd(model, lr=1.0, dtype=dtype, clip_grad=dict(max_norm=0.05)), model, batches(1)[0])
    moved = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before)])
    assert moved.norm().item() == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", None])
def test_autocast_in_training_only(dtype):
    """Activations of a training step are in the lower precision; parameters, gradients and validation are not."""
    task = ImageClassifier(
        TINY["vit"], head=dict(type="LinearHead", num_classes=3), adapters={"a": dict(type="LoRA", rank=2)}
    )
    wrapper, seen = wrapper_for(task), []
    wrapper = AutocastOptimWrapper(wrapper.optimizer, dtype=dtype)
    block = task.adapted.backbone.body.blocks[0]
    for module in (block.attn.qkv, task.head.fc):
        module.register_forward_hook(lambda m, args, y: seen.append(y.dtype))
    kept = []
    task.head.fc.weight.register_hook(lambda g: kept.append(g.dtype))
    batch = dict(inputs=torch.rand(2, 3, 28, 42), labels=torch.tensor([0, 2]))
    loss = task.train_step(batch, wrapper)["loss"]
    assert seen == [getattr(torch, dtype or "float32")] * 2 and kept == [torch.float32] and loss.isfinite()
    assert {p.dtype for p in task.parameters()} == {torch.float32}
    seen.clear()
    task.eval()
    with torch.no_grad():
        task.val_step(batch)
    assert seen == [torch.float32] * 2 and not torch.is_autocast_enabled("cpu")


def test_a_loss_that_is_no_number_moves_nothing_and_some_in_a_row_stop():
    model, (x,) = line(), batches(1)
    wrapper, bad = sgd(model, stop_after_nan=3), float("nan") * x
    for _ in range(2):
        before = copy.deepcopy(model)
        step(wrapper, model, bad)
        step(wrapper, model, float("inf") * x.abs())
        assert same(model, before) and wrapper.bad_steps == 2
        step(wrapper, model, x)  # a good one begins the count anew
        assert not same(model, before)
    step(wrapper, model, bad)
    step(wrapper, model, bad)
    before = copy.deepcopy(model)
    with pytest.raises(InputError, match=r"the loss was nan for 3 steps in a row.*clip_grad"):
        step(wrapper, model, bad)
    assert same(model, before)


def test_an_accumulation_that_ends_with_no_number_does_not_run_over_into_the_next():
    model, xs = line(), batches(4)
    wrapper = sgd(model, accumulative_counts=2)
    before = copy.deepcopy(model)
    step(wrapper, model, xs[0])
    step(wrapper, model, float("nan") * xs[1])
    assert same(model, before)
    step(wrapper, model, xs[2])
    step(wrapper, model, xs[3])
    step(sgd(before), before, torch.cat(xs[2:]))
    assert_close(model.weight.detach(), before.weight.detach(), tolerance=1e-6)


def test_half_precision_skips_a_step_whose_scaled_gradients_overflow():
    model = line()
    before, wrapper = copy.deepcopy(model), sgd(model, dtype="float16")
    scale = wrapper.scaler.get_scale()
    step(wrapper, model, 1e3 * batches(1)[0])  # gradients of 1e6 times the scale are beyond half precision
    assert same(model, before) and wrapper.scaler.get_scale() == scale / 2


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_state_goes_round(dtype):
    """Two steps, a copy through state dicts, two more: the same as four in one go."""

    def made(model):
        groups = [{"params": [model.weight], "lr": 0.01}, {"params": [model.bias]}]
        return AutocastOptimWrapper(torch.optim.AdamW(groups, lr=0.1), dtype=dtype)

    xs = batches(4)
    first = line()
    wrapper = made(first)
    for x in (*xs[:2], *([1e4 * xs[0]] if dtype else [])):  # the overflow lowers the loss scale
        step(wrapper, first, x)
    second = line(seed=5)
    second.load_state_dict(first.state_dict())
    other = made(second)
    other.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    assert other.scaler.get_scale() == wrapper.scaler.get_scale() and other.get_lr() == wrapper.get_lr()
    for x in xs[2:]:
        step(wrapper, first, x)
        step(other, second, x)
    assert same(first, second)


def test_a_state_of_full_precision_starts_half_precision_with_a_fresh_loss_scale():
    model = line()
    other = sgd(model, dtype="float16")
    other.load_state_dict(sgd(model).state_dict())
    assert other.scaler.get_scale() == torch.amp.GradScaler("cpu").get_scale()


def test_unknown_precision_is_refused():
    with pytest.raises(InputError, match="dtype is 'bfloat16', 'float16' or None, got 'bf16'"):
        sgd(line(), dtype="bf16")
