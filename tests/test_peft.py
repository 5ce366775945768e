"""The bridge to the tuners of HF PEFT: every tuner at the places it takes, against PEFT itself, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import sys
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from visadapt.adapters._common.peft_rules import ONLY_VALUES, REFUSED, REFUSED_OPTIONS, REFUSED_VALUES, TUNERS
from visadapt.adapters.peft import PEFT
from visadapt.backbones.base import Backbone
from visadapt.core.adapted import Adapted
from visadapt.core.sites import Site
from visadapt.errors import InputError
from visadapt.testing import assert_close, difference, noise, tiny_backbone

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore::UserWarning:peft.*")]
each = pytest.mark.parametrize

D, PATCH = 48, 14
OPTIONS = {n: dict(r=4) for n in ("HiRA", "HRA", "LoRA", "PEANuT", "SHiRA")}
OPTIONS |= {n: dict(r=8) for n in ("MiSS", "PSOFT", "PVeRA", "RandLoRA", "VeRA")}
OPTIONS |= {"C3A": dict(block_size=16), "OFT": dict(oft_block_size=8), "RoAd": dict(group_size=16)}
OPTIONS |= {"GraLoRA": dict(r=4, alpha=8), "VBLoRA": dict(vector_length=16), "WaveFT": dict(n_frequency=64)}
"""Options that fit a width of 48; PEFT's defaults where a tuner is not named."""

VARIANTS = [("LoRA", dict(init_lora_weights=v)) for v in ("mica", "olora", "orthogonal", "pissa_niter_4")]
VARIANTS += [("LoRA", dict(lora_bias=True, use_rslora=True)), ("DoRA", dict(r=4, init_lora_weights="pissa"))]
VARIANTS += [("MiSS", dict(r=8, init_weights="bat")), ("MiSS", dict(r=8, mini_r=2, init_weights="mini"))]
VARIANTS += [(n, dict(r=8, save_projection=False)) for n in ("RandLoRA", "VeRA")]
VARIANTS += [("TinyLoRA", dict(weight_tying=1.0)), ("UniLoRA", dict(save_indices=True)), ("GraLoRA", dict(hybrid_r=2))]
VARIANTS += [("DEFT", dict(r=4, decomposition_method="qr")), ("PEANuT", dict(r=4, depth=2))]
VARIANTS += [("GLoRA", dict(r=4, config_A_B="vector", config_C="none", config_D_E="vector"))]
VARIANTS += [("LoKr", dict(decompose_both=True, decompose_factor=4)), ("RoAd", dict(group_size=16, variant="road_4"))]
VARIANTS += [("OFT", dict(oft_block_size=8, coft=True, eps=0.5, block_share=True))]
VARIANTS += [("PSOFT", dict(r=8, ab_svd_init="pissa_init", psoft_orth=False)), ("SuperTuning", dict(r=4, lora_alpha=4))]
"""Other forms of a tuner, among them those for which PEFT itself changes base weights."""

CONFIGS = {n: peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[rule.type]] for n, rule in TUNERS.items()}
SHARING = ("PVeRA", "RandLoRA", "TinyLoRA", "UniLoRA", "VBLoRA", "VeRA")
CONVS = ("AdaLoRA", "BOFT", "DoRA", "HiRA", "HRA", "IA3", "LoHa", "LoKr", "LoRA", "OFT")
LINEARS = [n for n in TUNERS if n != "LNTuning"]


def places(tuner):
    """Slices of the fused qkv, plain linears, and the patch embedding; norms for what takes only those."""
    if tuner not in LINEARS:
        return [("norm1", "norm2", "norm")]
    return [("q", "v"), ("fc1", "fc2"), *([("patch",)] if tuner in CONVS and tuner != "OFT" else [])]


CASES = [pytest.param(n, OPTIONS.get(n, {}), at, id="-".join((n, *at))) for n in TUNERS for at in places(n)]
CASES += [pytest.param(n, o, ("q", "fc1", "fc2"), id="-".join((n, *map(str, o.values())))) for n, o in VARIANTS]
every_case = each("tuner, options, targets", CASES)


@cache
def pristine(seed=0, **arch) -> Backbone:
    sizes = dict(depth=1, embed_dim=D, num_heads=3, img_size=2 * PATCH, patch_size=PATCH)
    return tiny_backbone(dict(type="TimmViT", name="test_vit", arch=sizes | arch), seed)


def bare(seed=0, **arch) -> Adapted:
    return Adapted(copy.deepcopy(pristine(seed, **arch))).eval()


def adapt(tuner, options, targets, std=0.05, **arch) -> Adapted:
    """A backbone with the tuner as adapter "a", its parameters moved away from the start by noise of `std`."""
    adapted = bare(**arch)
    torch.manual_seed(0)
    adapter = adapted.add("a", PEFT(tuner, options, targets=targets))
    adapted.set_trainable("a")
    noise(adapter, std)
    return adapted.eval()


def joined(adapted) -> Tensor:
    features = adapted(torch.randn(2, 3, 2 * PATCH, 2 * PATCH, generator=torch.Generator().manual_seed(1)))
    return torch.cat([features.native[:, None], features.tokens], 1)


outputs = torch.no_grad()(joined)


def assert_base_untouched(adapted) -> None:
    body, base = adapted.backbone.body, pristine().body
    assert {n: type(m) for n, m in body.named_modules()} == {n: type(m) for n, m in base.named_modules()}
    found, wanted = body.state_dict(), base.state_dict()
    assert list(found) == list(wanted) and all(torch.equal(found[k], wanted[k]) for k in wanted)


# ---- every tuner at every place -------------------------------------------------------------------------------------
@every_case
def test_a_fresh_adapter_is_the_identity_where_it_says_so(tuner, options, targets):
    adapted = adapt(tuner, options, targets, std=0)
    same = difference(outputs(adapted), outputs(pristine())) <= 1e-5
    assert same == adapted.adapters["a"].identity_at_init == (tuner not in ("UniLoRA", "VBLoRA"))


@every_case
def test_the_base_stays_as_it_is(tuner, options, targets):
    adapted = adapt(tuner, options, targets)
    changed, base = outputs(adapted), outputs(pristine())
    assert difference(changed, base) > 1e-3
    assert_base_untouched(adapted)
    with adapted.disabled():
        assert torch.equal(outputs(adapted), base)
    assert torch.equal(outputs(adapted), changed)
    adapted.remove("a")
    assert_base_untouched(adapted)
    assert torch.equal(outputs(adapted), base)
    assert not any("forward" in m.__dict__ for m in adapted.backbone.body.modules())


@each("half", [False, True])
@every_case
def test_every_parameter_gets_a_gradient_and_no_base_parameter_does(tuner, options, targets, half):
    adapted = adapt(tuner, options, targets).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        joined(adapted).float().square().sum().backward()
    trained = dict(adapted.adapters["a"].named_parameters())
    assert trained and not [n for n, p in trained.items() if p.grad is None or not 0 < p.grad.abs().sum() < math.inf]
    assert all(p.grad is None for p in adapted.backbone.parameters())


@every_case
def test_a_file_reads_back_whatever_the_random_state_and_the_base_at_building(tuner, options, targets, tmp_path):
    adapted, file = adapt(tuner, options, targets), str(tmp_path / "a.safetensors")
    expected = outputs(adapted)
    adapted.save(file)
    fresh = bare()
    torch.manual_seed(1)
    assert fresh.load(file).probe_error == 0
    assert torch.equal(outputs(fresh.eval()), expected)
    late = bare(seed=1)  # the base comes after the adapter, as from a checkpoint of the whole model
    late.add("a", PEFT(tuner, options, targets=targets))
    late.backbone.load_state_dict(pristine().state_dict())
    late.load(file)
    assert torch.equal(outputs(late.eval()), expected)


@every_case
def test_merging_changes_nothing_and_unmerging_restores_bits(tuner, options, targets):
    adapted = adapt(tuner, options, targets).eval()
    expected = outputs(adapted)
    assert adapted.merge("a") == len({piece.site.path for piece in adapted.pieces("a")})
    assert_close(outputs(adapted), expected, tolerance=1e-5)
    adapted.unmerge()
    assert_base_untouched(adapted)
    assert torch.equal(outputs(adapted), expected)


@each("tuner", TUNERS)
def test_copies_are_independent(tuner):
    adapted = adapt(tuner, OPTIONS.get(tuner), places(tuner)[0])
    expected, twin = outputs(adapted), copy.deepcopy(adapted)
    noise(adapted.adapters["a"], seed=1)
    assert torch.equal(outputs(twin), expected) and not torch.equal(outputs(adapted), expected)
    noise(twin.adapters["a"], seed=1)
    assert torch.equal(outputs(twin), outputs(adapted))  # so the sites of a copy share what they shared


# ---- against PEFT itself --------------------------------------------------------------------------------------------
def theirs(tuner, options, module, state, feeds) -> nn.Module:
    """PEFT's own layer around a copy of the module, with these adapter tensors; `feeds` where it ends an MLP (IA3)."""
    plain = copy.deepcopy(module)
    del plain.forward
    extra = {"IA3": {"feedforward_modules": ["0"] * feeds}, "AdaLoRA": {"total_step": 1000}}.get(tuner, {})
    config = CONFIGS[tuner](target_modules=["0"], **TUNERS[tuner].defaults | options | extra)
    torch.manual_seed(0)  # as in `adapt`, for `pissa_niter` takes a random decomposition off the base
    layer = peft.get_peft_model(nn.Sequential(plain), config).eval().base_model.model[0]
    report = layer.load_state_dict(state, strict=False)
    assert set(report.missing_keys) == {"base_layer.weight", "base_layer.bias"}
    assert {k.split(".")[0] for k in report.unexpected_keys} <= set(TUNERS[tuner].keep)
    return layer


@every_case
def test_outputs_gradients_and_merged_weights_are_those_of_peft(tuner, options, targets):
    role = targets[-1] if targets[-1] != "v" else "proj"
    adapted = adapt(tuner, options, (role,))
    (piece,) = adapted.pieces("a")
    module = adapted.backbone.body.get_submodule(piece.site.path)
    layer = theirs(tuner, options, module, piece.layer.state_dict(), feeds=role == "fc2")
    weight, bias = piece.map(module.weight, module.bias)
    x = torch.randn(2, 3, 28, 28) if role == "patch" else torch.randn(2, 5, module.weight.shape[-1])
    ours = module(x)
    assert_close(ours, layer(x), tolerance=1e-6)
    ours.square().sum().backward()
    layer(x).square().sum().backward()
    wanted = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
    found = {n: p.grad for n, p in piece.layer.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert_close(found[name], grad, f"gradient of {name}")
    layer.merge()
    assert_close(weight, layer.get_base_layer().weight, "weight")
    assert_close(bias, layer.get_base_layer().bias, "bias")


@each("tuner", SHARING)
def test_what_layers_share_in_peft_is_shared_and_saved_once(tuner, tmp_path):
    adapted, file = adapt(tuner, OPTIONS.get(tuner), ("q", "v", "proj")), tmp_path / "a.safetensors"
    common = adapted.adapters["a"].common
    assert common and all(getattr(p.layer, name) is part for name, part in common.items() for p in adapted.pieces("a"))
    adapted.save(str(file))
    saved = load_file(file).keys()
    assert {f"adapters/a/shared/{k}" for k in common.state_dict()} == {k for k in saved if "/shared/" in k} != set()
    assert not [k for k in saved if "/shared/" not in k and any(f".{name}." in k for name in common)]


@each("tuner", LINEARS)
def test_windows_and_single_rows_are_taken_like_sequences(tuner):
    """PEFT's OFT takes (B, H, W, C) for an image and its GraLoRA takes (B, N, C) only."""
    fc1 = adapt(tuner, OPTIONS.get(tuner), ("fc1",)).backbone.body.blocks[0].mlp.fc1
    x = torch.randn(3, 2, 4, D)
    expected = fc1(x.reshape(3, 8, D))
    assert_close(fc1(x), expected.reshape(3, 2, 4, -1))
    assert_close(fc1(x[:, 0, 0]), expected[:, 0])


@each("tuner", LINEARS)
def test_an_adapter_works_on_the_weight_that_the_one_before_it_made(tuner):
    adapted, expected = bare(), copy.deepcopy(pristine())
    first = adapted.add("first", PEFT("LoRA", dict(r=2), targets=["qkv"]))
    second = adapted.add("second", PEFT(tuner, OPTIONS.get(tuner), targets=["q"]))
    adapted.set_trainable("first")
    noise(adapted.adapters, std=0.05)
    y, below = joined(adapted.eval()), first.pieces["trunk_00_qkv"].layer.lora_B["default"].weight
    y.square().sum().backward()
    value, step = below.detach(), 1e-3 * F.pad(torch.randn(D, 2), (0, 0, 0, 2 * D))  # in the rows of q
    losses = [outputs(adapted).square().sum().item() for below.data in (value + step, value - step)]
    below.data = value
    if tuner != "DoRA":  # it takes the norm of the weight for a constant, as its paper does
        assert (below.grad * step).sum().item() == pytest.approx((losses[0] - losses[1]) / 2, rel=0.02)
    qkv = expected.body.blocks[0].attn.qkv
    with torch.no_grad():
        for piece, rows in ((first.pieces["trunk_00_qkv"], slice(None)), (second.pieces["trunk_00_q"], slice(D))):
            qkv.weight[rows], qkv.bias[rows] = piece.map(qkv.weight[rows], qkv.bias[rows])
    assert_close(y.detach(), outputs(expected))
    adapted.merge()
    assert_close(outputs(adapted), y.detach(), "merged")


@each("below", [("LoRA", dict(lora_dropout=0.5)), ("PVeRA", dict(r=8)), ("LoHa", dict(rank_dropout=0.5))])
def test_nothing_works_on_a_weight_that_is_random_in_training(below):
    adapted = bare()
    adapted.add("noisy", PEFT(*below))
    adapted.add("top", PEFT("HRA", dict(r=2)))
    outputs(adapted.eval())
    with pytest.raises(InputError, match=r"'noisy' is random in training \(dropout\) and 'top' works on its weight"):
        joined(adapted.train())


def test_options_and_roles_reach_peft():
    pieces = adapt("LoRA", dict(rank_pattern={"trunk_00_v": 2}), ("q", "v")).adapters["a"].pieces
    assert [pieces[f"trunk_00_{r}"].layer.lora_A["default"].out_features for r in "qv"] == [8, 2]
    pieces = adapt("IA3", {}, ("fc1", "fc2")).adapters["a"].pieces  # it scales what leaves fc1 and what enters fc2
    assert [pieces[f"trunk_00_fc{n}"].layer.ia3_l["default"].shape for n in (1, 2)] == [(3 * D, 1), (1, 3 * D)]


@each("tuner, options, adds", [("BEFT", {}, True), ("LoRA", dict(lora_bias=True), True), ("HRA", {}, False)])
def test_a_layer_without_bias(tuner, options, adds):
    adapted = adapt(tuner, options, ("q", "v"), qkv_bias=False)
    qkv, expected = adapted.backbone.body.blocks[0].attn.qkv, outputs(adapted)
    adapted.merge("a")
    assert (qkv.bias is not None) == adds
    assert_close(outputs(adapted), expected)
    adapted.unmerge()
    assert qkv.bias is None and torch.equal(outputs(adapted), expected)


class OneConv(Backbone):
    def __init__(self, **arguments) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 12, **arguments))

    def sites(self) -> list[Site]:
        return [Site("0", "conv", 0, 8, 12, layout="NCHW")]


@each("size, stride, padding", [(1, 1, 0), (3, 2, 1), (3, 1, 2)])
@each("tuner", CONVS)
def test_convolutions_with_stride_and_padding(tuner, size, stride, padding):
    backbone, x = OneConv(kernel_size=size, stride=stride, padding=padding), torch.randn(2, 8, 6, 7)
    if tuner == "OFT" and size > 1:
        refused("PEFT 'OFT': 0 has a kernel of (3, 3); PEFT rotates overlapping", "OFT", {}, backbone, ["conv"])
        return
    adapted, body, before = Adapted(backbone), backbone.body, backbone.body(x)
    assert adapted.add("a", PEFT(tuner, OPTIONS.get(tuner), targets=["conv"])).identity_at_init
    assert_close(body(x), before)
    noise(adapted.adapters, std=0.3)
    changed = body(x).detach()
    assert difference(changed, before) > 0.01
    adapted.merge("a")
    assert_close(body(x), changed)


# ---- what is refused ------------------------------------------------------------------------------------------------
def refused(message, tuner, options=None, backbone=None, targets=None) -> None:
    """Building (and adding to a backbone, where one is given) raises an InputError of one line with this text."""
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        adapter = PEFT(tuner, options, targets)
        Adapted(backbone).add("a", adapter)
    assert "\n" not in str(caught.value)


def takers(key) -> list[tuple[str, str]]:
    """An option with all tuners that have it in PEFT; only with the one before the dot, if there is one."""
    only, _, option = key.rpartition(".")
    names = [only] if only else [n for n in TUNERS if f"{n}.{option}" not in REFUSED_OPTIONS]
    return [(n, option) for n in names if option in {f.name for f in dataclasses.fields(CONFIGS[n])}]


def test_the_tables_judge_every_tuner_of_peft_and_no_option_that_it_lacks():
    assert all(takers(k) for k in (*REFUSED_OPTIONS, *ONLY_VALUES, *(k for k, _ in REFUSED_VALUES)))
    judged = {rule.type.replace("_", "") for rule in TUNERS.values()} | {n.upper() for n in REFUSED}
    assert judged - {"BONE"} == {t.name.replace("_", "") for t in peft.PeftType}
    assert not TUNERS.keys() & REFUSED.keys()
    assert all(PEFT(n.upper().replace("LORA", "-LoRA")).tuner == n for n in TUNERS)


@each("tuner", REFUSED)
def test_refused_tuners_say_why(tuner):
    for given in (tuner, re.sub(r"(?<=[a-z])(?=[A-Z])", "_", tuner).upper()):
        refused(f"PEFT: tuner '{tuner}' is refused: {REFUSED[tuner]}", given)


@each("key", REFUSED_OPTIONS)
def test_refused_options_say_why(key):
    for tuner, option in takers(key):
        refused(f"PEFT '{tuner}': option '{option}' is refused: {REFUSED_OPTIONS[key]}", tuner, {option: 1})


@each("key, value", REFUSED_VALUES)
def test_refused_values_say_why(key, value):
    for tuner, option in takers(key):
        refused(f"'{tuner}': {option}={value!r} is refused: {REFUSED_VALUES[key, value]}", tuner, {option: value})


@each("option", ONLY_VALUES)
def test_options_of_which_one_value_works(option):
    good, reason = ONLY_VALUES[option]
    for tuner, _ in takers(option):
        for bad in ("all", f"{TUNERS[tuner].type.lower()}_only", None, *({True, False} - {good})):
            refused(f"PEFT '{tuner}': {option}={bad!r} is refused: {reason}", tuner, {option: bad})
        PEFT(tuner, {option: good})


MISFITS = [
    (None, "Lorra", {}, "PEFT: no tuner 'Lorra' (did you mean 'LoRA'"),
    (None, "lora", dict(lora_alhpa=2), "PEFT 'LoRA' has no option 'lora_alhpa' (did you mean 'lora_alpha'"),
    (None, "LoRA", dict(r=torch.ones(1)), "PEFT 'LoRA': options must be JSON values"),
    (None, "LoHa", dict(rank_dropout=1), "PEFT 'LoHa': rank_dropout=1 is refused: it must be in [0, 1)"),
    (None, "HRA", dict(bias="hra_only"), "PEFT 'HRA': bias='hra_only' is refused: it trains biases of the base"),
    (None, "LoRA", dict(init_lora_weights="lora_ga"), "it starts from gradients that are gone at loading"),
    (None, "LoRA", dict(kasa_config={}), "PEFT 'LoRA': option 'kasa_config' is refused: KaSA drops singular values"),
    (None, "GraLoRA", dict(r=4, gralora_k=3), "PEFT 'GraLoRA' refuses its options: r should be divisible"),
    ("fc1", "C3A", dict(block_size=256), "PEFT 'C3A' refuses sites of 144 x 48: The block size"),
    ("patch", "LoRA", dict(init_lora_weights="pissa"), "PEFT 'LoRA' refuses sites of 48 x 3: Unknown init"),
    ("q", "GLoRA", dict(config_A_B="none", config_C="none", config_D_E="none"), "nothing of it trains"),
    ("q", "PSOFT", dict(r=8, psoft_alpha=0), "fails at blocks.0.attn.qkv: the output is not finite"),
    ("norm1", "HRA", {}, "PEFT 'HRA': blocks.0.norm1 is a LayerNorm; it works on Linear and Conv2d"),
    ("q", "LNTuning", {}, "PEFT 'LNTuning': blocks.0.attn.qkv is a Linear; it works on LayerNorm"),
    ("attn", "HRA", {}, "PEFT on TimmViT: it cannot sit at attn"),
]


@each("target, tuner, options, message", MISFITS)
def test_what_does_not_fit_is_refused(target, tuner, options, message):
    backbone = copy.deepcopy(pristine())
    refused(message, tuner, options, backbone, [target])
    assert_base_untouched(Adapted(backbone))


@each("tuner", LINEARS)
def test_convolutions_that_a_tuner_cannot_take(tuner):
    uneven = [dict(groups=2), dict(dilation=2), dict(padding="same"), dict(padding_mode="reflect"), dict(stride=(1, 2))]
    message, wrong = "is a Conv2d; it works on Linear", [dict(kernel_size=3)]
    if tuner in CONVS:
        message = "has groups, dilation, a special padding or a kernel that is not square"
        wrong = [dict(kernel_size=(3, 1)), *(dict(kernel_size=3) | more for more in uneven)]
    for arguments in wrong:
        refused(f"PEFT '{tuner}': 0 {message}", tuner, OPTIONS.get(tuner), OneConv(**arguments), ["conv"])


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    refused("PEFT needs the package peft: pip install 'visadapt[peft]'", "LoRA")
