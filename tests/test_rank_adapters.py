"""Methods whose ranks change in training: which ranks are active after which step, and that a resume is exact."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import BACKBONE, TARGETS, Model, Run, first

from visadapt.adapters.colora import CoLoRA
from visadapt.adapters.diffora import DiffoRA
from visadapt.adapters.dylora import DyLoRA
from visadapt.adapters.increlora import IncreLoRA
from visadapt.adapters.sora import SoRA, shrink, sparsities
from visadapt.backbones.timm_vit import TimmViT
from visadapt.core.adapted import Adapted
from visadapt.core.io import read_manifest
from visadapt.errors import InputError
from visadapt.optim.groups import TrainableGroups
from visadapt.testing import assert_close, noise, progress

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
        (lambda: IncreLoRA(1, 60, targets=TARGETS), "rank 60 exceeds the site trunk_00_q of 48 x 48"),
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
