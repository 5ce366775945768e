"""Low-rank updates whose rank changes in training."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from visadapt.adapters.dylora import DyLoRA
from visadapt.adapters.increlora import IncreLoRA
from visadapt.adapters.sora import SoRA, shrink, sparsities
from visadapt.backbones.base import Backbone
from visadapt.core.adapted import Adapted
from visadapt.core.progress import Progress
from visadapt.core.sites import Site


class Linears(Backbone):
    """Linears with tanh between them, each a site of role proj."""

    def __init__(self, dims):
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(i, o) for i, o in pairwise(dims)))

    def sites(self):
        return [Site(str(n), "proj", n, m.in_features, m.out_features) for n, m in enumerate(self.body)]

    def forward(self, x):
        for linear in self.body[:-1]:
            x = linear(x).tanh()
        return self.body[-1](x)


def attach(adapter, *dims):
    adapted = Adapted(Linears(dims))
    adapted.add("a", adapter)
    adapted.set_trainable("a")
    return adapted, list(adapter.pieces.values())


def at(step, lr=0.0, total=1_000_000):
    return Progress(step, total, 0, 1, torch.Generator(), lr)


def dylora(kit):
    """One linear; every rank trained with and without the lower ranks frozen, and evaluated."""
    args, given, fed = kit.args, kit.group("param"), kit.group("in")
    outputs, gradients = {}, {}
    for mode in ("frozen", "unfrozen", "eval"):
        adapter = DyLoRA(args["r"], args["lora_alpha"], frozen=mode == "frozen", targets=["proj"])
        adapted, (piece,) = attach(adapter, args["in_features"], args["out_features"])
        adapted.backbone.body[0].load_state_dict({k: given[k] for k in ("weight", "bias")})
        piece.load_state_dict({"a": given["lora_A"], "b": given["lora_B"]}, strict=False)
        adapted.train(mode != "eval")
        for b in args["b_indices"]:
            adapter.use_rank(args["r"] if adapted.training else b + 1)
            piece.drawn.fill_(b + 1)
            adapted.zero_grad()
            y = outputs[f"y_b{b}_{mode}"] = adapted.backbone(fed["x"])
            (y * fed["cotangent"]).sum().backward()
            gradients |= {f"lora_A_b{b}_{mode}": piece.a.grad.clone(), f"lora_B_b{b}_{mode}": piece.b.grad.clone()}
    return outputs, gradients


def sora(kit):
    """The update of one linear, then steps of the gates' own optimizer with recorded gradients."""
    args, given, fed = kit.args, kit.group("param"), kit.group("in")
    adapter = SoRA(
        args["r"],
        args["lora_alpha"],
        sparsity=args["sparse_lambda"],
        variant="official",
        betas=args["betas"],
        eps=args["eps"],
        gate_decay=args["weight_decay"],
        targets=["proj"],
    )
    adapted, (piece,) = attach(adapter, args["in_features"], args["out_features"])
    for value in adapted.backbone.body.parameters():
        nn.init.zeros_(value)  # the recorded output is the update alone
    piece.load_state_dict({"a": given["lora_A"], "b": given["lora_B"], "gate": given["gate"][0]})
    outputs = {"y": adapted.backbone(fed["x"])}
    (outputs["y"] * fed["cotangent"]).sum().backward()
    gradients = {"lora_A": piece.a.grad, "lora_B": piece.b.grad, "gate": piece.gate.grad[None].clone()}
    piece.gate.data.copy_(fed["opt_gate0"][0])
    for step in range(sum(name.startswith("opt_grad_") for name in fed)):
        piece.gate.grad = fed[f"opt_grad_{step}"][0]
        adapter.on_gradients(at(step, args["lr"]))
        adapter.on_update(at(step, args["lr"]))
        outputs[f"opt_gate_{step + 1}"] = piece.gate[None].clone()
    outputs["threshold"] = shrink(fed["threshold_v"], args["sparse_lambda"], "official")
    outputs |= {f"lambda_{k}": torch.tensor(v) for k, v in enumerate(recorded_schedule(args))}
    return outputs, gradients


def recorded_schedule(args):
    """Strengths by number of stages done: the official optimizer's name, maximum and count, in whatever container."""
    given = args["lambda_schedule"]
    if given is None:
        return []
    values = [given, args.get("max_lambda"), args.get("lambda_num")] if isinstance(given, str) else given
    values = list(values.values()) if isinstance(values, dict) else values
    name, last, count = (next(v for v in values if isinstance(v, kind)) for kind in (str, float, int))
    return sparsities(name, args["sparse_lambda"], last, count)


def increlora(kit):
    """A recorded training of a small network: which linear grows when, from the scores of every step."""
    args, given, fed = kit.args, kit.group("param"), kit.group("in")
    allocator, recorded = args["allocator"], kit.group("out")
    depth = len(args["dims"])
    last = [sum(k.startswith(f"final.l{n}.lora_A.") for k in recorded) for n in range(depth)]
    adapter = IncreLoRA(
        args["lora_r"],
        allocator["target_rank"],
        growth=allocator.get("incre_rank_num"),
        max_rank=args["lora_r"] + max(last) - 1,
        top=allocator["top_h"],
        warmup=allocator["init_warmup"],
        interval=allocator["incre_interval"],
        alpha=args["lora_alpha"],
        advance_learn=allocator["advance_learn"],
        betas=(allocator["beta1"], allocator["beta2"]),
        targets=["proj"],
    )
    adapted, pieces = attach(
        adapter, *(given[f"l{n}.weight"].shape[1] for n in range(depth)), len(given[f"l{depth - 1}.bias"])
    )
    adapted.train()
    official = {"lora_A": lambda p: p.a, "lora_E": lambda p: p.e, "lora_B": lambda p: p.b}
    for n, piece in enumerate(pieces):
        adapted.backbone.body[n].load_state_dict({k: given[f"l{n}.{k}"] for k in ("weight", "bias")})
        for name, parts in official.items():
            parts(piece)[0].data.copy_(turned(name, given[f"l{n}.{name}.0"]))
        for name, value in fed.items():
            if name.startswith("new_") and name.split("_")[3] == f"l{n}":
                letter, part = f"lora_{name[4]}", int(name.rsplit("_", 1)[1])
                official[letter](piece)[part].data.copy_(turned(letter, value))

    outputs, gradients = {"orth_regu": sum(adapter.losses().values())}, {}
    outputs["y"] = adapted.backbone(fed["x"])
    (outputs["y"] * fed["cotangent"]).sum().backward()
    for n, piece in enumerate(pieces):
        gradients |= {f"l{n}.{name}.0": turned(name, parts(piece)[0].grad) for name, parts in official.items()}
    trace(args, fed, adapted, adapter, outputs)
    for n, piece in enumerate(pieces):
        state = adapted.backbone.body[n].state_dict() | {"ranknum": ranks(adapter)[n : n + 1]}
        for name, parts in official.items():
            state |= {f"{name}.{j}": turned(name, part) for j, part in enumerate(parts(piece))}
        outputs |= {f"final.l{n}.{k}": v for k, v in state.items()}
    for name in (k for k in recorded if ".lora_E." in k and recorded[k].abs().max() < 1e-4):
        error = (outputs[name] - recorded[name]).abs().max()
        assert error <= 1e-7, f"{name} differs by {error:.1e}"  # they lie below the kit's tolerance
    return outputs, gradients


def turned(name, value):
    """Between our layout and the official one: e (n,) and (n, 1), b (n, out) and (out, n)."""
    if name == "lora_E":
        return value[:, None] if value.ndim == 1 else value[:, 0]
    return value.T if name == "lora_B" else value


def ranks(adapter):
    return torch.tensor([float(rank) for rank in adapter.ranks().values()])


def trace(args, fed, adapted, adapter, outputs):
    """The recorded steps; what a step decides is there from the next one's beginning."""
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], args["sgd_lr"])
    for step in range(args["steps"]):
        adapter.on_step(at(step))
        if step:
            outputs[f"ranknum_{step - 1}"] = ranks(adapter)
        optimizer.zero_grad()
        (adapted.backbone(fed[f"x_{step}"]) * fed[f"ct_{step}"]).sum().backward()
        adapter.on_gradients(at(step))
        outputs[f"score_{step}"] = adapter.score.clone()
        optimizer.step()
    adapter.on_step(at(args["steps"]))
    outputs[f"ranknum_{args['steps'] - 1}"] = ranks(adapter)


BUILDERS = {"dylora": dylora, "sora": sora, "increlora": increlora}
