"""Merging adapters into base weights, and taking them out again."""

from __future__ import annotations

import copy
import math
import pickle
from collections import OrderedDict

import pytest
import torch
from cases import TINY
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn

from visadapt.adapters.bitfit import BitFit
from visadapt.adapters.full import FullFineTune
from visadapt.adapters.lora import LoRA
from visadapt.adapters.ssf import SSF
from visadapt.adapters.vpt import VPT
from visadapt.backbones.base import Backbone, Features
from visadapt.core.adapted import Adapted
from visadapt.core.adapter import Adapter
from visadapt.core.inject import WeightForward
from visadapt.core.kinds import Delta, WeightMap
from visadapt.core.sites import ROLES, Site
from visadapt.core.sparse import Entries
from visadapt.errors import InputError
from visadapt.testing import TOLERANCES, assert_close, difference, noise, tiny_backbone


# ---- one linear of any shape -----------------------------------------------------------------------------------------
class OneLinear(Backbone):
    """Every pixel through one linear; `rows` are what q, k and v name of its output."""

    def __init__(self, dim_in, dim_out, bias, rows):
        super().__init__()
        self.body = nn.Sequential(OrderedDict(fc=nn.Linear(dim_in, dim_out, bias)))
        self.rows, self.embed_dims, self.depth, self.patch, self.prefix = rows, [dim_out], 1, 1, 0
        self.in_chans = dim_in

    def sites(self):
        dim_in, dim_out = self.in_chans, self.embed_dims[0]
        slices = [Site("fc", role, 0, dim_in, b - a, rows=(a, b)) for role, (a, b) in zip("qkv", self.rows)]
        return [Site("fc", "qkv", 0, dim_in, dim_out), *slices]

    def grid(self, x):
        return tuple(x.shape[-2:])

    def pad(self, x):
        return x

    def forward(self, x):
        tokens = self.body(x.flatten(2).mT)
        return Features(tokens, self.grid(x), None, tokens.mean(1))


class Dense(Delta):
    """A delta of full rank; flattened where the weight is that of a convolution."""

    def __init__(self, site, shape):
        super().__init__(site)
        self.d = nn.Parameter(torch.randn(shape))

    def delta(self):
        return self.d


class Few(Delta):
    """A delta of about a third of the entries, which a merge exchanges one by one."""

    def __init__(self, site):
        super().__init__(site)
        self.index = (torch.rand(site.dim_out * site.dim_in) < 0.3).nonzero()[:, 0]
        self.few = nn.Parameter(torch.randn(len(self.index)))

    def delta(self):
        flat = self.few.new_zeros(self.site.dim_out * self.site.dim_in)
        return flat.index_add(0, self.index, self.few).view(self.site.dim_out, self.site.dim_in)

    def entries(self):
        return Entries(self.index, self.few)


class Own(Adapter):
    """Makes one piece per site with the given function."""

    roles = ROLES

    def __init__(self, piece, targets):
        super().__init__(targets)
        self.piece = piece

    def make(self, site, backbone, shared):
        return self.piece(site)


def dense(targets):
    return Own(lambda site: Dense(site, (site.dim_out, site.dim_in)), targets)


MADE = {
    "lora": lambda role: LoRA(rank=1, alpha=0.7, targets=[role]),
    "dense": lambda role: dense([role]),
    "ssf": lambda role: SSF(targets=[role]),
    "few": lambda role: Own(Few, [role]),
    "bitfit": lambda role: BitFit(targets=[role]),
}
MAPS = {"ssf", "bitfit"}


@st.composite
def setups(draw):
    """(backbone, [(method, role, scale), …]) with random shapes, row slices (which may overlap), bias or none."""
    dim_in, dim_out = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    ends = st.integers(0, dim_out - 1).flatmap(lambda a: st.tuples(st.just(a), st.integers(a + 1, dim_out)))
    rows, bias = [draw(ends) for _ in "qkv"], draw(st.booleans())
    methods = st.sampled_from(sorted(MADE) if bias else sorted(set(MADE) - {"bitfit"}))
    scale = st.sampled_from([1.0, 0.3, -2.0, 0.0])
    chosen = draw(st.lists(st.tuples(methods, st.sampled_from(["qkv", *"qkv"]), scale), min_size=1, max_size=4))
    return (dim_in, dim_out, bias, rows), chosen


def build(setup, dtype=torch.float32, seed=0):
    """The backbone in `dtype` with the adapters a0, a1, … in float32 or better; images for it."""
    sizes, chosen = setup
    torch.manual_seed(seed)
    adapted = Adapted(OneLinear(*sizes).to(dtype)).eval()
    for i, (method, role, scale) in enumerate(chosen):
        noise(adapted.add(f"a{i}", MADE[method](role)), std=1.0, seed=i)
        adapted.pieces(f"a{i}")[0].scale = scale
    if dtype == torch.float64:
        adapted.adapters.double()
    return adapted, torch.randn(2, sizes[0], 1, 3, dtype=dtype)


def by_rule(adapted, names=None):
    """Weight and bias in double precision: maps in order of `add`, then deltas, each on its rows."""
    fc = adapted.backbone.body.fc
    w = fc.weight.detach().double().clone()
    b = torch.zeros(len(w)).double() if fc.bias is None else fc.bias.detach().double().clone()
    pieces = adapted.pieces(*(names or adapted.adapters))
    for piece in sorted(pieces, key=lambda p: isinstance(p, Delta)):
        rows, s = slice(*(piece.site.rows or (0, len(w)))), piece.scale
        values = {k: v.detach().double() for k, v in piece.named_parameters()}
        if "gamma" in values:
            w[rows] += s * (values["gamma"][:, None] * w[rows] - w[rows])
            b[rows] += s * (values["gamma"] * b[rows] + values["beta"] - b[rows])
        elif "db" in values:
            b[rows] += s * values["db"]
        elif "few" in values:
            w[rows] += s * piece.delta().detach().double()
        else:
            w[rows] += s * (values["d"] if "d" in values else 0.7 * values["b"] @ values["a"])
    return w, b


def run(adapted, x):
    with torch.no_grad():
        features = adapted(x)
    return torch.cat([features.native[:, None], features.tokens], 1)


def snapshot(adapted):
    """Everything that a merge may touch, in a form that compares."""
    body = adapted.backbone.body
    forwards = {n: m.__dict__.get("forward") for n, m in body.named_modules()}
    carried = {n: list(f.pieces) for n, f in forwards.items() if isinstance(f, WeightForward)}
    switches = [(p, p.on, p.scale) for p in adapted.pieces()]
    return {k: v.clone() for k, v in body.state_dict().items()}, forwards, carried, switches


def assert_unchanged(adapted, before):
    values, *rest = before
    now, *rest_now = snapshot(adapted)
    assert list(now) == list(values)
    for key, value in values.items():
        assert torch.equal(now[key], value), key
    assert rest_now == rest
    assert not adapted.merger.names and not adapted.merger.originals


many = settings(max_examples=80, deadline=None, derandomize=True)


@many
@given(setups(), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 9))
def test_merged_weights_are_those_of_the_rules_and_unmerge_restores_bits(setup, dtype, seed):
    adapted, x = build(setup, dtype, seed)
    (w, b), before, y = by_rule(adapted), snapshot(adapted), run(adapted, x)
    assert adapted.merge(check=x) == 1
    fc = adapted.backbone.body.fc
    assert "forward" not in fc.__dict__ and type(fc) is nn.Linear
    assert fc.weight.dtype == dtype and not any(p.requires_grad for p in fc.parameters())
    assert_close(fc.weight.double(), w, "weight", TOLERANCES[dtype])
    assert_close(torch.zeros_like(b) if fc.bias is None else fc.bias.double(), b, "bias", TOLERANCES[dtype])
    assert_close(run(adapted, x), y)
    adapted.unmerge()
    assert_unchanged(adapted, before)
    assert torch.equal(run(adapted, x), y)


@many
@given(setups(), st.integers(0, 9), st.data())
def test_merge_of_some_adapters_gives_the_same_or_is_refused(setup, seed, data):
    """Refused exactly where weight maps are at work and an enabled adapter would stay behind."""
    chosen = setup[1]
    numbers = st.lists(st.sampled_from(range(len(chosen))), min_size=1, unique=True)
    on, merged = data.draw(numbers, "enabled"), data.draw(numbers, "merged")
    assume(set(merged) <= set(on))
    adapted, x = build(setup, seed=seed)
    for i in range(len(chosen)):
        adapted.pieces(f"a{i}")[0].on = i in on
    before, y = snapshot(adapted), run(adapted, x)
    names = [f"a{i}" for i in merged]
    if set(merged) < set(on) and MAPS & {chosen[i][0] for i in on}:
        left = [f"a{i}" for i in set(on) - set(merged)]
        with pytest.raises(InputError, match=rf"fc also carries the enabled adapter '({'|'.join(left)})'; merge both"):
            adapted.merge(*names)
        assert_unchanged(adapted, before)
        return
    (w, _), fc = by_rule(adapted, names), adapted.backbone.body.fc
    adapted.merge(*names)
    assert_close(fc.weight.double(), w, "weight", 1e-5)
    assert ("forward" in fc.__dict__) == (set(merged) < set(on))
    assert_close(run(adapted, x), y)
    adapted.unmerge()
    assert_unchanged(adapted, before)


ROWS = [(0, 2), (2, 4), (1, 3)]


@many
@given(setups(), st.sampled_from([torch.bfloat16, torch.float16]), st.integers(0, 9))
@example(((6, 7, True, ROWS), [("few", "qkv", 0.3)]), torch.bfloat16, 0)
@example(((6, 7, True, ROWS), [("few", "q", 1.0), ("few", "k", -2.0)]), torch.float16, 1)
def test_weights_in_half_precision_are_rounded_once(setup, dtype, seed):
    adapted, _ = build(setup, dtype, seed)
    (w, b), before = by_rule(adapted), snapshot(adapted)
    adapted.merge()
    fc = adapted.backbone.body.fc
    half_step = torch.finfo(dtype).eps / 2
    for name, found, wanted in (("weight", fc.weight, w), ("bias", fc.bias, b)):
        if found is not None:
            assert found.dtype == dtype
            error = (found.double() - wanted).abs()
            assert (error <= half_step * wanted.abs() + 1e-5).all(), f"{name} {error.max()}"
    adapted.unmerge()
    assert_unchanged(adapted, before)


# ---- a transformer ---------------------------------------------------------------------------------------------------
X = torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(1))


def vit(**adapters):
    torch.manual_seed(0)
    adapted = Adapted(tiny_backbone(TINY["vit"])).eval()
    for seed, (name, adapter) in enumerate(adapters.items()):
        noise(adapted.add(name, adapter), seed=seed)
    return adapted


def piece(adapted, key="trunk_01_q", name="a"):
    return adapted.adapters[name].pieces[key]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "make", [lambda: LoRA(rank=2), SSF, lambda: Own(Few, ["fc1", "fc2"])], ids=["delta", "map", "sparse"]
)
def test_non_finite_weights_are_refused_and_nothing_is_changed(make, value):
    """The last block is the bad one, so that a merge which writes as it goes would have changed the first."""
    adapted = vit(a=make())
    last = [p for p in adapted.pieces() if p.site.layer == 1][-1]
    parameter = list(last.parameters())[-1]
    parameter.data.flatten()[-1:].fill_(value)
    before = snapshot(adapted)
    with pytest.raises(InputError, match=rf"merging \['a'\] makes the weight of {last.site.path} non-finite; nothing"):
        adapted.merge("a")
    assert_unchanged(adapted, before)
    parameter.data.flatten()[-1:].fill_(0.1)
    assert adapted.merge("a", check=X) > 1


def test_weights_beyond_half_precision_are_refused_too():
    """Finite in float32, where the sum is formed, and infinite in the base's float16."""
    adapted = Adapted(tiny_backbone(TINY["vit"]).half())
    adapted.add("a", LoRA(rank=1))
    for values in piece(adapted).parameters():
        values.data.fill_(300.0)
    before = snapshot(adapted)
    with pytest.raises(InputError, match=r"blocks\.1\.attn\.qkv non-finite; nothing was changed"):
        adapted.merge()
    assert_unchanged(adapted, before)


def test_one_of_two_adapters_is_merged_and_the_other_works_on():
    adapted = vit(a=LoRA(rank=2), b=LoRA(rank=3, targets=["v", "fc1"]))
    adapted.enable("a", "b")
    y, before = run(adapted, X), snapshot(adapted)
    assert adapted.merge("a", check=X) == 2
    assert_close(run(adapted, X), y)
    assert [p.on for p in adapted.pieces("a")] == [False] * 4 and all(p.on for p in adapted.pieces("b"))
    body = adapted.backbone.body
    assert body.blocks[0].attn.qkv.forward.pieces == [piece(adapted, "trunk_00_v", "b")]
    assert torch.equal(body.blocks[0].mlp.fc1.weight, before[0]["blocks.0.mlp.fc1.weight"])
    piece(adapted, "trunk_00_v", "b").b.data.add_(1.0)  # still free to train
    assert difference(run(adapted, X), y) > 1e-3
    piece(adapted, "trunk_00_v", "b").b.data.sub_(1.0)
    adapted.unmerge()
    assert_unchanged(adapted, before)


def test_an_adapter_that_is_off_has_no_part_in_a_merge():
    adapted = vit(a=LoRA(rank=2), b=SSF())
    adapted.enable("a")
    y, before = run(adapted, X), snapshot(adapted)
    assert adapted.merge(check=X) == 2
    assert "forward" not in adapted.backbone.body.blocks[0].attn.qkv.__dict__
    assert_close(run(adapted, X), y)
    adapted.unmerge()
    assert_unchanged(adapted, before)
    adapted.enable("b")
    assert difference(run(adapted, X), y) > 1e-3


def test_the_strength_of_the_moment_is_merged():
    adapted = vit(a=LoRA(rank=2, targets=["all-linear"]))
    full = run(adapted, X)
    adapted.enable("a", scale=0.25)
    y = run(adapted, X)
    adapted.merge(check=X)
    assert_close(run(adapted, X), y)
    assert difference(y, full) > 1e-3
    adapted.unmerge()
    assert {p.scale for p in adapted.pieces()} == {0.25} and torch.equal(run(adapted, X), y)


def test_flattened_delta_of_a_convolution_is_merged():
    adapted = vit(a=Own(lambda site: Dense(site, (site.dim_out, site.dim_in * 14 * 14)), ["patch"]))
    conv = adapted.backbone.body.patch_embed.proj
    wanted = conv.weight + adapted.pieces()[0].d.view(48, 3, 14, 14)
    assert adapted.merge(check=X) == 1
    assert_close(conv.weight.detach(), wanted.detach())


def test_what_cannot_fold_stays_at_work():
    adapted = vit(a=LoRA(rank=2), p=VPT(count=2))
    adapted.enable("a", "p")
    y = run(adapted, X)
    assert adapted.merge("a", "p", check=X) == 2
    assert all(p.on for p in adapted.pieces("p"))
    assert_close(run(adapted, X), y)


def test_base_values_that_train_are_merged_with_a_delta_on_top():
    adapted = vit(a=LoRA(rank=2), full=FullFineTune(layers=[1]))
    adapted.enable("a", "full")
    noise(adapted.base_values.parameters("full", adapted.backbone.body), seed=5)
    y, before = run(adapted, X), snapshot(adapted)
    assert adapted.merge(check=X) == 2 + len(list(adapted.backbone.body.blocks[1].parameters()))
    assert_close(run(adapted, X), y)
    adapted.unmerge()
    assert_unchanged(adapted, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda: LoRA(rank=2, targets=["all-linear"]), SSF], ids=["delta", "map"])
def test_the_check_lets_honest_merges_in_half_precision_pass(make, dtype):
    adapted = vit(a=make()).to(dtype)
    before = snapshot(adapted)
    assert adapted.merge(check=X.to(dtype)) > 1
    adapted.unmerge()
    assert_unchanged(adapted, before)


class Liar(WeightMap):
    """Its own forward doubles the output, the weight it gives does not."""

    random = False

    def by_forward(self):
        return True

    def map(self, w, b):
        return 1.5 * w, b

    def forward(self, x, base):
        return 2 * base(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_merge_is_undone_by_the_check(dtype):
    adapted = vit(a=Own(Liar, ["fc1"])).to(dtype)
    x = X.to(dtype)
    y, before = run(adapted, x), snapshot(adapted)
    with pytest.raises(InputError, match=r"merged outputs differ by .* \(allowed .*\); the merge was undone"):
        adapted.merge("a", check=x)
    assert_unchanged(adapted, before)
    assert torch.equal(run(adapted, x), y)
    assert adapted.merge("a") == 2  # without the check nobody notices


def test_a_check_whose_outputs_are_no_numbers_fails():
    adapted = vit(a=LoRA(rank=2))
    before = snapshot(adapted)
    with pytest.raises(InputError, match=r"differ by nan .*; the merge was undone"):
        adapted.merge("a", check=X * math.inf)
    assert_unchanged(adapted, before)


def test_what_is_random_in_training_merges_in_eval_mode_alone():
    adapted = vit(a=LoRA(rank=2, dropout=0.5)).train()
    before = snapshot(adapted)
    with pytest.raises(InputError, match=r"adapter 'a' is random in training mode .dropout.*call eval\(\)"):
        adapted.merge("a", check=X)
    assert_unchanged(adapted, before)
    modes = [m.training for m in adapted.eval().modules()]
    assert adapted.merge("a", check=X) == 2
    assert [m.training for m in adapted.modules()] == modes


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))], ids=["copy", "pickle"])
def test_a_copy_of_a_merged_model_unmerges_for_itself(twin_of):
    adapted = vit(a=LoRA(rank=2), b=SSF())
    adapted.enable("a", "b")
    y, before = run(adapted, X), snapshot(adapted)
    adapted.merge("a", "b")
    merged, twin = run(adapted, X), twin_of(adapted)
    twin.unmerge()
    assert torch.equal(run(twin, X), y) and torch.equal(run(adapted, X), merged)
    twin.adapters["b"].pieces["trunk_00_qkv"].gamma.data.add_(1.0)
    assert difference(run(twin, X), y) > 1e-3
    adapted.unmerge()
    assert_unchanged(adapted, before)
    assert torch.equal(run(adapted, X), y)


def test_removing_what_is_merged_gives_the_base_back():
    adapted = vit(a=LoRA(rank=2), b=LoRA(rank=2))
    adapted.enable("a")
    with adapted.disabled():
        base, bits = run(adapted, X), {k: v.clone() for k, v in adapted.backbone.body.state_dict().items()}
    adapted.merge("a")
    with pytest.raises(InputError, match=r"'b' cannot be removed while \['a'\] are merged; unmerge first"):
        adapted.remove("b")
    adapted.remove("a")
    assert torch.equal(run(adapted, X), base)
    assert all(torch.equal(v, bits[k]) for k, v in adapted.backbone.body.state_dict().items())


def test_what_cannot_go_with_a_merge_is_refused():
    adapted = vit(a=LoRA(rank=2), b=LoRA(rank=2))
    adapted.enable("a")
    with pytest.raises(InputError, match="adapter 'b' is not enabled; merge folds what takes part"):
        adapted.merge("a", "b")
    with pytest.raises(InputError, match="no adapter 'c'"):
        adapted.merge("c")
    adapted.route(["a", "b"])
    with pytest.raises(InputError, match=r"a mixed batch is being routed; end routing with route\(None\)"):
        adapted.merge("a")
    adapted.route(None)
    adapted.merge("a")
    for what, message in (
        (lambda: adapted.merge("a"), r"\['a'\] are merged already; unmerge first"),
        (lambda: adapted.enable("b"), r"\['a'\] are merged into the backbone; unmerge before switching"),
        (lambda: adapted.route(["b", None]), r"\['a'\] are merged into the backbone; unmerge before routing"),
        (lambda: adapted.add("d", LoRA()), r"'d' cannot be added while \['a'\] are merged; unmerge first"),
    ):
        with pytest.raises(InputError, match=message):
            what()
    adapted.unmerge()
    adapted.unmerge()  # nothing is merged any more, and nothing happens
    adapted.enable("b")
