"""Methods whose ranks change in training: which ranks are active after which step, and that a resume is exact."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from cases import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from visadapt.adapters.colora import CoLoRA
from visadapt.adapters.diffora import DiffoRA
from visadapt.adapters.dylora import DyLoRA
from visadapt.adapters.increlora import IncreLoRA
from visadapt.adapters.sora import SoRA, shrink, sparsities
from visadapt.backbones.timm_vit import TimmViT
from visadapt.core.adapted import Adapted
from visadapt.core.io import read_manifest
from visadapt.errors import InputError
from visadapt.hooks.lifecycle import Lifecycle
from visadapt.optim.groups import TrainableGroups
from visadapt.optim.wrapper import AutocastOptimWrapper
from visadapt.testing import assert_close, noise, progress, tiny_backbone

D = 48


# ---- a run with the real hook, optimizer constructor and wrapper -----------------------------------------------------
class Model(nn.Module):
    def __init__(self, adapter):
        super().__init__()
        self.adapted = Adapted(copy.deepcopy(BACKBONE))
        self.adapted.add("a", adapter)
        self.head = nn.Linear(D, 3)
        self.adapted.set_trainable("a", heads=[self.head])

    @property
    def adapter(self):
        return self.adapted.adapters["a"]

    def loss(self, step):
        x = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(self.head(self.adapted(x).native), torch.tensor([step % 3, (step + 1) % 3]))
        return loss + sum(self.adapted.losses().values())


BACKBONE = tiny_backbone(TINY["vit"])


class Run:
    """A training of `total` batches whose pieces are those of a real one; `look` is called after every batch."""

    def __init__(self, adapter, total=12, every=1, lr=1e-2, **optimizer):
        torch.manual_seed(0)
        self.model = Model(adapter).train()
        wrapper = dict(type=AutocastOptimWrapper, accumulative_counts=every, clip_grad=dict(max_norm=1.0))
        wrapper["optimizer"] = dict(type="AdamW", lr=lr, weight_decay=0.1) | optimizer
        self.optim_wrapper = TrainableGroups(wrapper)(self.model)
        self.optim_wrapper.initialize_count_status(self.model, 0, total)
        self.iter, self.max_iters, self.epoch, self.max_epochs, self.seed = 0, total, 0, 1, 3
        self.hook = Lifecycle()
        self.hook.before_train(self)

    @property
    def adapter(self):
        return self.model.adapter

    def go(self, stop=None, look=lambda run: None):
        while self.iter < (self.max_iters if stop is None else stop):
            self.hook.before_train_iter(self, self.iter)
            torch.manual_seed(self.iter)
            self.optim_wrapper.update_params(self.model.loss(self.iter))
            look(self)
            self.iter += 1
        if stop is None:
            self.hook.after_train(self)
        return self

    def resumed(self, adapter, **settings):
        """The same point of the run in new objects, from what a checkpoint holds."""
        other = Run(adapter, total=self.max_iters, **settings)
        other.model.load_state_dict(copy.deepcopy(self.model.state_dict()))
        for name, parameter in self.model.named_parameters():
            other.model.get_parameter(name).grad = None if parameter.grad is None else parameter.grad.clone()
        other.optim_wrapper.load_state_dict(copy.deepcopy(self.optim_wrapper.state_dict()))
        other.optim_wrapper.initialize_count_status(other.model, self.iter, self.max_iters)
        other.iter = self.iter
        return other


TARGETS = ("q", "fc2")
METHODS = {
    "dylora": lambda: DyLoRA(4, frozen=True, dropout=0.1, targets=TARGETS),
    "sora": lambda: SoRA(4, sparsity=5.0, max_sparsity=20.0, stages=3, penalty=0.1, dropout=0.1, targets=TARGETS),
    "increlora": lambda: IncreLoRA(1, 2, warmup=0, interval=1, top=2, dropout=0.1, targets=TARGETS),
    "diffora": lambda: DiffoRA(2, dropout=0.1, targets=TARGETS),
    "colora": lambda: CoLoRA(0.2, targets=(*TARGETS, "patch")),
}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("stop", [1, 7, 10])
@pytest.mark.parametrize("name", METHODS)
def test_resume_is_exact(name, stop, every):
    """In new objects from a state dict, also in the middle of an accumulation: the same bits at the end."""
    whole = Run(METHODS[name](), total=14, every=every).go()
    parts = Run(METHODS[name](), total=14, every=every).go(stop).resumed(METHODS[name](), every=every).go()
    expected = whole.model.state_dict()
    changed = {k for k, v in Run(METHODS[name]()).model.state_dict().items() if not torch.equal(v, expected[k])}
    assert any("adapters" in k for k in changed) and not any("backbone" in k for k in changed)
    assert not [k for k, v in parts.model.state_dict().items() if not torch.equal(v, expected[k])]


# ---- what a ViT-B gets -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "per_rank", "extra"),
    [
        (lambda: DyLoRA(8, targets=ALL), 8, 0),
        (lambda: SoRA(8, targets=ALL), 8, 8 * 48),
        (lambda: IncreLoRA(max_rank=8, targets=ALL), 8, 8 * 48),
        (lambda: DiffoRA(8, targets=ALL), 8, 48 + 8 * (4 * 768 + 2 * 768 + 2 * 5 * 768)),
    ],
)
def test_parameter_counts_on_a_vit_b(make, per_rank, extra):
    with torch.device("meta"):
        backbone = TimmViT("vit_base_patch16_224")
    adapter = make()
    adapter.build(backbone)
    widths = 12 * (4 * 768 + 2 * 768 + 2 * 5 * 768)
    assert sum(p.numel() for p in adapter.parameters()) == per_rank * widths + extra


ALL = ("qkv", "proj", "fc1", "fc2")


def test_sora_has_the_published_size():
    assert 8 * 12 * (4 + 2 + 10) * 768 + 8 * 48 == 1_180_032
    with torch.device("meta"):
        backbone = TimmViT("vit_base_patch16_224")
    adapter = SoRA(8, targets=("qkv",))
    adapter.build(backbone)
    assert sum(p.numel() for p in adapter.parameters()) == 295_008


# ---- DyLoRA ----------------------------------------------------------------------------------------------------------
def first(adapter):
    return next(iter(adapter.pieces.values()))


def test_dylora_draws_one_rank_per_step_for_all_sites_and_processes():
    adapters = [Model(DyLoRA(4, targets=TARGETS)).adapter for _ in range(2)]
    seen = []
    for step in range(60):
        for seed, adapter in enumerate(adapters):
            torch.manual_seed(seed)  # the global state differs between processes
            adapter.on_step(progress(step))
        drawn = {p.drawn.item() for a in adapters for p in a.pieces.values()}
        assert len(drawn) == 1
        seen += drawn
    assert {seen.count(n) > 6 for n in (1, 2, 3, 4)} == {True} and set(seen) == {1, 2, 3, 4}


@pytest.mark.parametrize("frozen", [False, True])
@given(rank=st.integers(1, 6), data=st.data())
@settings(max_examples=15, deadline=None)
def test_dylora_equation_and_gradients(frozen, rank, data):
    n = data.draw(st.integers(1, rank))
    adapter = Model(DyLoRA(rank, 5, frozen=frozen, targets=TARGETS)).train().adapter
    noise(adapter)
    piece = first(adapter)
    piece.drawn.fill_(n)
    a, b = piece.a.detach(), piece.b.detach()
    expected = 5 / n * b[:, :n] @ a[:n]
    assert_close(piece.delta(), expected)
    piece.delta().square().sum().backward()
    learning = {n - 1} if frozen else set(range(n))
    for gradient in (piece.a.grad, piece.b.grad.T):
        assert {j for j in range(rank) if gradient[j].abs().sum() > 0} == learning
    adapter.eval()
    assert_close(piece.delta(), 5 / rank * b @ a)


def test_dylora_serves_the_chosen_rank(tmp_path):
    run = Run(DyLoRA(4, targets=TARGETS), total=3).go()
    adapted, piece = run.model.adapted, first(run.adapter)
    full = piece.delta().detach()
    assert run.model.training and torch.equal(full, piece.eval().delta())  # the last draw is forgotten
    run.adapter.use_rank(2)
    run.model.train()
    wanted = piece.delta().detach()
    assert_close(wanted, 2 * piece.b[:, :2] @ piece.a[:2])
    assert (wanted - full).abs().max() > 1e-4
    adapted.eval().save(tmp_path / "a.safetensors", "a")
    assert not any("drawn" in name for name in read_manifest(tmp_path / "a.safetensors")["tensors"])
    fresh = Adapted(copy.deepcopy(BACKBONE)).eval()
    fresh.load(tmp_path / "a.safetensors")
    assert torch.equal(first(fresh.adapters["a"]).delta(), wanted)
    before = piece.site.path, adapted.backbone.body.get_submodule(piece.site.path).weight.clone()
    adapted.merge("a")
    start, stop = piece.site.rows
    assert_close(adapted.backbone.body.get_submodule(before[0]).weight[start:stop], before[1][start:stop] + wanted)
    for bad in (0, 5, 1.5):
        with pytest.raises(InputError, match="ranks 1 to 4"):
            run.adapter.use_rank(bad)


# ---- SoRA ------------------------------------------------------------------------------------------------------------
def test_sora_thresholds():
    values = torch.tensor([-5.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 5.0])
    assert shrink(values, 1.0, "paper").tolist() == [-4, -1, -0.5, 0, 0, 0, 0, 0, 0.5, 1, 4]
    assert shrink(values, 1.0, "official").tolist() == [-4, -1, 0, -1, 0, 0, 0, 1, 0, 1, 4]


def test_sora_strengths():
    assert sparsities("linear", 0.0, 1.0, 3) == pytest.approx([0, 0.5, 1])
    assert sparsities("log_linear", 0.0, 1.0, 3) == pytest.approx([0, math.log((1 + math.e) / 2), 1])
    assert sparsities("exp_linear", 0.01, 1.0, 3) == pytest.approx([0.01, 0.1, 1])
    adapter = SoRA(sparsity=1.0, max_sparsity=3.0, stages=3)
    assert [adapter.strength(progress(step, 8)) for step in range(8)] == [1, 1, 1, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_sora_gates_take_their_own_steps(variant):
    """By hand beside a real run: Adam of the gates alone, no decay, rate of the scheduler, then the threshold."""
    run = Run(SoRA(4, sparsity=0.3 if variant == "official" else 30.0, variant=variant, targets=TARGETS), lr=1e-2)
    gates = [p.gate for p in run.adapter.pieces.values()]
    wanted = torch.stack(gates).detach().clone()
    mean, square, seen, counts = torch.zeros_like(wanted), torch.zeros_like(wanted), [], []
    take = run.adapter.on_gradients

    def spy(state):
        seen.append(torch.stack([g.grad for g in gates]).clone())
        take(state)

    run.adapter.on_gradients = spy
    for t in range(1, 7):
        lr = 1e-2 / t
        for group in run.optim_wrapper.optimizer.param_groups:
            group["lr"] = lr
        if run.optim_wrapper.base_param_settings is not None:
            run.optim_wrapper.base_param_settings["lr"] = lr
        run.go(t)
        mean = 0.9 * mean + 0.1 * seen[-1]
        square = 0.999 * square + 0.001 * seen[-1] ** 2
        wanted = wanted - lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * mean / (square.sqrt() + 1e-6)
        limit = 0.3 if variant == "official" else 30 * lr
        moved = wanted.sign() * (wanted.abs() - limit).clamp(min=0)
        wanted = torch.where(wanted.abs() < 2 * limit, 0, moved) if variant == "official" else moved
        assert_close(torch.stack(gates), wanted, f"gates after step {t}", 1e-6)
        counts.append(sum(run.adapter.ranks().values()))
    assert sum(s.abs().sum() > 0 for s in seen) == 5  # B is zero in the first step
    assert counts == sorted(counts, reverse=True) and 0 < counts[-1] < counts[0] < len(gates) * 4 + 1
    assert not any(g in run.optim_wrapper.optimizer.state for g in gates)


def test_sora_merges_without_the_ranks_of_closed_gates():
    model = Model(SoRA(4, 8, targets=TARGETS)).eval()
    noise(model.adapter)
    for piece in model.adapter.pieces.values():
        piece.gate.data[1:3] = 0
        kept = [0, 3]
        assert_close(piece.delta(), 2 * (piece.b[:, kept] * piece.gate[kept]) @ piece.a[kept])
    assert set(model.adapter.ranks().values()) == {2}


def test_sora_penalty_is_the_mean_over_all_gates():
    model = Model(SoRA(4, penalty=0.5, targets=TARGETS))
    gates = torch.cat([p.gate for p in model.adapter.pieces.values()])
    assert_close(model.adapted.losses()["loss_a_sparsity"], 0.5 * gates.abs().mean())
    assert not Model(SoRA(4, targets=TARGETS)).adapted.losses()


# ---- IncreLoRA -------------------------------------------------------------------------------------------------------
def grower(**changes):
    """Four sites, so that there is something to choose from: q of two blocks and fc2 of two blocks."""
    arguments = dict(rank=1, target_rank=2, warmup=1, interval=2, top=1, max_rank=4, penalty=0.0, targets=TARGETS)
    return IncreLoRA(**arguments | changes)


def trace(adapter, scores, steps):
    """Ranks and reserves after every step of a run whose scores are given, as [site, ...] per step."""
    model, seen = Model(adapter).train(), []
    pieces = list(adapter.pieces.values())
    for step in range(steps):
        adapter.on_step(progress(step, 100))
        seen.append([(p.active, p.born) for p in pieces])
        for piece, value in zip(pieces, scores(step)):
            piece.score.fill_(value)
        adapter.on_gradients(progress(step, 100))
    adapter.on_step(progress(steps, 100))
    seen.append([(p.active, p.born) for p in pieces])
    assert model.adapter is adapter
    return seen


def test_increlora_trace():
    """Warm-up 1, interval 2: the scores of the steps 3, 5, 7, 9 decide, and what they decide is there a step later."""
    seen = trace(grower(), lambda step: [1.0, 5.0, 2.0, 3.0], 10)
    reserve = [(1, 2)] * 4
    grown = [[(n, min(n + 1, 4)) if site == 1 else (1, 2) for site in range(4)] for n in (2, 3, 4)]
    assert seen == [
        [(1, 1)] * 4,
        *[reserve] * 3,
        *[grown[0]] * 2,
        *[grown[1]] * 2,
        *[grown[2]] * 2,
        [(1, 1), (4, 4), (1, 1), (2, 2)],  # the second site is full, so the next one grew; the target ends all reserves
    ]


def test_increlora_ranks_by_average_times_deviation():
    """The last score alone, or the average alone, would choose another site."""
    scores = [[4.0, 1.0, 0.0, 0.0], [4.0, 9.0, 0.0, 0.0], [4.0, 0.1, 0.0, 0.0], [4.0, 0.1, 5.0, 0.0]]
    mean, deviation = torch.zeros(4), torch.zeros(4)
    for row in torch.tensor(scores):
        mean = 0.85 * mean + 0.15 * row
        deviation = 0.85 * deviation + 0.15 * (row - mean).abs()
    assert mean.argmax() == 0 and torch.tensor(scores[-1]).argmax() == 2
    adapter = grower(betas=(0.85, 0.85))
    best = (mean * deviation).argmax().item()
    assert [active for active, _ in trace(adapter, lambda step: scores[step], 4)[-1]] == [
        1 + (n == best) for n in range(4)
    ]
    assert_close(adapter.sensitivity, mean)
    assert_close(adapter.uncertainty, deviation)


def test_increlora_lets_all_pass_that_tie_with_the_last():
    assert trace(grower(), lambda step: [1.0, 2.0, 2.0, 0.5], 4)[-1] == [(1, 2), (2, 3), (2, 3), (1, 2)]
    assert trace(grower(top=2), lambda step: [1.0, 2.0, 3.0, 0.5], 4)[-1] == [(1, 2), (2, 3), (2, 3), (1, 2)]


def test_increlora_grows_several_ranks_at_a_time_and_without_learning_ahead():
    seen = trace(grower(rank=2, target_rank=4, max_rank=8, advance_learn=False), lambda step: [3.0, 1.0, 1.5, 2.0], 10)
    assert [row[0] for row in seen[3:]] == [(1, 1), (3, 3), (3, 3), (5, 5), (5, 5), (7, 7), (7, 7), (7, 7)]
    assert seen[-1][3] == (3, 3)


def test_increlora_in_a_run_leaves_alone_what_is_not_born():
    """Neither decay nor moments before their time, e of a reserve held, fresh bias correction afterwards."""
    run = Run(grower(), total=14)
    start = {n: p.detach().clone() for n, p in run.adapter.named_parameters()}
    born = dict.fromkeys(start)

    def look(run):
        for key, piece in run.adapter.pieces.items():
            for name, count in (("a", piece.born), ("b", piece.born), ("e", piece.active)):
                for j, part in enumerate(getattr(piece, name)):
                    label = f"pieces.{key}.{name}.{j}"
                    if j < count:
                        born[label] = run.iter if born[label] is None else born[label]
                        assert run.optim_wrapper.optimizer.state[part]["step"] == run.iter - born[label] + 1
                    elif piece.scoring or name != "e":
                        assert born[label] is not None or torch.equal(part, start[label]), label

    run.go(look=look)
    assert sum(run.adapter.ranks().values()) == 8 and max(run.adapter.ranks().values()) > 1
    assert {step for label, step in born.items() if ".a.1" in label} == {1}
    assert {0, 1, None} < set(born.values()) <= {0, 1, 4, 6, 8, 10, None}
    for piece in run.adapter.pieces.values():
        assert all(e.count_nonzero() for e in list(piece.e)[: piece.active])
        assert piece.born == piece.active and not piece.scoring


def test_increlora_score_is_that_of_the_adapted_weight():
    """Against autograd on the weights themselves; also behind dropout, with checkpointing and after compilation."""
    model = Model(grower()).train()
    for step in (0, 1, 2):
        model.adapter.on_step(progress(step, 100))
    noise(model.adapter)
    model.loss(0).backward()
    found = {key: p.score.item() for key, p in model.adapter.pieces.items()}
    plain = copy.deepcopy(model)
    deltas = {key: p.eval().delta().detach() for key, p in plain.adapter.pieces.items()}
    plain.adapted.eval().merge("a")
    weights = {
        p.site.path: plain.adapted.backbone.body.get_submodule(p.site.path).weight for p in model.adapted.pieces()
    }
    for weight in weights.values():
        weight.requires_grad_(True)
    plain.loss(0).backward()
    for key, piece in model.adapter.pieces.items():
        gradient = weights[piece.site.path].grad[slice(*(piece.site.rows or (None,)))]
        expected = (gradient * deltas[key]).abs().sum() / math.sqrt(gradient.numel())
        assert found[key] == pytest.approx(expected.item(), rel=1e-4) and expected > 1e-5

    model.adapted.backbone.body.set_grad_checkpointing(True)
    for piece in model.adapter.pieces.values():
        piece.score.zero_()
    model.loss(0).backward()
    assert {key: p.score.item() for key, p in model.adapter.pieces.items()} == pytest.approx(found, rel=1e-4)


@pytest.mark.compile
def test_increlora_scores_in_a_compiled_model():
    model = Model(grower()).train()
    for step in (0, 1, 2):
        model.adapter.on_step(progress(step, 100))
    noise(model.adapter)
    x = torch.randn(2, 3, 28, 28)
    seen = []
    torch.compiler.reset()
    for run in (model.adapted, torch.compile(model.adapted, backend="eager", fullgraph=True)):
        run(x).tokens.square().sum().backward()
        seen.append([p.score.item() for p in model.adapter.pieces.values()])
        for piece in model.adapter.pieces.values():
            piece.score.zero_()
    assert seen[1] == pytest.approx(seen[0], rel=1e-4) and min(seen[0]) > 0


def test_increlora_takes_the_cheap_way_once_it_is_grown():
    run = Run(grower(), total=14).go(4)
    piece = first(run.adapter)
    assert piece.factors() is None and piece.eval().factors() is not None
    run.model.train()
    run.go()
    assert piece.factors() is not None and run.adapter._missing() == 0


def test_increlora_keeps_factors_orthonormal_part_by_part():
    model = Model(grower(rank=2, target_rank=4, max_rank=6, penalty=0.1))
    noise(model.adapter)
    for step in (0, 1):
        model.adapter.on_step(progress(step, 100))
    norms = []
    for piece in model.adapter.pieces.values():
        for a, b in list(zip(piece.a, piece.b))[:3]:  # the first two ranks, and a reserve of two
            norms += [(a @ a.T - torch.eye(len(a))).norm(), (b.T @ b - torch.eye(len(a))).norm()]
    loss = model.adapted.losses()["loss_a_orthogonality"]
    assert_close(loss, 0.1 * torch.stack(norms).mean())
    loss.backward()
    assert first(model.adapter).a[3].grad is None and first(model.adapter).a[2].grad.abs().sum() > 0


def test_increlora_loaded_from_a_file_knows_its_ranks(tmp_path):
    run = Run(grower(), total=14).go()
    run.model.adapted.eval().save(tmp_path / "a.safetensors", "a")
    fresh = Adapted(copy.deepcopy(BACKBONE)).eval()
    fresh.load(tmp_path / "a.safetensors")
    assert fresh.adapters["a"].ranks() == run.adapter.ranks()
    assert torch.equal(first(fresh.adapters["a"]).delta(), first(run.adapter).delta())


def test_increlora_refuses_a_run_that_is_too_short():
    adapter = Model(grower()).adapter
    adapter.on_step(progress(0, 11))
    with pytest.raises(InputError, match=r"needs 11 steps .* has 10; lower warmup"):
        adapter.on_step(progress(0, 10))
    assert [active for active, _ in trace(grower(), lambda step: [1, 2, 3, 4], 10)[-1]] == [1, 1, 2, 4]


# ---- DiffoRA ---------------------------------------------------------------------------------------------------------
def test_diffora_equation():
    model = Model(DiffoRA(2, 6, targets=TARGETS)).eval()
    noise(model.adapter)
    for piece in model.adapter.pieces.values():
        gate = piece.theta.sigmoid()
        shared = model.adapter.common[f"{piece.site.role}_{piece.site.dim_out}x{piece.site.dim_in}"]
        assert 0.3 < gate < 0.7 and gate != 0.5
        assert_close(piece.delta(), 3 * (gate * piece.b @ piece.a + (1 - gate) * shared.b @ shared.a))
    assert len(model.adapter.common) == 2


def test_diffora_learns_gates_and_factors_in_turn_and_then_decides():
    """The first half of the run; every step changes one of the two, weight decay included."""
    run, changes = Run(DiffoRA(2, targets=TARGETS), total=8), []
    before = {}

    def look(run):
        now = {n: p.detach().clone() for n, p in run.adapter.named_parameters()}
        changes.append({n.rsplit(".", 1)[1] for n in now if n in before and not torch.equal(now[n], before[n])})
        before.update(now)
        changes[-1] = changes[-1], run.adapter.chosen()

    look(run)
    run.go(look=look)
    learned = [what for what, _ in changes[1:]]
    assert learned == [{"a", "b"}, {"theta"}, {"a", "b"}, {"theta"}, *[{"a", "b"}] * 4]
    chosen = [choice for _, choice in changes[1:]]
    assert chosen[:4] == [None] * 4 and chosen[4] is not None and all(c == chosen[4] for c in chosen[4:])
    thetas = {key: piece.theta.item() for key, piece in run.adapter.pieces.items()}
    for layer in (0, 1):
        q, fc2 = (f"trunk_{layer:02d}_{role}" for role in TARGETS)
        assert chosen[4][q] == (thetas[q] >= thetas[fc2]) and chosen[4][fc2] == (thetas[fc2] > thetas[q])


def test_diffora_own_update_is_kept_as_it_was_and_the_others_share():
    adapter = Model(DiffoRA(2, targets=("q", "k", "v", "fc2"), keep=0.5)).eval().adapter
    noise(adapter)
    own = {key: (p.gate() * p.b @ p.a).detach() for key, p in adapter.pieces.items()}
    best = {layer: sorted(own, key=lambda k: -adapter.pieces[k].theta.item()) for layer in (0, 1)}
    adapter.finalize()
    for layer in (0, 1):
        wanted = [k for k in best[layer] if adapter.pieces[k].site.layer == layer][:2]
        assert [k for k, kept in adapter.chosen().items() if kept and f"_{layer:02d}_" in k] == sorted(
            wanted, key=list(own).index
        )
    for key, piece in adapter.pieces.items():
        shared = piece._common[0]
        assert_close(piece.delta(), own[key] if adapter.chosen()[key] else shared.b @ shared.a, key)
    again = {key: p.delta().detach() for key, p in adapter.pieces.items()}
    adapter.finalize()
    assert all(torch.equal(p.delta(), again[key]) for key, p in adapter.pieces.items())


def test_diffora_stores_shared_factors_once(tmp_path):
    model = Model(DiffoRA(2, targets=TARGETS)).eval()
    model.adapted.save(tmp_path / "a.safetensors", "a")
    names = [n for n in read_manifest(tmp_path / "a.safetensors")["tensors"] if n.startswith("adapters")]
    assert len(names) == 4 * 4 + 2 * 2 and sum("/shared/" in n for n in names) == 4
    groups = TrainableGroups(dict(optimizer=dict(type="AdamW", lr=1e-3))).groups(model, 1e-3)
    by_rate = {group["lr"]: group["params"] for group in groups}
    assert set(by_rate) == {1e-3, 1e-2} and all(p.ndim == 0 for p in by_rate[1e-2]) and len(by_rate[1e-2]) == 4


# ---- CoLoRA ----------------------------------------------------------------------------------------------------------
def contributions(adapter, seed=0):
    """A gradient whose filters differ widely in size between sites."""
    generator, statistic = torch.Generator().manual_seed(seed), {}
    for n, (key, piece) in enumerate(adapter.pieces.items()):
        shape = piece.b.shape[0], piece.a.shape[1]
        statistic[key] = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator) ** (
            n + 1
        )
    return statistic


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_colora_ranks_follow_contributions_within_the_budget(floor):
    adapter = Model(CoLoRA(0.2, floor=floor, top=0.25, targets=(*TARGETS, "patch"))).adapter
    statistic = contributions(adapter)
    adapter.calibrate(statistic)
    attribution = {k: g.square().sum(1) for k, g in statistic.items()}
    every = torch.cat(list(attribution.values())).sort(descending=True).values
    limit = every[round(0.25 * len(every)) - 1]
    delta = {k: (f >= limit).float().mean().item() for k, f in attribution.items()}
    mean = sum(delta.values()) / len(delta)
    shapes = {k: g.shape for k, g in statistic.items()}
    allowed = 0.2 * sum(o * i for o, i in shapes.values())

    def ranks(alpha):
        wanted = {k: round(alpha * min(shapes[k]) * (floor + delta[k] / mean)) for k in shapes}
        return {k: min(max(1, r), len(adapter.pieces[k].a)) for k, r in wanted.items()}

    def cost(found):
        return sum(r * sum(shapes[k]) for k, r in found.items())

    grid = [ranks(alpha) for alpha in torch.linspace(0, 3, 6001).tolist()]
    best = [r for r in grid if cost(r) <= allowed][-1]
    assert adapter.ranks() == best and 0.8 * allowed < cost(best) <= allowed
    assert len(set(best.values())) > 2


def test_colora_uses_the_ranks_it_counts_and_calibrates_by_gradients():
    model = Model(CoLoRA(0.2, targets=(*TARGETS, "patch")))
    assert {
        k: piece.factors()[0].any(1).sum().item() for k, piece in model.adapter.pieces.items()
    } == model.adapter.ranks()
    even = model.adapter.ranks()
    model.adapted.calibrate("a", [lambda: model.loss(0), lambda: model.loss(1)])
    assert model.adapter.ranks() != even
    noise(model.adapter)
    for key, piece in model.adapter.pieces.items():
        rank = model.adapter.ranks()[key]
        assert_close(piece.delta(), piece.b[:, :rank] @ piece.a[:rank], key)
        assert len(piece.a) >= rank
    kept = sum(
        r * (p.a.shape[1] + p.b.shape[0]) for r, p in zip(model.adapter.ranks().values(), model.adapter.pieces.values())
    )
    assert kept <= 0.2 * sum(p.a.shape[1] * p.b.shape[0] for p in model.adapter.pieces.values())


def test_colora_of_a_convolution_is_a_convolution_and_a_pointwise_one_behind_it():
    model = Model(CoLoRA(0.2, targets=("patch",)))
    noise(model.adapter)
    conv, piece, x = model.adapted.backbone.body.patch_embed.proj, first(model.adapter), torch.randn(2, 3, 28, 28)
    rank = piece.rank.item()
    inner = F.conv2d(x, piece.a[:rank].view(rank, *conv.weight.shape[1:]), stride=conv.stride)
    expected = F.conv2d(x, conv.weight, conv.bias, conv.stride) + F.conv2d(inner, piece.b[:, :rank, None, None])
    assert_close(conv(x), expected)


# ---- what users get wrong --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DyLoRA(0), "rank must be a whole number"),
        (lambda: DyLoRA(49, targets=TARGETS), "DyLoRA: rank 49 exceeds the site trunk_00_q of 48 x 48"),
        (lambda: DyLoRA(4, targets=("patch",)), "cannot sit at patch"),
        (lambda: SoRA(variant="oficial"), "variant 'oficial' .did you mean 'official'"),
        (lambda: SoRA(schedule="log"), "schedule 'log'"),
        (lambda: SoRA(sparsity=2.0, max_sparsity=1.0, stages=2), "at most max_sparsity"),
        (lambda: SoRA(max_sparsity=3.0), "set stages above 1"),
        (lambda: SoRA(sparsity=0.0, max_sparsity=1.0, stages=2, schedule="exp_linear"), "cannot start from sparsity 0"),
        (lambda: SoRA(stages=0), "stages must be"),
        (lambda: SoRA(betas=(0.9, 1.0)), r"beta2 must be in \[0, 1\)"),
        (lambda: IncreLoRA(2, 2), "ranks grow from rank"),
        (lambda: IncreLoRA(1, 4, max_rank=3), "max_rank=3"),
        (lambda: IncreLoRA(1, 2, growth=0), "growth must be"),
        (lambda: IncreLoRA(1, 2, growth=4, max_rank=4), "ranks grow from rank"),
        (lambda: IncreLoRA(warmup=-1), "warmup must be"),
        (lambda: IncreLoRA(1, 60, targets=TARGETS), "target_rank 60 exceeds the site trunk_00_q of 48 x 48"),
        (lambda: DiffoRA(keep=1.0), "keep is a share between 0 and 1"),
        (lambda: DiffoRA(search=0.0), "search is a share between 0 and 1"),
        (lambda: DiffoRA(50, targets=TARGETS), "DiffoRA: rank 50 exceeds"),
        (lambda: CoLoRA(budget=7), "budget is a share between 0 and 1"),
        (lambda: CoLoRA(floor=-1), "floor must be at least 0"),
        (lambda: CoLoRA(max_rank=60, targets=TARGETS), "CoLoRA: rank 60 exceeds the site trunk_00_q of 48 x 48"),
        (
            lambda: CoLoRA(budget=0.01, targets=TARGETS),
            "rank 1 everywhere takes 3.1% of the weights, above budget=0.01",
        ),
        (lambda: CoLoRA(targets=("norm1",)), "cannot sit at norm1"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(InputError, match=message):
        Model(make())
