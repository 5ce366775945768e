"""AdaLoRA through the bridge: the schedule of its ranks in real training steps, its regulariser, stops and refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from training import BACKBONE, Run

from visadapt.adapters.peft import PEFT
from visadapt.backbones.base import Backbone
from visadapt.core.adapted import Adapted
from visadapt.core.sites import Site
from visadapt.errors import InputError
from visadapt.testing import assert_close, noise, progress

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore::UserWarning:peft.*")]

TARGETS = ["q", "fc2"]  # at two blocks: four sites


class Linears(Backbone):
    """Linears with tanh between them, each a site of role proj."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def sites(self):
        found = [(n, m) for n, m in self.body.named_children() if isinstance(m, nn.Linear)]
        return [Site(n, "proj", layer, m.in_features, m.out_features) for layer, (n, m) in enumerate(found)]


def adalora(**options):
    return PEFT("AdaLoRA", dict(init_r=6, target_r=2, tinit=2, tfinal=3) | options, targets=TARGETS)


def values(adapter):
    """E of all sites, one after the other."""
    return torch.cat([p.layer.lora_E["default"].detach().flatten() for p in adapter.pieces.values()])


def cubic(step, total, tinit, tfinal):
    """The budget after a step, counted from 1, of 4 sites whose ranks fall from 6 to 2."""
    if step <= tinit:
        return 24
    if step >= total - tfinal:
        return 8
    return int(8 + 16 * (1 - (step - tinit) / (total - tfinal - tinit)) ** 3)


@pytest.mark.parametrize(("tinit", "tfinal", "total"), [(2, 3, 14), (0, 0, 12), (4, 1, 9)])
def test_total_rank_falls_along_the_cubic_schedule(tinit, tfinal, total):
    trace = []
    adapter = adalora(tinit=tinit, tfinal=tfinal)
    Run(adapter, total=total).go(look=lambda run: trace.append(values(run.adapter).count_nonzero().item()))
    assert trace == [cubic(step, total, tinit, tfinal) for step in range(1, total + 1)]
    assert trace[-1] == values(adapter).count_nonzero() == 8
    assert {tuple(p.shape) for n, p in adapter.named_parameters() if "lora_E" in n} == {(6, 1)}


def test_ranks_fall_every_few_steps_and_are_last_chosen_in_time():
    kept = []
    Run(adalora(deltaT=4), total=15).go(look=lambda run: kept.append(run.adapter.ranks.kept.clone()))
    counts = [k.sum().item() for k in kept]
    assert counts[3] == cubic(4, 15, 2, 3) < counts[2] == 24
    assert counts[3:7] == [counts[3]] * 4 and counts[7:11] == [cubic(8, 15, 2, 3)] * 4
    assert all(torch.equal(k, kept[11]) for k in kept[11:]) and counts[11] == 8


def test_the_triplets_that_stay_are_those_of_pefts_own_training():
    """PEFT's model around the same linears, its own call after every step, the same data and optimizer.

    In double precision, for rounding grows from step to step.
    """
    torch.manual_seed(0)
    linears = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8))
    config = dict(init_r=6, target_r=2, tinit=2, tfinal=3, deltaT=2, orth_reg_weight=0.1)
    theirs = peft.get_peft_model(
        copy.deepcopy(linears), peft.AdaLoraConfig(target_modules=["0", "2"], total_step=12, **config)
    )
    ours = Adapted(Linears(linears))
    adapter = ours.add("a", PEFT("AdaLoRA", config, targets=["proj"]))
    ours.set_trainable("a")
    pairs = list(zip((linears[0], linears[2]), adapter.pieces.values()))
    layers = [theirs.base_model.model[n] for n in (0, 2)]
    for layer, (_, piece) in zip(layers, pairs):
        piece.layer.load_state_dict(layer.state_dict(), strict=False)
    for model in (ours, theirs):
        model.double()
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.05) for m in (theirs, ours)]
    for step in range(12):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        adapter.on_step(progress(step, 12))
        factors = [m for layer in layers for m in (layer.lora_A["default"], layer.lora_B["default"].T)]
        grams = [m @ m.T for m in factors]  # what PEFT adds where a model gives its own loss
        regulariser = 0.1 * sum((g - torch.eye(6)).norm() for g in grams) / len(grams)
        assert_close(ours.losses()["loss_a_orthogonality"], regulariser)
        (theirs(x).sin().square().sum() + regulariser).backward()
        (ours.backbone.body(x).sin().square().sum() + sum(ours.losses().values())).backward()
        for optimizer in optimizers:
            optimizer.step()
        theirs.base_model.update_and_allocate(step + 1)
        adapter.on_update(progress(step, 12))
        for layer, (_, piece) in zip(layers, pairs):
            for name in ("lora_A", "lora_E", "lora_B"):
                assert_close(getattr(piece.layer, name)["default"], getattr(layer, name)["default"], name)
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert values(adapter).count_nonzero() == 4


def test_a_run_goes_on_as_it_was_after_a_stop():
    for stop in (1, 6, 12):
        whole = Run(adalora(deltaT=3), total=14).go()
        resumed = Run(adalora(deltaT=3), total=14).go(stop=stop).resumed(adalora(deltaT=3)).go()
        state = resumed.model.state_dict()
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, state[name]), f"{name} after a stop at {stop}"
        assert whole.adapter.ranks.kept.sum() == 8


def test_files_hold_the_triplets_and_not_the_allocator(tmp_path):
    run = Run(adalora(), total=12).go()
    run.model.adapted.save(str(tmp_path / "a.safetensors"))
    fresh = Adapted(copy.deepcopy(BACKBONE)).eval()
    report = fresh.load(str(tmp_path / "a.safetensors"))
    assert torch.equal(values(fresh.adapters["a"]), values(run.adapter))
    assert not [name for name in report.loaded if "sensitivity" in name or "kept" in name]
    x = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        before = fresh(x).tokens
        fresh.merge("a", check=x)
        assert_close(fresh(x).tokens, before)


def test_after_the_end_no_average_brings_triplets_back():
    run = Run(adalora(), total=12).go()
    noise(run.adapter)  # as an average over the steps does
    run.adapter.finalize()
    assert values(run.adapter).count_nonzero() == 8


def test_without_weight_there_is_no_regulariser_and_a_frozen_adapter_is_left_alone():
    adapted = Adapted(copy.deepcopy(BACKBONE))
    adapter = adapted.add("a", adalora(orth_reg_weight=0.0))
    assert adapted.losses() == {}
    noise(adapter)
    before = values(adapter)
    adapted.set_trainable()
    for step in range(12):
        adapter.on_update(progress(step, 12))
    assert torch.equal(values(adapter), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(target_r=6), "target_r=6 must be at least 1 and below init_r=6"),
        (dict(target_r=0), "target_r=0 must be at least 1"),
        (dict(beta1=1.0), "beta1=1.0 and beta2=0.85 must lie between 0 and 1"),
        (dict(deltaT=0), "deltaT=0 must be 1 or more"),
        (dict(tinit=-1), "tinit=-1 and tfinal=3 0 or more"),
        (dict(total_step=100), "option 'total_step' is refused: it is the length of the run"),
        (dict(r=4), "option 'r' is refused: its ranks are init_r, then fall to target_r"),
        (dict(init_lora_weights="pissa"), "option 'init_lora_weights' is refused: AdaLoRA has one start"),
        (dict(use_dora=True), "refuses its options: PeftType.ADALORA does not support DoRA"),
        (dict(orth_reg_weight=-1.0), "refuses its options: `orth_reg_weight` should be greater than or equal to 0"),
    ],
)
def test_options_that_give_no_schedule_are_refused(options, message):
    with pytest.raises(InputError, match="PEFT 'AdaLoRA'") as caught:
        adalora(**options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_that_is_too_short_is_refused():
    with pytest.raises(InputError, match=r"tinit=5 and tfinal=3 steps before the end, and the run has 8 steps; lower"):
        Run(adalora(tinit=5), total=8).go()
