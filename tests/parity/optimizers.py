"""Optimizers: GaLore and LoRA-Pro."""

from __future__ import annotations

from unittest import mock

import torch
from torch import nn

from visadapt.adapters.full import FullFineTune
from visadapt.adapters.lora import LoRA
from visadapt.backbones.base import Backbone
from visadapt.core.adapted import Adapted
from visadapt.core.sites import Site
from visadapt.optim import galore, lora_pro
from visadapt.optim.groups import TrainableGroups
from visadapt.optim.wrapper import AutocastOptimWrapper


class OneLinear(Backbone):
    depth = 1

    def __init__(self, weight, bias):
        super().__init__()
        self.body = nn.Module()
        self.body.fc = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        self.body.load_state_dict({"fc.weight": weight} | ({} if bias is None else {"fc.bias": bias}))

    def sites(self):
        return [Site("fc", "proj", 0, self.body.fc.in_features, self.body.fc.out_features)]

    def forward(self, x):
        return self.body.fc(x)

    def layer_id(self, name):
        return 1


def adapted_linear(adapter, weight, bias=None):
    adapted = Adapted(OneLinear(weight, bias))
    adapted.add("a", adapter)
    adapted.set_trainable("a")
    return adapted


def wrapper(model, **optimizer):
    return TrainableGroups(dict(type=AutocastOptimWrapper, optimizer=optimizer))(model)


def galore_adamw(kit):
    """A linear layer that trains in place; of the recorded singular vectors our signs are turned into theirs."""
    args, given, recorded = kit.args, kit.group("in"), kit.group("out")
    adapted = adapted_linear(FullFineTune(), given["W0"], given["b0"])
    names = ("lr", "weight_decay", "betas", "eps", "rank", "update_proj_gap", "scale", "proj_type")
    optimizer = wrapper(adapted, type=galore.GaLore, **{name: args[name] for name in names}).optimizer
    layer, outputs, ours = adapted.backbone.body.fc, {}, galore.singular_vectors

    def official(step, vectors, side):
        """The name of a recorded projector and what it is of ours with its signs."""
        by_row = vectors if side == "right" else vectors.T
        for name in (n for n in recorded if n.startswith(f"ortho_{step}")):
            if recorded[name].shape == vectors.shape:
                signs = (by_row * (recorded[name] if side == "right" else recorded[name].T)).sum(1).sign()
                return name, (signs[:, None] * vectors if side == "right" else signs * vectors)
        raise AssertionError(f"no projector of shape {tuple(vectors.shape)} is recorded at step {step}")

    for step in range(args["steps"]):

        def signed(grad, rank, proj_type, step=step):
            return {side: official(step, v, side)[1] for side, v in ours(grad, rank, proj_type).items()}

        layer.weight.grad, layer.bias.grad = given[f"gW_{step}"].clone(), given[f"gb_{step}"].clone()
        with mock.patch.object(galore, "singular_vectors", signed):
            optimizer.step()
        state = optimizer.state[layer.weight]
        outputs |= {f"W_{step + 1}": layer.weight.detach().clone(), f"b_{step + 1}": layer.bias.detach().clone()}
        outputs[f"exp_avg_{step}"] = state["exp_avg"].clone()
        for side in state.keys() & {"left", "right"}:
            outputs[official(step, state[side], side)[0]] = state[side]
    return outputs, {}


def lorapro(kit):
    """One LoRA site whose gradients come through the layer. "off" has the second moment of gradients in bfloat16."""
    outputs, exact, beta2 = {}, lora_pro.adam_ratio, kit.args["beta2"]

    def rounded(state, grad, step, group):
        if "exp_avg_sq" in state:
            state["exp_avg_sq"] += (1 / beta2 - 1) * (grad.bfloat16().float() ** 2 - grad**2)
        return exact(state, grad, step, group)

    for prefix, ratio in (("fp32", exact), ("off", rounded)):
        with mock.patch.object(lora_pro, "adam_ratio", ratio):
            outputs |= {f"{prefix}_{name}": value for name, value in lorapro_run(kit).items()}
    return outputs, {}


def lorapro_run(kit):
    args, given, outputs = kit.args, kit.group("in"), {}
    adapter = LoRA(args["r"], alpha=args["scaling"] * args["r"], targets=["proj"])
    adapted = adapted_linear(adapter, torch.zeros(args["out"], args["inp"]))
    (piece,) = adapter.pieces.values()
    piece.load_state_dict({"a": given["A0"], "b": given["B0"]})
    steps = dict(betas=(args["beta1"], args["beta2"]), eps=args["eps"], delta=args["delta"])
    driver = wrapper(adapted, type=lora_pro.LoRAPro, lr=args["sgd_lr"], variant="official", **steps)
    for step in range(args["steps"]):
        before = [p.detach().clone() for p in (piece.a, piece.b)]
        driver.update_params((adapted.backbone(torch.eye(args["inp"])) * given[f"G_{step}"].T).sum())
        for name, old, new in zip("AB", before, (piece.a, piece.b)):
            outputs[f"g{name}_{step}"] = (old - new.detach()) / args["sgd_lr"]
            outputs[f"{name}_{step + 1}"] = new.detach().clone()
        state = driver.optimizer.state[piece.b]
        outputs |= {f"{name}_{step}": state[name].clone() for name in ("exp_avg", "exp_avg_sq")}
    return outputs


BUILDERS = {"galore": galore_adamw, "lorapro": lorapro}
