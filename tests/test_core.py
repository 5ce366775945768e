from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import TINY
from torch import nn

from visadapt.core.adapted import Adapted
from visadapt.core.adapter import Adapter
from visadapt.core.context import Context
from visadapt.core.inject import WeightForward, attach, effective
from visadapt.core.kinds import Delta, Prompt, Side, Tokens, WeightMap
from visadapt.core.lowrank import LowRankLinear, merged_weight
from visadapt.core.sites import ROLES, Site, select
from visadapt.errors import InputError
from visadapt.testing import assert_close, difference, tiny_backbone

SITES = [
    Site("patch_embed.proj", "patch", -1, 3, 8, layout="NCHW"),
    *(
        site
        for i in range(3)
        for site in (
            Site(f"blocks.{i}.attn.qkv", "qkv", i, 8, 24),
            *(Site(f"blocks.{i}.attn.qkv", r, i, 8, 8, rows=(8 * n, 8 * n + 8)) for n, r in enumerate("qkv")),
            Site(f"blocks.{i}.mlp.fc1", "fc1", i, 8, 16),
        )
    ),
    Site("norm", "norm", -1, 8, 8),
]


# ---- sites -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("targets", "layers", "keys"),
    [
        (("q",), None, ["trunk_00_q", "trunk_01_q", "trunk_02_q"]),
        (("fc1", "q"), [0], ["trunk_00_q", "trunk_00_fc1"]),
        (("v",), [-1], ["trunk_02_v"]),
        (("v",), [0, -3], ["trunk_00_v"]),
        (("all-linear",), [1], ["trunk_01_q", "trunk_01_k", "trunk_01_v", "trunk_01_fc1"]),
        (("norm", "patch"), None, ["trunk_xx_patch", "trunk_xx_norm"]),
        (("blocks.*.mlp.fc1",), [1, 2], ["trunk_01_fc1", "trunk_02_fc1"]),
        (("blocks.0.attn.qkv",), None, ["trunk_00_qkv"]),
    ],
)
def test_select(targets, layers, keys):
    assert [s.key for s in select(SITES, targets, layers, "LoRA on X")] == keys


@pytest.mark.parametrize(
    ("targets", "layers", "message"),
    [
        (("qq",), None, r"^LoRA on X: target 'qq' matches no site \(did you mean 'q'"),
        (("zzz",), None, "the roles are fc1, k, norm, patch, q, qkv, v"),
        (("blocks.*.nope",), None, r"'blocks\.\*\.nope' matches no site"),
        (("q",), [3], "layer 3 does not exist; the backbone has the layers 0 to 2"),
        (("q",), [-4], "layer -4 does not exist"),
        (("norm",), [0], "'norm'"),
    ],
)
def test_select_refuses(targets, layers, message):
    with pytest.raises(InputError, match=message):
        select(SITES, targets, layers, "LoRA on X")


def test_keys_have_no_dots_and_number_repeated_roles():
    assert Site("a.b", "conv", 7, 1, 1, part="dec1", n=2).key == "dec1_07_conv_2"
    assert len({s.key for s in SITES}) == len(SITES)


# ---- context ---------------------------------------------------------------------------------------------------------
def test_context_splits_behind_prefix_and_prompts_and_copies_no_tensors():
    ctx = Context()
    ctx.num_frames, ctx.ids = 4, ["a", None]
    ctx.begin(torch.zeros(2, 3, 8, 8), (2, 3), prefix=1)
    ctx.prompts["p"], ctx.values["a.x"] = 2, torch.zeros(1)
    lead, patches = ctx.split(torch.arange(9.0).view(1, 9, 1))
    assert lead.flatten().tolist() == [0, 1, 2] and patches.shape == (1, 6, 1)
    other = copy.deepcopy(ctx)
    assert (other.num_frames, other.ids) == (4, ["a", None])
    assert other.image is None and other.values == {}
    ctx.begin(torch.zeros(1, 3, 8, 8), (2, 3), prefix=1)
    assert ctx.inserted == 0 and ctx.values == {} and ctx.num_frames == 4


# ---- one module ------------------------------------------------------------------------------------------------------
class Low(Delta):
    """s B A, as LoRA has it."""

    def __init__(self, site, scale=0.5):
        super().__init__(site)
        self.a, self.b = nn.Parameter(torch.randn(2, site.dim_in)), nn.Parameter(torch.randn(site.dim_out, 2))
        self.factor, self.on = scale, True

    def factors(self):
        return self.a, self.b, self.factor


class Dense(Delta):
    def __init__(self, site, shape=None):
        super().__init__(site)
        self.d, self.on = nn.Parameter(torch.randn(shape or (site.dim_out, site.dim_in))), True

    def delta(self):
        return self.d


class Affine(WeightMap):
    """w' = g w + c; with `by_own` the same by its own forward."""

    def __init__(self, site, g=2.0, c=1.0, by_own=False):
        super().__init__(site)
        self.g, self.c, self.by_own, self.on = g, c, by_own, True

    def by_forward(self):
        return self.by_own

    def map(self, w, b):
        return self.g * w + self.c, None if b is None else self.g * b

    def forward(self, x, base):
        return self.g * base(x) + self.c * x.sum(-1, keepdim=True)


class Cheap(Affine):
    """Runs its own forward, and may be asked for its weight all the same."""

    random = False

    def __init__(self, site):
        super().__init__(site, 3.0, -1.0, by_own=True)


class Mapped(Affine):
    forward = WeightMap.forward


def linear_with(*pieces, bias=True, sizes=(4, 6)):
    linear = nn.Linear(*sizes, bias=bias).requires_grad_(False)
    forward = WeightForward(linear, Context())
    forward.pieces = list(pieces)
    linear.forward = forward
    return linear, forward


def site(rows=None, dim_in=4, dim_out=6):
    return Site("x", "fc1", 0, dim_in, dim_out if rows is None else rows[1] - rows[0], rows=rows)


def expected(linear, pieces, x):
    """The rules written out: maps in their order, then deltas; only the site's rows; the run-time scale blends."""
    w, b = linear.weight.clone(), torch.zeros(6) if linear.bias is None else linear.bias.clone()
    for p in [p for p in pieces if isinstance(p, WeightMap)] + [p for p in pieces if isinstance(p, Delta)]:
        r = slice(*(p.site.rows or (0, 6)))
        if isinstance(p, WeightMap):
            w[r] = (1 - p.scale) * w[r] + p.scale * (p.g * w[r] + p.c)
            b[r] = (1 - p.scale) * b[r] + p.scale * p.g * b[r]
        else:
            w[r] = w[r] + p.scale * p.delta()
    return x @ w.T + b


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [None, (2, 5)])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize(
    "kinds", ["L", "D", "A", "LD", "DA", "ADL", "LAA", "F", "DF", "LFA", "AFF", "FLD", "AF", "FM", "FMD"]
)
def test_pieces_of_all_sorts_give_what_their_rules_say(kinds, scale, rows, bias):
    """L low rank, D dense, A and M maps (M without a forward of its own), F map that runs its own forward."""
    torch.manual_seed(len(kinds))
    made = {"L": Low, "D": Dense, "A": Affine, "F": Cheap, "M": Mapped}
    pieces = [made[k](site(rows if n != 1 else (0, 3))) for n, k in enumerate(kinds)]
    pieces[0].scale = scale
    linear, _ = linear_with(*pieces, bias=bias)
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        wanted = expected(linear, pieces, x)
        assert_close(linear(x), wanted, "without gradients")
    assert_close(linear(x.requires_grad_()).detach(), wanted, "with gradients")


def test_a_map_behind_a_random_one_has_no_weight_to_work_on():
    random, later = Affine(site(), by_own=True), Mapped(site())
    random.owner, later.owner = "a", "b"
    linear, _ = linear_with(random, later)
    with pytest.raises(InputError, match=r"'a' is random in training .* 'b' works on its weight at trunk_00_fc1"):
        linear(torch.randn(2, 4))


def test_pieces_that_are_off_take_no_part():
    """Bit by bit, so that what oneDNN computes for others is left to torch."""
    pieces = [Low(site()), Affine(site()), Dense(site((0, 2)))]
    linear, _ = linear_with(*pieces)
    x = torch.randn(3, 4)
    for piece in pieces:
        piece.on = False
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))


def test_a_map_may_bring_a_bias_of_its_own_rows():
    class Shift(Affine):
        def map(self, w, b):
            return w, torch.ones(w.shape[0])

    _, bias = effective(torch.zeros(6, 4), None, [Shift(site((2, 4)))])
    assert bias.tolist() == [0, 0, 1, 1, 0, 0]
    assert effective(torch.zeros(6, 4), torch.full((6,), 5.0), [Shift(site((2, 4)))])[1].tolist() == [5, 5, 1, 1, 5, 5]


def test_the_output_projection_of_torchs_attention_carries_none():
    """Its weight is read by a fused function; a forward of its own would never run."""
    backbone = SimpleNamespace(body=nn.MultiheadAttention(4, 2))
    with pytest.raises(InputError, match=r"out_proj is read by an nn\.MultiheadAttention and never run"):
        attach(Low(replace(site(), path="out_proj")), backbone, Context())


def test_convolutions_and_norms_carry_weights_too():
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="reflect").requires_grad_(False)
    piece = Dense(Site("x", "conv", 0, 2, 3), conv.weight.shape)
    x = torch.randn(1, 2, 7, 7)
    wanted = copy.deepcopy(conv)
    wanted.weight.data += piece.d
    forward = WeightForward(conv, Context())
    forward.pieces = [piece]
    assert_close(forward(x), wanted(x))
    norm = nn.LayerNorm(5, eps=0.1)
    forward = WeightForward(norm, Context())
    forward.pieces = [Affine(Site("x", "norm", 0, 5, 5))]
    x = torch.randn(2, 5)
    assert_close(forward(x), F.layer_norm(x, (5,), 2 * norm.weight + 1, 2 * norm.bias, 0.1))


# ---- low rank --------------------------------------------------------------------------------------------------------
ROWS = ((0, 6), (2, 5), (0, 2))


def factors(dtype=torch.float64):
    return [
        torch.randn(*shape, dtype=dtype, requires_grad=True)
        for start, stop in ROWS
        for shape in ((2, 4), (stop - start, 2))
    ]


def test_lowrank_gradients_are_numerically_right():
    x, weight, bias = (
        torch.randn(2, 3, 4).double().requires_grad_(),
        torch.randn(6, 4).double(),
        torch.randn(6).double(),
    )
    scales = (0.5, -2.0, 1.0)
    assert torch.autograd.gradcheck(
        lambda x, *f: LowRankLinear.apply(x, weight, bias, ROWS, scales, *f), (x, *factors())
    )


def test_lowrank_equals_autograd_through_the_merged_weight():
    x, weight, own, scales = torch.randn(2, 3, 4).double(), torch.randn(6, 4).double(), factors(), (0.5, -2.0, 1.0)
    merged = weight.clone()
    for (start, stop), s, a, b in zip(ROWS, scales, own[0::2], own[1::2]):
        merged = torch.cat([merged[:start], merged[start:stop] + s * b @ a, merged[stop:]])
    y = F.linear(x, merged)
    cotangent = torch.randn_like(y)
    wanted = torch.autograd.grad(y, own, cotangent)
    here = LowRankLinear.apply(x, weight, None, ROWS, scales, *own)
    assert_close(here.detach(), y.detach())
    for actual, reference in zip(torch.autograd.grad(here, own, cotangent), wanted):
        assert_close(actual, reference, "gradient")
    with torch.no_grad():
        assert_close(merged_weight(weight, ROWS, scales, *own), merged.detach())


def test_lowrank_stores_nothing_but_the_input_and_what_lives_anyway():
    linear, forward = linear_with(Low(site(None, 16, 24)), Low(site((1, 9), 16)), sizes=(16, 24))
    x, saved = torch.randn(50, 16, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        forward(x)
    alive = {t.data_ptr() for t in (x, linear.weight, *(f for p in forward.pieces for f in (p.a, p.b)))}
    assert saved and {t.data_ptr() for t in saved} <= alive


def test_factors_that_cost_more_than_the_weight_are_multiplied_out():
    linear, forward = linear_with(Low(site()))
    x, saved = torch.randn(50, 4, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = forward(x)
    assert any(t.numel() == linear.weight.numel() and t.data_ptr() != linear.weight.data_ptr() for t in saved)
    assert_close(y.detach(), expected(linear, forward.pieces, x).detach())


def test_bias_that_trains_beside_a_low_rank_piece_gets_its_gradient():
    linear, forward = linear_with(Low(site()))
    linear.bias.requires_grad_(True)
    forward(torch.randn(5, 4)).sum().backward()
    assert_close(linear.bias.grad, torch.full((6,), 5.0))


# ---- a whole backbone ------------------------------------------------------------------------------------------------
class Own(Adapter):
    """Adapter for tests: makes one piece per site with the given function."""

    roles = ROLES

    def __init__(self, piece, targets=("fc1",), layers=None, side=None):
        super().__init__(targets, layers)
        self.piece, self.side = piece, side

    def make(self, site, backbone, shared):
        return self.piece(site)

    def shared(self, sites, backbone):
        return nn.ModuleDict({} if self.side is None else {"side": self.side})


class Triple(Tokens):
    def forward(self, x, y, ctx):
        return 3 * y


@pytest.fixture
def adapted():
    return Adapted(tiny_backbone(TINY["vit"]))


@pytest.fixture
def x():
    return torch.randn(3, 3, 28, 42)


def rows_of(adapted, x):
    with torch.no_grad():
        features = adapted(x)
    return torch.cat([features.native[:, None], features.tokens], 1)


@pytest.mark.parametrize("order", list(itertools.permutations("TDAa")))
def test_at_one_site_maps_act_in_order_of_add_then_deltas_then_tokens(adapted, order):
    made = {
        "T": Triple,
        "D": Dense,
        "A": lambda s: Affine(s, 2.0, 1.0),
        "a": lambda s: Affine(s, 0.5, -1.0),
    }
    for name in order:
        adapted.add(name, Own(made[name], layers=[0]))
    fc1 = adapted.backbone.body.blocks[0].mlp.fc1
    w, b = fc1.weight, fc1.bias
    for name in (n for n in order if n in "Aa"):
        g, c = {"A": (2.0, 1.0), "a": (0.5, -1.0)}[name]
        w, b = g * w + c, g * b
    w = w + adapted.adapters["D"].pieces["trunk_00_fc1"].d
    x = torch.randn(2, 5, 48)
    assert_close(fc1(x), 3 * F.linear(x, w, b))


def test_side_runs_once_and_tokens_read_its_result(adapted, x):
    class Mean(Side):
        calls = 0

        def forward(self, ctx):
            self.calls += 1
            return {"mean": ctx.image.mean((1, 2, 3))}

    class Add(Tokens):
        def forward(self, x, y, ctx):
            lead, patches = ctx.split(y)
            assert patches.shape[1] == ctx.grid[0] * ctx.grid[1] == 6
            return torch.cat([lead, patches * ctx.values[f"{self.owner}.mean"][:, None, None]], 1)

    side = Mean()
    adapted.add("s", Own(Add, targets=("mlp",), side=side))
    with adapted.disabled():
        base = rows_of(adapted, x)
    assert side.calls == 0
    assert difference(rows_of(adapted, x), base) > 1e-3
    assert side.calls == 1


def test_tokens_at_a_residual_site_see_the_stream_and_the_branch(adapted, x):
    class Look(Tokens):
        def forward(self, x, y, ctx):
            self.seen = x, y
            return y

    block, seen = adapted.backbone.body.blocks[1], []
    hook = block.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    adapted.add("l", Own(Look, targets=("attn_res", "mlp_res"), layers=[1]))
    rows_of(adapted, x)
    hook.remove()
    (stream, out), pieces = seen[0], adapted.adapters["l"].pieces
    (x1, y1), (x2, y2) = pieces["trunk_01_attn_res"].seen, pieces["trunk_01_mlp_res"].seen
    assert torch.equal(x1, stream) and torch.equal(x2, stream + y1) and torch.equal(out, x2 + y2)


class Extra(Prompt):
    def __init__(self, site, count=2, deep=True):
        super().__init__(site)
        self.deep = deep
        self.tokens = nn.Parameter(torch.randn(1, count, site.dim_in))

    @property
    def count(self):
        return self.tokens.shape[1]

    def forward(self, batch):
        return self.tokens.expand(batch, -1, -1)


def test_deep_and_shallow_prompts_stack_in_any_order(adapted, x):
    """A block takes out its own deep prompts behind it, never the shallow ones of another adapter."""

    def add(name):
        torch.manual_seed(len(name))
        layers = [0, 1] if name == "deep" else [0]
        adapted.add(name, Own(lambda s: Extra(s, 2, deep=name == "deep"), targets=("block",), layers=layers))

    outputs = []
    for names in (("deep", "shallow"), ("shallow", "deep")):
        for name in names:
            add(name)
        outputs.append(rows_of(adapted, x))
        for name in names:
            adapted.remove(name)
    assert outputs[0].shape == (3, 7, 48)
    assert_close(outputs[0], outputs[1])
