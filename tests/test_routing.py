"""Mixed batches: every image through the weights of its own adapter."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import TINY
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from visadapt.adapters.bitfit import BitFit
from visadapt.adapters.full import FullFineTune
from visadapt.adapters.houlsby import Houlsby
from visadapt.adapters.lora import LoRA, LoRASite
from visadapt.adapters.ssf import SSF, ScaleShift
from visadapt.adapters.vpt import VPT
from visadapt.core.adapted import Adapted
from visadapt.core.context import Context
from visadapt.core.inject import WeightForward, effective
from visadapt.core.kinds import Delta
from visadapt.core.sites import Site
from visadapt.core.sparse import Entries
from visadapt.errors import InputError
from visadapt.testing import assert_close, difference, noise, tiny_backbone

many = settings(max_examples=100, deadline=None, derandomize=True)


# ---- one module ------------------------------------------------------------------------------------------------------
class Dense(Delta):
    def __init__(self, site):
        super().__init__(site)
        self.d = nn.Parameter(torch.randn(site.dim_out, site.dim_in))

    def delta(self):
        return self.d


class Few(Delta):
    """The first entries of the weight."""

    def __init__(self, site):
        super().__init__(site)
        self.few = nn.Parameter(torch.randn(3))

    def delta(self):
        return F.pad(self.few, (0, self.site.dim_out * self.site.dim_in - 3)).view(self.site.dim_out, -1)

    def entries(self):
        return Entries(torch.arange(3), self.few)


DIM_IN, DIM_OUT = 4, 6
SHAPES = {  # of what the linear receives: images x windows B, batch dimension
    "vectors": (lambda b: (b, DIM_IN), 0),
    "NLC": (lambda b: (b, 5, DIM_IN), 0),
    "NHWC": (lambda b: (b, 2, 3, DIM_IN), 0),
    "LNC": (lambda b: (5, b, DIM_IN), 1),
    "HWNC": (lambda b: (2, 3, b, DIM_IN), 2),
}
MAKES = {"1": 1, "2": 2, "3": 3, "dense": Dense, "few": Few, "ssf": ScaleShift}
"""Sorts of pieces; numbers are ranks of LoRA."""

pieces_of_one = st.lists(
    st.tuples(
        st.sampled_from(["1", "2", "3", "3", "dense", "few", "ssf"]),
        st.sampled_from([None, (0, 3), (3, 6), (2, 5)]),
        st.sampled_from([1.0, 0.4, -2.0]),
    ),
    max_size=3,
    unique_by=lambda t: t[1],
)


def linear_with(owners, batch_dim, bias):
    """A linear in double precision that carries the pieces of several adapters, in mixed order of attaching."""
    linear = nn.Linear(DIM_IN, DIM_OUT, bias=bias).double().requires_grad_(False)
    forward = WeightForward(linear, Context())
    for n, chosen in enumerate(owners):
        for kind, rows, scale in chosen:
            size = DIM_OUT if rows is None else rows[1] - rows[0]
            site = Site("x", "fc1", 0, DIM_IN, size, rows=rows, batch_dim=batch_dim)
            made = MAKES[kind]
            piece = LoRASite(site, made, 1.5, 0.0) if isinstance(made, int) else made(site)
            piece.owner, piece.scale = f"a{n}", scale
            noise(piece.double(), std=1.0, seed=n)
            forward.pieces.append(piece)
    forward.pieces = forward.pieces[::2] + forward.pieces[1::2]
    return forward


def one_by_one(forward, x, ids, batch_dim):
    """Every image through weights that are made for it alone."""
    windows, outputs = x.shape[batch_dim] // len(ids), []
    for i, part in enumerate(x.movedim(batch_dim, 0).split(1)):
        own = [p for p in forward.pieces if p.owner == ids[i // windows]]
        pieces = sorted(own, key=lambda p: isinstance(p, Delta))
        outputs.append(F.linear(part, *effective(forward.module.weight, forward.module.bias, pieces)))
    return torch.cat(outputs).movedim(0, batch_dim)


LORA = [("2", None, 1.0)]


@many
@given(
    owners=st.lists(pieces_of_one, min_size=1, max_size=4),
    ids=st.lists(st.sampled_from([None, "a0", "a1", "a2", "a3", "elsewhere"]), min_size=1, max_size=6),
    layout=st.sampled_from(sorted(SHAPES)),
    windows=st.integers(1, 3),
    bias=st.booleans(),
)
@example(owners=[LORA, [("3", (0, 3), 1.0), ("1", (3, 6), 1.0)]], ids=["a1", "a0"], layout="LNC", windows=2, bias=True)
@example(owners=[LORA, [("ssf", None, 1.0)]], ids=["a1", None, "a0", "a1"], layout="NLC", windows=3, bias=True)
@example(owners=[LORA, LORA], ids=[None, None], layout="NHWC", windows=2, bias=False)
@example(owners=[LORA, LORA], ids=["a1"] * 3, layout="HWNC", windows=1, bias=False)
def test_every_image_passes_through_the_weights_of_its_own_adapter(owners, ids, layout, windows, bias):
    """Values with and without gradients, and all gradients, in every layout; windows of one image stand together."""
    torch.manual_seed(len(ids))
    shape, batch_dim = SHAPES[layout]
    forward = linear_with(owners, batch_dim, bias)
    if not forward.pieces:
        return
    forward.ctx.ids = ids
    x = torch.randn(shape(len(ids) * windows), dtype=torch.float64, requires_grad=True)
    wanted = one_by_one(forward, x, ids, batch_dim)
    found = forward(x)
    assert_close(found.detach(), wanted.detach(), "with gradients")
    with torch.no_grad():
        assert_close(forward(x), wanted.detach(), "without gradients")
    values = [x, *(p for piece in forward.pieces for p in piece.parameters())]
    cotangent = torch.randn_like(wanted)
    gradients = [torch.autograd.grad(y, values, cotangent, allow_unused=True) for y in (found, wanted)]
    for value, here, there in zip(values, *gradients):
        here, there = (torch.zeros_like(value) if g is None else g for g in (here, there))
        assert_close(here, there, "gradient")


def test_images_of_the_base_are_the_base_bit_for_bit_where_nobody_is_adapted():
    forward = linear_with([LORA], 0, True)
    forward.ctx.ids = [None, "elsewhere"]
    x = torch.randn(2, 5, DIM_IN, dtype=torch.float64)
    assert torch.equal(forward(x), F.linear(x, forward.module.weight, forward.module.bias))


# ---- a transformer ---------------------------------------------------------------------------------------------------
MIXED = {
    "small": lambda: LoRA(rank=2),
    "large": lambda: LoRA(rank=5, targets=["all-linear"], layers=[1]),
    "ssf": SSF,
    "bias": lambda: BitFit(targets=["fc1", "patch", "norm2"]),
}
"""Different ranks, targets and sorts."""


def vit(**adapters):
    torch.manual_seed(0)
    adapted = Adapted(tiny_backbone(TINY["vit"])).eval()
    for seed, (name, adapter) in enumerate(adapters.items()):
        noise(adapted.add(name, adapter, enable=False), seed=seed)
    return adapted


def mixed():
    return vit(**{name: make() for name, make in MIXED.items()})


def images(count, seed=1):
    return torch.randn(count, 3, 28, 42, generator=torch.Generator().manual_seed(seed))


def joined(adapted, x):
    features = adapted(x)
    return torch.cat([features.native[:, None], features.tokens], 1)


@torch.no_grad()
def run(adapted, x):
    return joined(adapted, x)


def alone(adapted, name, x):
    with adapted.only(*([] if name is None else [name])):
        return run(adapted, x)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([None, -1, 0, 1, 2, 3, *MIXED]), min_size=1, max_size=6))
def test_a_mixed_batch_equals_single_runs(ids):
    """By name or number, with repeats; an adapter of another sort in the batch changes nothing for the others."""
    adapted, x, names = mixed(), images(len(ids)), [*MIXED, None]
    adapted.route(ids)
    found = run(adapted, x)
    for i, given_id in enumerate(ids):
        name = names[given_id] if isinstance(given_id, int) else given_id
        assert_close(found[i], alone(adapted, name, x[i : i + 1])[0], f"image {i} with {name}")


def test_numbers_may_come_as_a_tensor():
    adapted, x = mixed(), images(3)
    adapted.route(torch.tensor([1, -1, 2]))
    found = run(adapted, x)
    adapted.route(["large", None, "ssf"])
    assert torch.equal(run(adapted, x), found)


def test_gradients_of_a_mixed_batch_are_those_of_single_runs():
    """Every adapter learns from its own images, and from no other."""
    adapted, x, ids = mixed(), images(5), ["large", "ssf", None, "small", "large"]
    adapted.set_trainable(*MIXED)
    cotangent = torch.randn(5, 7, 48)
    adapted.route(ids)
    (joined(adapted, x) * cotangent).sum().backward()
    found = {n: p.grad for n, p in adapted.adapters.named_parameters()}
    adapted.route(None)
    adapted.zero_grad()
    for i, name in enumerate(ids):
        if name is not None:
            adapted.enable(name)
            (joined(adapted, x[i : i + 1]) * cotangent[i]).sum().backward()
    for name, parameter in adapted.adapters.named_parameters():
        if parameter.grad is None:
            assert name.startswith("bias.") and (found[name] is None or not found[name].any())
        else:
            size = max(1.0, parameter.grad.abs().max().item())
            assert_close(found[name] / size, parameter.grad / size, f"gradient of {name}")


def test_what_is_switched_on_does_not_matter_and_strengths_do():
    adapted, x = mixed(), images(2)
    adapted.enable("small", scale=0.5)
    weak = run(adapted, x)
    adapted.enable("large")
    large = run(adapted, x)
    adapted.route(["small", None])
    found = run(adapted, x)
    assert_close(found[0], weak[0])
    assert_close(found[1], alone(adapted, None, x)[1])
    adapted.route(None)
    assert torch.equal(run(adapted, x), large)


def test_other_runs_in_between_leave_the_routing_alone():
    adapted, x = mixed(), images(2)
    adapted.route(["small", "ssf"])
    found = run(adapted, x)
    with adapted.disabled():
        assert difference(run(adapted, images(3))[:2], found) > 1e-3  # another number of images is fine in here
    assert torch.equal(run(adapted, x), found)


def test_a_copy_is_routed_for_itself():
    adapted, x = mixed(), images(2)
    adapted.route(["small", "ssf"])
    twin = copy.deepcopy(adapted)
    found = run(adapted, x)
    assert torch.equal(run(twin, x), found)
    twin.route(["ssf", "small"])
    assert torch.equal(run(adapted, x), found) and difference(run(twin, x), found) > 1e-3


def test_dropout_of_one_adapter_stays_with_its_images():
    adapted, x = vit(a=LoRA(rank=2, dropout=0.5), b=LoRA(rank=2)).train(), images(3)
    adapted.route(["a", "b", None])
    first, second = run(adapted, x), run(adapted, x)
    assert difference(first[0], second[0]) > 1e-4
    for i, name in ((1, "b"), (2, None)):
        assert torch.equal(first[i], second[i])
        assert_close(first[i], alone(adapted, name, x)[i])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("ids", [["small", "large", None], ["small", "ssf", None]], ids=["low-rank", "groups"])
def test_autocast(ids, grad):
    adapted, x = mixed(), images(3)
    adapted.route(ids)
    exact = run(adapted, x)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        rough = joined(adapted, x).detach().float()
    assert 1e-6 < difference(rough, exact) < 0.1


# ---- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["small", "smal"], r"no adapter 'smal' \(did you mean 'small'"),
        ([0, 4], "image 1: no adapter number 4; there are 4: small, large, ssf, bias"),
        ([-2], "image 0: no adapter number -2"),
    ],
)
def test_unknown_names_and_numbers_are_refused_and_the_old_routing_stays(ids, message):
    adapted = mixed()
    adapted.route(["ssf"])
    with pytest.raises(InputError, match=message):
        adapted.route(ids)
    assert adapted.ctx.ids == ["ssf"]


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_another_number_of_images_is_refused(count):
    """Also a multiple of the ids, which windows of images would look like."""
    adapted = mixed()
    adapted.route(["small", None, "ssf"])
    with pytest.raises(InputError, match=rf"route\(\) was given 3 ids and the batch has {count} images"):
        adapted(images(count))


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (VPT(count=2), r"kinds \['prompt'\]"),
        (Houlsby(width=4), r"kinds \['tokens'\]"),
        (FullFineTune(), "trained base values"),
    ],
    ids=["prompt", "tokens", "base"],
)
def test_adapters_that_are_more_than_weights_are_refused(other, what):
    """Named for an image, or at work for all images beside the routing."""
    adapted = vit(a=LoRA(rank=2), other=other)
    with pytest.raises(InputError, match=rf"'other' has {what}; only delta and weight adapters can be mixed"):
        adapted.route(["a", "other"])
    adapted.enable("other")
    with pytest.raises(InputError, match=r"'other' (is enabled for all images|has replaced base values); disable it"):
        adapted.route(["a", None])
    adapted.enable("a")
    adapted.route(["a", None])


def test_adapters_cannot_be_switched_under_a_routing():
    adapted, x = mixed(), images(2)
    adapted.route(["small", "ssf"])
    found = run(adapted, x)
    for what, message in (
        (lambda: adapted.enable("large"), r"end routing with route\(None\) before switching"),
        (lambda: adapted.remove("ssf"), r"images are being routed to adapter 'ssf'"),
        (lambda: adapted.add("new", LoRA()), r"add 'new' with enable=False, or end it with route\(None\)"),
    ):
        with pytest.raises(InputError, match=message):
            what()
    adapted.remove("large")  # nobody's
    noise(adapted.add("new", LoRA(rank=2), enable=False))
    assert_close(run(adapted, x), found)
