"""Methods that train between frozen factors of a weight or of its gradient: SALT, S-SAM, LoLDU, LoRA-XS, LoRA-SB."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.testing import assert_close

from visadapt.adapters.loldu import LoLDU
from visadapt.adapters.lora_sb import LoRASB
from visadapt.adapters.lora_xs import LoRAXS
from visadapt.adapters.salt import SALT
from visadapt.adapters.ssam import SSAM
from visadapt.backbones.base import Backbone
from visadapt.core.adapted import Adapted
from visadapt.core.sites import Site


class Layers(Backbone):
    """Linears, or one convolution, with tanh between them."""

    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def sites(self):
        size = {nn.Linear: ("proj", "in_features", "out_features"), nn.Conv2d: ("conv", "in_channels", "out_channels")}
        named = ((n, module, *size[type(module)]) for n, module in enumerate(self.body))
        return [Site(str(n), role, n, getattr(m, i), getattr(m, o)) for n, m, role, i, o in named]

    def forward(self, x):
        for layer in self.body[:-1]:
            x = layer(x).tanh()
        return self.body[-1](x)


def attach(adapter, state, *layers):
    """The layers with these values in place and the adapter on them; its pieces."""
    backbone = Layers(*layers)
    backbone.body.load_state_dict(state)
    adapted = Adapted(backbone)
    adapted.add("a", adapter)
    adapted.set_trainable("a")
    return adapted, list(adapter.pieces.values())


def official_factors(piece, aux):
    """Give a piece the signs of the official decomposition, which is otherwise the same as ours."""
    count = len(piece.s)
    u, s, vt = aux["U"][:, :count], aux["S"][:count], aux["Vt"][:count]
    sign = (piece.u * u).sum(0).sign()
    for ours, theirs in ((piece.u * sign, u), (piece.s, s), (piece.vt * sign[:, None], vt)):
        assert_close(ours, theirs, rtol=0, atol=1e-3)
    piece.u, piece.s, piece.vt = u.clone(), s.clone(), vt.clone()


def run(kit, adapted, piece, names):
    """Output and penalty of one adapted layer with the kit's values, and all recorded gradients."""
    official_factors(piece, kit.group("aux"))
    piece.load_state_dict({ours: kit.group("param")[theirs] for ours, theirs in names.items()})
    fed = kit.group("in")
    x = fed["x"].requires_grad_()
    values = [getattr(piece, name) for name in names]
    outputs = {"y": adapted.backbone(x), "reg_loss": piece.penalty()}
    of_penalty = torch.autograd.grad(outputs["reg_loss"], values)
    for theirs, gradient in zip(names.values(), of_penalty):
        assert_close(gradient, kit.group("gradreg")[theirs], rtol=0, atol=kit.info["atol"])
    (outputs["y"] * fed["cotangent"]).sum().backward()
    return outputs, {"x": x.grad} | {theirs: value.grad for theirs, value in zip(names.values(), values)}


def plain(kit):
    """The values of the layer itself, under the names of the first of several layers."""
    return {f"0.{k}": v for k, v in kit.group("param").items() if k in ("weight", "bias")}


SALT_NAMES = {"gain": "trainable_scale_A", "shift": "trainable_shift_B", "x": "trainable_X", "y": "trainable_Y"}


def salt(kit):
    args = kit.args
    layer = nn.Linear(args["in_features"], args["out_features"], bias=args["bias"])
    adapted, (piece,) = attach(SALT(args["rank"], args["r_lora"], targets=["proj"]), plain(kit), layer)
    return run(kit, adapted, piece, SALT_NAMES)


def salt_conv(kit):
    args = kit.args
    sizes = (args[k] for k in ("in_channels", "out_channels", "kernel_size", "stride", "padding"))
    layer = nn.Conv2d(*sizes, bias=args["bias"])
    adapted, (piece,) = attach(SALT(args["rank"], args["r_lora"], targets=["conv"]), plain(kit), layer)
    return run(kit, adapted, piece, SALT_NAMES)


def ssam_svd(kit):
    args, state, aux = kit.args, plain(kit), kit.group("aux")
    layer = nn.Linear(args["in_features"], args["out_features"], bias="0.bias" in state)
    adapted, (piece,) = attach(SSAM(args["fraction_trainable"], targets=["proj"]), state, layer)
    rest = slice(len(piece.s), None)  # the official layer adds 1 to the values that it does not train: not repeated
    adapted.backbone.body[0].weight += aux["U"][:, rest] @ aux["Vt"][rest]
    return run(kit, adapted, piece, {"gain": "trainable_scale", "shift": "trainable_shift"})


def loldu(kit):
    args, fed = kit.args, kit.group("in")
    prefix = "0.parametrizations.weight.0."
    start, moved = ({k.removeprefix(prefix): v for k, v in kit.group(g).items()} for g in ("init", "param"))
    state = {"0.weight": fed["W0"]} | {k: v for k, v in start.items() if k == "0.bias"}
    layer = nn.Linear(args["fan_in"], args["fan_out"], bias="0.bias" in state)
    adapter = LoLDU(args["rank"], args["lora_alpha"], targets=["proj"])
    adapted, (piece,) = attach(adapter, state, layer)
    assert_close(piece.lower, start["P"] @ start["lora_B"], rtol=0, atol=kit.info["atol"])
    assert_close(piece.upper, start["lora_A"], rtol=0, atol=kit.info["atol"])
    assert_close(piece.scaling, start["scaling_factor"].item())
    if args["init_method"] in ("lu", "uniform", "normal", "constant"):  # the base moves along with these
        piece.d.copy_(start["vector_z"])
    outputs = {}
    with adapted.disabled():
        outputs["y_base"] = adapted.backbone(fed["x"])
    piece.load_state_dict({"z": start["vector_z"]})
    outputs["y_at_init"] = adapted.backbone(fed["x"])

    scaling = moved["scaling_factor"].item()  # moved by the kit, never by the official training
    piece.load_state_dict({"z": moved["vector_z"]})
    piece.d *= piece.scaling / scaling
    piece.scaling = scaling
    outputs["y"] = adapted.backbone(fed["x"])
    (outputs["y"] * fed["cotangent"]).sum().backward()
    adapted.merge()
    outputs["merged_weight"] = layer.weight
    return outputs, {prefix + "vector_z": piece.z.grad}


def factored(kit, adapter):
    """A network with an adapter on every layer, and the official values of each layer's three factors."""
    fed, dims = kit.group("in"), kit.args["dims"]
    names = [f"fc{n}" for n in range(1, len(dims))]
    state = {f"{n}.{k}": fed[f"base.{name}.{k}"] for n, name in enumerate(names) for k in ("weight", "bias")}
    adapted, pieces = attach(adapter, state, *(nn.Linear(i, o) for i, o in pairwise(dims)))
    parts = {"a": "lora_A.default.weight", "b": "lora_B.default.weight", "r": "default_lora_latent_mapping.weight"}
    stages = [
        {n: {ours: given[f"base_model.model.{n}.{theirs}"] for ours, theirs in parts.items()} for n in names}
        for given in (kit.group("init"), kit.group("param"))
    ]
    return adapted, dict(zip(names, pieces)), stages


def run_factored(kit, adapted, pieces, stages):
    x, outputs = kit.group("in")["x"], {}
    with adapted.disabled():
        outputs["y_base"] = adapted.backbone(x)
    for given, y, delta in zip(stages, ("y_at_init", "y"), ("delta_init", "delta")):
        for name, piece in pieces.items():
            for part, value in given[name].items():
                getattr(piece, part).data.copy_(value)
            outputs[f"{delta}.{name}"] = piece.delta()
        outputs[y] = adapted.backbone(x)
    (outputs["y"] * kit.group("in")["cotangent"]).sum().backward()
    latent = "base_model.model.{}.default_lora_latent_mapping.weight"
    return outputs, {latent.format(name): piece.r.grad for name, piece in pieces.items()}


def loraxs(kit):
    adapted, pieces, stages = factored(kit, LoRAXS(kit.args["r"], kit.args["lora_alpha"], targets=["proj"]))
    for name, piece in pieces.items():  # ours are exact, the official ones come from a randomised decomposition
        theirs = stages[0][name]
        sign = (piece.b * theirs["b"]).sum(0).sign()
        assert_close(piece.b * sign, theirs["b"], rtol=0, atol=1e-3)
        assert_close(piece.a * sign[:, None], theirs["a"], rtol=0, atol=1e-3)
    outputs, gradients = run_factored(kit, adapted, pieces, stages)
    for name in pieces:  # smaller than the kit's tolerance
        assert_close(outputs[f"delta_init.{name}"], kit.group("out")[f"delta_init.{name}"], rtol=0, atol=1e-7)
    return outputs, gradients


def lorasb(kit):
    adapter = LoRASB(kit.args["r"], kit.args["lr"], targets=["proj"])
    adapted, pieces, stages = factored(kit, adapter)
    sums = {p.site.key: kit.group("in")[f"summed_grad.{name}.weight"] for name, p in pieces.items()}
    adapter.calibrate(sums)
    for piece in pieces.values():  # the official factors come from a randomised decomposition and are rounded
        step, one = -kit.args["lr"] * sums[piece.site.key].sign(), torch.eye(kit.args["r"])
        assert_close(piece.a @ piece.a.T, one, rtol=0, atol=1e-5)
        assert_close(piece.b.T @ piece.b, one, rtol=0, atol=1e-5)
        assert_close(piece.b.T @ step @ piece.a.T, piece.r.detach(), rtol=0, atol=1e-6)
        assert_close(piece.r.norm(), torch.linalg.svdvals(step)[: len(one)].norm(), rtol=1e-5, atol=0)
    return run_factored(kit, adapted, pieces, stages)


BUILDERS = {
    "salt": salt,
    "salt_conv": salt_conv,
    "ssam_svd": ssam_svd,
    "loldu": loldu,
    "loraxs": loraxs,
    "lorasb": lorasb,
}
"""Our building blocks against recorded runs of the official implementations."""
