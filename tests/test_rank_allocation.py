"""Methods that give ranks to where they count: which sites grow after which step, and within which budget."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from training import BACKBONE, TARGETS, Model, Run, first

from visadapt.adapters.colora import CoLoRA
from visadapt.adapters.increlora import IncreLoRA
from visadapt.core.adapted import Adapted
from visadapt.errors import InputError
from visadapt.testing import assert_close, noise, progress


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
    scores = [[4.0, 1.0, 0.0, 0.0], [4.0, 14.0, 0.0, 0.0], [4.0, 0.1, 0.0, 0.0], [4.0, 0.1, 5.0, 0.0]]
    mean, deviation = torch.zeros(4), torch.zeros(4)
    for row in torch.tensor(scores):
        mean = 0.85 * mean + 0.15 * row
        deviation = 0.85 * deviation + 0.15 * (row - mean).abs()
    assert mean.argmax() == 0 and torch.tensor(scores[-1]).argmax() == 2
    adapter = grower(betas=(0.85, 0.85))
    best = (mean * deviation).argmax().item()
    assert best == 1
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
    for piece in model.adapter.pieces.values():  # a reserve's e is held; nothing of it goes into the gradients' norm
        assert piece.e[0].grad.abs().sum() > 0 and piece.b[1].grad.abs().sum() > 0 and not piece.e[1].grad.any()
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
            norms += [(a @ a.T - torch.eye(len(a))).norm(), (b @ b.T - torch.eye(len(a))).norm()]
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
