"""What every adapter must hold on every tiny backbone it fits. Rows and backbones stand in cases.py."""

from __future__ import annotations

import copy
import functools
import importlib.util
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from cases import CAPABILITIES, CASES, ROLES, TINY, Case
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel

from visadapt.benchmark.flops import flops
from visadapt.commands.list import read_cases
from visadapt.core.adapted import Adapted
from visadapt.core.io import read_manifest, read_tensors
from visadapt.core.sites import select
from visadapt.errors import InputError
from visadapt.registry import ADAPTERS
from visadapt.testing import assert_close, difference, noise, progress, settle, tiny_backbone, trained

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
KINDS = ("delta", "weight", "tokens", "attention", "prompt", "side")


@functools.cache
def pristine(name):
    return tiny_backbone(TINY[name])


@dataclass(frozen=True)
class Pair:
    case: Case
    backbone: str

    def __str__(self):
        return f"{self.case}-{self.backbone}"

    @property
    def cls(self):
        return ADAPTERS.get(self.case.adapter)

    @functools.cached_property
    def declared(self):
        """An adapter of this row, not built: its kinds and flags, which may depend on its arguments."""
        return self.adapter()

    @property
    def acts(self):
        """Something is attached, or base values are replaced."""
        return bool(self.declared.kinds) or self.cls.trains_base

    @property
    def routes(self):
        """Weights only, so that images of one batch may have one each."""
        kinds = set(self.declared.kinds)
        return bool(kinds) and kinds <= {"delta", "weight"} and not self.cls.trains_base

    def adapter(self, **changes):
        return ADAPTERS.build({"type": self.case.adapter, **self.case.arguments, **changes})

    def fits(self, **changes):
        backbone, adapter = pristine(self.backbone), self.adapter(**changes)
        if not adapter.needs <= backbone.capabilities:
            return False
        try:
            select(backbone.sites(), adapter.targets, adapter.layers, "")
        except InputError:
            return False
        return True


def pairs(case):
    """The row on every backbone it fits; one mark where a package it needs is not there."""
    if case.extra and importlib.util.find_spec(case.extra) is None:
        reason = f"needs the '{case.extra}' extra"
        return [pytest.param(Pair(case, "vit"), id=str(case), marks=pytest.mark.skip(reason=reason))]
    marks = [pytest.mark.peft] if case.extra == "peft" else []
    fitting = [pair for pair in (Pair(case, name) for name in TINY) if pair.fits()]
    quick = (fitting[0], fitting[-1]) if fitting else ()  # the plain ViT and the one that is least like it
    return [
        pytest.param(pair, id=str(pair), marks=marks if pair in quick else [*marks, pytest.mark.slow])
        for pair in fitting
    ]


PARAMS = [param for case in CASES for param in pairs(case)]
ALL = [param.values[0] for param in PARAMS if not any(m.name == "skip" for m in param.marks)]
every_pair = pytest.mark.parametrize("pair", PARAMS)


def of_kind(kind):
    return next(pair for pair in ALL if kind in pair.declared.kinds)


# ---- what the checks share -------------------------------------------------------------------------------------------
def adapt(pair, *names, noisy=True, **changes):
    """The backbone with adapters of the pair's sort, "a" where none is named; the first one is enabled."""
    names = names or ("a",)
    adapted = Adapted(copy.deepcopy(pristine(pair.backbone))).eval()
    adapted.ctx.num_frames = pair.case.frames
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        adapter = adapted.add(name, pair.adapter(**changes), enable=False)
        if adapter.calibration is not None:
            adapted.calibrate(name, [lambda: joined(adapted(images(pair))).square().sum()])
        if noisy:
            perturb(adapted, name, seed)
        with adapted.only(name):  # batch norms of an adapter, away from their start, know the data as after training
            settle(adapter, lambda: adapted(images(pair, seed=3, count=4)))
    adapted.enable(names[0])
    return adapted.eval()


def perturb(adapted, name, seed):
    with adapted.only(name):
        noise(trained(adapted, name).values(), seed=seed)


def images(pair, seed=0, count=2, rows=2, cols=3):
    patch = pristine(pair.backbone).patch
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count * pair.case.frames, 3, rows * patch, cols * patch, generator=generator)


def joined(features):
    return torch.cat([features.native[:, None], features.tokens], 1)


@torch.no_grad()
def outputs(adapted, x):
    """(B, 1 + N, D): the pooled vector and the patch tokens."""
    return joined(adapted(x))


def base_outputs(pair, x):
    with torch.no_grad():
        return joined(pristine(pair.backbone)(x))


class WithHead(nn.Module):
    """What trains: an adapted backbone under a head, and a loss that looks at every token."""

    def __init__(self, adapted):
        super().__init__()
        torch.manual_seed(7)
        self.adapted, self.head = adapted, nn.Linear(adapted.backbone.pooled_dim("native"), 3)
        adapted.set_trainable(*adapted.adapters, heads=[self.head])

    def forward(self, x):
        features = self.adapted(x)
        tokens = features.tokens
        weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(5))
        return self.head(features.native).square().sum() + (weights * tokens).sum()

    def trainable(self):
        return trained(self.adapted, "a") | {f"head {k}": p for k, p in self.head.named_parameters()}


def gradients(model, x):
    """Gradients of everything that trains, by name."""
    model.zero_grad()
    model(x).backward()
    return {k: p.grad.clone() for k, p in model.trainable().items()}


def last_block(adapted):
    path = [site.path for site in adapted.backbone.sites() if site.role == "block"][-1]
    return adapted.backbone.body.get_submodule(path)


def adapted_modules(adapted):
    """Where adapter "a" reads from the network or trains it; the last block where it does neither."""
    body, adapter = adapted.backbone.body, adapted.adapters["a"]
    paths = [s.source or s.path for s in (p.site for p in adapter.pieces.values())]
    paths += [name.rpartition(".")[0] for name in adapter.base_parameters(adapted.backbone)]
    return [body.get_submodule(path) for path in dict.fromkeys(paths)] or [last_block(adapted)]


def zero_by_mathematics(adapted, label):
    _, _, rest = label.partition("pieces.")
    adapter = adapted.adapters["a"]
    if not rest:
        return label.endswith(adapter.zero_grad)
    return adapter.pieces[rest.split(".")[0]].site.role in adapter.zero_grad


def bits(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_same_bits(module, before):
    after = module.state_dict()
    assert list(after) == list(before)
    different = [k for k, v in before.items() if not torch.equal(after[k], v)]
    assert not different, f"changed: {different}"


def assert_nothing_attached(body):
    for path, module in body.named_modules():
        assert "forward" not in module.__dict__, f"{path} has a forward object"
        assert not module._forward_hooks and not module._forward_pre_hooks, f"{path} has hooks"


# ---- the table -------------------------------------------------------------------------------------------------------
def test_every_registered_adapter_has_a_row():
    assert {c.adapter for c in CASES} >= set(ADAPTERS.names())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_row_fits_a_backbone(case):
    assert pairs(case)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_an_adapter(kind):
    assert of_kind(kind)


@pytest.mark.parametrize("name", TINY)
def test_literal_capabilities_and_roles_are_those_of_the_backbone(name):
    assert set(CAPABILITIES[name]) == pristine(name).capabilities
    assert set(ROLES[name].split()) == {site.role for site in pristine(name).sites()}


def test_list_names_the_backbones_that_are_tested():
    cases, run = read_cases(), {}
    for pair in ALL:
        run.setdefault(pair.case.adapter, set()).add(pair.backbone)
    for entry in ADAPTERS.entries():
        if entry.name in run:  # rows whose package is missing are skipped
            assert set(cases.backbones(entry)) == run[entry.name], entry.name


@every_pair
def test_kinds_and_trainable_values_are_as_declared(pair):
    adapted = adapt(pair, noisy=False)
    adapter = adapted.adapters["a"]
    assert {p.kind for p in adapted.pieces("a")} == set(pair.declared.kinds)
    assert bool(trained(adapted, "a")) == pair.case.trains
    assert bool(adapter.base_parameters(adapted.backbone)) == pair.cls.trains_base
    assert all(p.folds for p in adapted.pieces("a")) or not pair.declared.mergeable


# ---- output ----------------------------------------------------------------------------------------------------------
@every_pair
def test_identity_at_init_is_as_declared(pair):
    """In double precision: what is left there is the method's own, not the rounding of factors that cancel."""
    adapted, x = adapt(pair, noisy=False).double(), images(pair).double()
    fresh = outputs(adapted, x)
    with adapted.disabled():
        error = difference(fresh, outputs(adapted, x))
    assert (error <= 1e-10) == adapted.adapters["a"].identity_at_init


@every_pair
def test_output_changes_and_is_the_base_when_disabled(pair):
    adapted, x = adapt(pair), images(pair)
    base = base_outputs(pair, x)
    assert (difference(outputs(adapted, x), base) > 1e-3) == pair.acts
    with adapted.disabled():
        assert torch.equal(outputs(adapted, x), base)
    adapted.enable()
    assert torch.equal(outputs(adapted, x), base)


@every_pair
def test_base_is_untouched_and_comes_back_bit_for_bit(pair):
    base = pristine(pair.backbone).body
    before, types = bits(base), [type(m) for m in base.modules()]
    adapted = adapt(pair)
    body = adapted.backbone.body
    assert [type(m) for m in body.modules()] == types
    if not pair.cls.trains_base:
        assert_same_bits(body, before)
    assert not any(p.requires_grad for p in body.parameters())
    with adapted.disabled():
        assert_same_bits(body, before)
    adapted.remove("a")
    assert_same_bits(body, before)
    assert not any(p.requires_grad for p in body.parameters())
    assert_nothing_attached(body)


@every_pair
def test_every_image_size_and_every_image_for_itself(pair):
    adapted, patch = adapt(pair), pristine(pair.backbone).patch
    bottom, right = min(5, patch - 1), min(1, patch - 1)  # what the backbone pads to whole patches
    x = images(pair, rows=3, cols=2)[:, :, : 3 * patch - bottom, : 2 * patch - right]
    y = outputs(adapted, x)
    assert_close(y, outputs(adapted, nn.functional.pad(x, (0, right, 0, bottom))))
    assert_close(outputs(adapted, x[: pair.case.frames]), y[: pair.case.frames])
    assert (difference(y, base_outputs(pair, x)) > 1e-3) == pair.acts


# ---- training --------------------------------------------------------------------------------------------------------
@every_pair
def test_only_adapter_and_head_get_gradients_and_all_of_them_do(pair):
    model = WithHead(adapt(pair)).train()
    trainable = model.trainable()
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trainable.values()}
    sums = dict.fromkeys(trainable, 0.0)
    for step in range(pair.case.steps):
        model.adapted.adapters["a"].on_step(progress(step))
        for label, gradient in gradients(model, images(pair, seed=step)).items():
            sums[label] += gradient.abs().sum().item()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    without = [k for k, total in sums.items() if not total > 1e-6 and not zero_by_mathematics(model.adapted, k)]
    assert not without, f"no gradient: {without}"


@every_pair
def test_an_optimizer_step_changes_what_trains_and_nothing_else(pair):
    model = WithHead(adapt(pair)).train()
    before, trainable = bits(model), model.trainable()
    gradients(model, images(pair))
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1).step()
    wanted = {k for k, p in model.named_parameters() if any(p is t for t in trainable.values())}
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    learnt = {k for k in changed if k.startswith("adapted.adapters.") and k.endswith(STATISTICS)}
    assert changed - learnt == wanted


@every_pair
def test_activation_checkpointing_gives_equal_gradients(pair):
    model, x = WithHead(adapt(pair)).train(), images(pair)
    runs = []
    last_block(model.adapted).register_forward_pre_hook(lambda *_: runs.append(1))
    torch.manual_seed(3)
    plain = gradients(model, x)
    model.adapted.backbone.body.set_grad_checkpointing(True)
    torch.manual_seed(3)
    saving = gradients(model, x)
    assert len(runs) == (3 if pair.case.trains else 2)
    for label, gradient in plain.items():
        assert_close(saving[label], gradient, label)


@every_pair
def test_bfloat16_autocast_keeps_parameters_in_float32(pair):
    model, x = WithHead(adapt(pair)).train(), images(pair)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x)
    loss.backward()
    assert loss.isfinite()
    for label, parameter in model.trainable().items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, label
        assert parameter.grad.isfinite().all(), label
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        rough = outputs(model.adapted, x).float()
    assert difference(rough, outputs(model.adapted, x)) < 0.2


@every_pair
def test_nothing_below_the_first_adapted_site_keeps_activations(pair):
    layers = dict(layers=[-1])
    changes = layers if "layers" in pair.cls.__init__.__annotations__ and pair.fits(**layers) else {}
    adapted = adapt(pair, **changes)
    model, kept, seen = WithHead(adapted).train(), [], []
    adapted.backbone.register_forward_pre_hook(
        lambda *_: kept.clear()
    )  # a side network ran before and may keep its own
    for module in adapted_modules(adapted):
        module.register_forward_pre_hook(lambda m, args: seen.append((args[0].requires_grad, len(kept))), prepend=True)
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(images(pair)).backward()
    assert seen[0] == (False, 0)


# ---- files and copies ------------------------------------------------------------------------------------------------
@every_pair
def test_saved_and_loaded_into_a_fresh_model_gives_equal_output(pair, tmp_path):
    model, x, path = WithHead(adapt(pair)), images(pair), tmp_path / "a.safetensors"
    model.adapted.save(path, "a", heads={"h": model.head})
    fresh = Adapted(copy.deepcopy(pristine(pair.backbone))).eval()
    fresh.ctx.num_frames = pair.case.frames
    head = nn.Linear(fresh.backbone.pooled_dim("native"), 3)
    report = fresh.load(path, heads={"h": head})
    assert torch.equal(outputs(fresh, x), outputs(model.adapted, x))
    assert_same_bits(head, bits(model.head))
    manifest = read_manifest(path)
    tensors = read_tensors(path, manifest)
    assert set(manifest["tensors"]) == set(tensors)
    assert set(report.loaded) == set(tensors) - {"probe/output"} and not report.unexpected
    stored = {k.split("/", 2)[2] for k in tensors if k.startswith(("adapters/", "base/"))}
    assert len(stored) >= len(trained(model.adapted, "a"))


@every_pair
def test_deepcopy_is_independent(pair):
    adapted, x = adapt(pair), images(pair)
    before = outputs(adapted, x)
    twin = copy.deepcopy(adapted)
    assert torch.equal(outputs(twin, x), before)
    perturb(twin, "a", seed=9)
    assert torch.equal(outputs(adapted, x), before)
    assert (difference(outputs(twin, x), before) > 1e-3) == pair.case.trains
    twin.remove("a")
    assert torch.equal(outputs(adapted, x), before)


@every_pair
def test_pickle_keeps_everything(pair):
    adapted, x = adapt(pair), images(pair)
    other = pickle.loads(pickle.dumps(adapted))
    assert torch.equal(outputs(other, x), outputs(adapted, x))
    with other.disabled():
        assert torch.equal(outputs(other, x), base_outputs(pair, x))


@every_pair
def test_construction_is_reproducible_from_a_seed(pair):
    first, second = adapt(pair, noisy=False), adapt(pair, noisy=False)
    assert_same_bits(second, bits(first))


# ---- merging ---------------------------------------------------------------------------------------------------------
@every_pair
def test_merge_leaves_a_plain_backbone_and_unmerge_restores_bits(pair):
    """Of adapters that fold in part, the rest stays at work and adds no FLOPs of linears, convolutions or attention."""
    adapted, x = adapt(pair), images(pair)
    pieces = adapted.pieces("a")
    if not pair.declared.mergeable and not any(p.folds for p in pieces):
        with pytest.raises(InputError, match="no pieces|" + ".*".join(sorted(pair.declared.kinds))):
            adapted.merge("a")
        return
    base, body = pristine(pair.backbone).body, adapted.backbone.body
    before = outputs(adapted, x)
    assert adapted.merge("a", check=x) > 0
    assert_close(outputs(adapted, x), before)
    assert [type(m) for m in body.modules()] == [type(m) for m in base.modules()]
    for path in {p.site.path for p in pieces if p.folds}:
        assert_nothing_attached(body.get_submodule(path))
    assert [p.on for p in pieces] == [not p.folds for p in pieces]
    if pair.declared.mergeable:
        assert_nothing_attached(body)
    with torch.no_grad():
        assert flops(functools.partial(adapted, x)) == flops(functools.partial(pristine(pair.backbone), x))
    adapted.unmerge()
    assert torch.equal(outputs(adapted, x), before)
    with adapted.disabled():
        assert_same_bits(body, bits(base))
        assert torch.equal(outputs(adapted, x), base_outputs(pair, x))


@every_pair
def test_a_model_in_half_precision_merges(pair):
    """To the weights that its rounded values give in float32, rounded once."""
    rounded = adapt(pair).bfloat16()
    if not any(p.folds for p in rounded.pieces("a")):
        return
    wanted = copy.deepcopy(rounded).float()
    wanted.merge("a")
    rounded.merge("a")
    assert_same_bits(rounded.backbone.body, bits(wanted.backbone.body.bfloat16()))


# ---- several adapters ------------------------------------------------------------------------------------------------
@every_pair
def test_two_adapters_switch_stack_and_go(pair):
    x = images(pair)
    if "attention" in pair.declared.kinds:
        with pytest.raises(InputError, match="one per attention"):
            adapt(pair, "a", "b")
        return
    adapted, base = adapt(pair, "a", "b"), base_outputs(pair, x)
    a = outputs(adapted, x)
    adapted.enable("b")
    b = outputs(adapted, x)
    assert (difference(a, b) > 1e-3) == pair.case.trains
    if pair.cls.trains_base:
        with pytest.raises(InputError, match="both replace base values"):
            adapted.enable("a", "b")
    elif any(p.rebases for p in adapted.pieces("a")):
        with pytest.raises(InputError, match="both start from the base weight"):
            adapted.enable("a", "b")
    else:
        adapted.enable("a", "b")
        both = outputs(adapted, x)
        assert (min(difference(both, a), difference(both, b)) > 1e-3) == pair.acts
    adapted.enable("a")
    assert torch.equal(outputs(adapted, x), a)
    adapted.remove("b")
    assert torch.equal(outputs(adapted, x), a)
    adapted.remove("a")
    assert torch.equal(outputs(adapted, x), base)


@every_pair
def test_images_of_one_batch_have_an_adapter_each_or_are_refused(pair):
    if not pair.routes:
        adapted = adapt(pair)
        if pair.acts:
            with pytest.raises(InputError, match=r"kinds|trained base values"):
                adapted.route(["a", None])
        return
    adapted, x = adapt(pair, "a", "b"), images(pair, count=5)
    single = {None: base_outputs(pair, x)}
    for name in "ab":
        with adapted.only(name):
            single[name] = outputs(adapted, x)
    adapted.route(["b", None, "a", "b", -1])
    mixed = outputs(adapted, x)
    for row, name in enumerate(["b", None, "a", "b", None]):
        assert_close(mixed[row], single[name][row], f"image {row} with {name}")
    loss = joined(adapted(x)).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in trained(adapted, "a").values())
    adapted.route(None)
    assert torch.equal(outputs(adapted, x), single["a"])


# ---- compilers, processes --------------------------------------------------------------------------------------------
class Plain(nn.Module):
    """Tensors out: what compilers and exporters take."""

    def __init__(self, adapted):
        super().__init__()
        self.adapted = adapted

    def forward(self, x):
        return joined(self.adapted(x))


@pytest.mark.compile
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_as_one_graph(kind):
    pair = of_kind(kind)
    adapted, x = adapt(pair), images(pair).requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(Plain(adapted), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x), outputs(adapted, x))
    compiled(x).square().sum().backward()
    learning = [x, *adapted.adapters["a"].parameters()]
    found = [value.grad for value in learning]
    expected = torch.autograd.grad(joined(adapted(x)).square().sum(), learning)
    for compiled_gradient, gradient in zip(found, expected):
        assert_close(compiled_gradient, gradient, "gradient")


@pytest.mark.compile
@pytest.mark.parametrize("kind", KINDS)
def test_exports(kind):
    pair = of_kind(kind)
    adapted, x = adapt(pair), images(pair)
    program = torch.export.export(Plain(adapted), (x,))
    assert_close(program.module()(x).detach(), outputs(adapted, x))


def replica(rank, folder, chosen):
    """One of two processes: two steps on different images leave both with the same values."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        for pair in chosen:
            model = WithHead(adapt(pair)).train()
            trainable = list(model.trainable().values())
            parallel = DistributedDataParallel(model, find_unused_parameters=False)
            optimizer = torch.optim.SGD(trainable, lr=1e-3)
            for step in range(2):
                optimizer.zero_grad()
                parallel(images(pair, seed=2 * step + rank)).backward()
                optimizer.step()
            mine = torch.cat([p.detach().flatten() for p in trainable])
            both = [torch.empty_like(mine) for _ in range(2)]
            dist.all_gather(both, mine)
            assert torch.equal(*both), f"{pair}: replicas differ"
    finally:
        dist.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_stay_equal_without_looking_for_unused_parameters(tmp_path):
    chosen = [next(pair for pair in ALL if pair.case is case) for case in CASES if any(p.case is case for p in ALL)]
    torch.multiprocessing.spawn(replica, (str(tmp_path), chosen), nprocs=2)
