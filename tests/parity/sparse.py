"""SHiRA, PaCA, RandLoRA, SNELL and SNELLA."""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import nn

from visadapt.adapters.paca import PaCA
from visadapt.adapters.randlora import RandLoRA
from visadapt.adapters.shira import SHiRA
from visadapt.adapters.snell import SNELL
from visadapt.adapters.snella import SNELLA
from visadapt.backbones.base import Backbone
from visadapt.core.adapted import Adapted
from visadapt.core.progress import Progress
from visadapt.core.sites import Site


class Linears(Backbone):
    """A module whose linears, by their paths, are sites of the role "fc1"."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def sites(self):
        linears = [(path, m) for path, m in self.body.named_modules() if isinstance(m, nn.Linear)]
        return [Site(p, "fc1", 0, m.in_features, m.out_features, n=n) for n, (p, m) in enumerate(linears)]


def one_linear(weight, bias=None):
    """A backbone of one linear with these values."""
    fc = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    fc.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return Linears(nn.ModuleDict({"fc": fc}))


def by_path(adapter):
    return {piece.site.path: piece for piece in adapter.pieces.values()}


def places(piece):
    return torch.stack([piece.index // piece.shape[1], piece.index % piece.shape[1]])


# ---- SHiRA -----------------------------------------------------------------------------------------------------------
def shira(kit):
    args, given, ins = kit.args, kit.group("param"), kit.group("in")
    body = Mlp(args["d"], args["h"], args["o"], act_layer=nn.ReLU)
    body.load_state_dict({k: v for k, v in given.items() if "shira" not in k})
    adapted = Adapted(Linears(body))
    chosen = dict(mask="random", seed=args["random_seed"], same_seed=True)
    pieces = by_path(adapted.add("a", SHiRA(args["r"], **chosen, targets=["fc1"])))
    for path, piece in pieces.items():
        piece.load_state_dict({"values": given[f"{path}.shira_weight"]})
    outputs = {"y": body(ins["x"])}
    (outputs["y"] * ins["cot"]).sum().backward()
    gradients = {f"{path}.shira_weight": piece.values.grad for path, piece in pieces.items()}
    for path, piece in pieces.items():
        outputs |= {f"{path}.indices": places(piece), f"{path}.delta": piece.delta()}
    adapted.enable("a", scale=args["scale_for_y_scaled"])
    outputs["y_scaled"] = body(ins["x"])
    return outputs, gradients


def shira_multi(kit):
    args, given, ins = kit.args, kit.group("param"), kit.group("in")
    names = args["adapters"]
    adapted = Adapted(one_linear(given["base_layer.weight"], given.get("base_layer.bias")))
    fc, gradients = adapted.backbone.body.fc, {}
    for name, rank, seed in zip(names, args["r"], args["random_seed"]):
        adapter = adapted.add(name, SHiRA(rank, mask="random", seed=seed, same_seed=True, targets=["fc1"]))
        (piece,) = adapter.pieces.values()
        assert torch.equal(places(piece), given[f"shira_indices.{name}"].int())
        piece.load_state_dict({"values": given[f"shira_weight.{name}"]})

    def run(*active):
        adapted.enable(*active)
        for name, scale in zip(names, args["scaling"]):
            adapted.pieces(name)[0].scale = scale
        return fc(ins["x"])

    outputs = {f"y_only.{name}": run(name) for name in names} | {"y": run(*names)}
    (outputs["y"] * ins["cot_y"]).sum().backward()
    for name in names:
        gradients[f"shira_weight.{name}"] = adapted.pieces(name)[0].values.grad
    adapted.merge()
    outputs["merged_weight"] = fc.weight.clone()
    adapted.unmerge()
    return outputs | {"unmerged_weight": fc.weight}, gradients


# ---- PaCA ------------------------------------------------------------------------------------------------------------
def paca(kit):
    """Four steps of gradient descent.

    Officially the parameter is W[:, idx] / scaling, and a training pass writes it into the weight only every second
    time, an evaluation never. Here our piece is given what the official weight holds at the time of each pass.
    """
    args, ins, outputs, gradients = kit.args, kit.group("in"), {}, {}
    scaling, every = args["scaling"], 2 * args["gradient_accumulation_steps"]
    adapted = Adapted(one_linear(ins["W0"], ins.get("bias")))
    (piece,) = adapted.add("a", PaCA(args["r"], targets=["fc1"])).pieces.values()
    columns = kit.group("aux")["indices"].long()
    rows = torch.arange(args["out_features"])[:, None] * args["in_features"]
    for name, value in dict(columns=columns, index=(rows + columns).flatten(), start=ins["W0"][:, columns]).items():
        getattr(piece, name).copy_(value)
    fc, official, stale = adapted.backbone.body.fc, ins["W0"][:, columns] / scaling, None
    assert torch.equal(official, kit.group("init")["paca_w"])

    def hold(parameter):
        piece.part.data.copy_(scaling * parameter)

    def weight():
        with torch.no_grad():
            return fc.weight.index_put((torch.arange(len(rows))[:, None], columns), piece.part)

    for k in range(args["steps"]):
        if (k + 1) % every != 0 or stale is None:
            stale = official
        hold(stale)
        piece.part.grad = None
        y = fc(ins[f"x_{k}"])
        (y * ins[f"ct_{k}"]).sum().backward()
        outputs |= {f"y_{k}": y, f"W_used_{k}": weight()}
        gradients[f"paca_w_{k}"] = scaling * piece.part.grad
        official = official - args["sgd_lr"] * gradients[f"paca_w_{k}"]
        outputs[f"paca_w_{k + 1}"] = official
    outputs["y_eval_before_merge"] = fc(ins["x_eval"])
    hold(official)
    adapted.merge()
    return outputs | {"W_merged": fc.weight.clone(), "y_merged": fc(ins["x_eval"])}, gradients


# ---- RandLoRA --------------------------------------------------------------------------------------------------------
def randlora(kit):
    args, given, x = kit.args, kit.group("param"), kit.group("in")["x"]
    adapted = Adapted(one_linear(given["weight"], given.get("bias")))
    made = RandLoRA(args["rank"], args["scaling"] * args["rank"], args["num_basis_given"], targets=["fc1"])
    adapter = adapted.add("a", made)
    (piece,) = adapter.pieces.values()
    assert len(piece.gamma) == args["effective_n"]
    for name, value in kit.group("init").items():
        assert torch.equal({"w_loramat_A": piece.gamma, "w_loramat_B": piece.lambda_}[name].data, value), name
    bases = adapter.common["bases"]
    b, a = given["basis_b"].transpose(0, 1), given["basis_a"][0]  # ours are as large as the sites need
    bases.b.copy_(b[: bases.b.shape[0], : bases.b.shape[1]])
    bases.a.copy_(a[:, : bases.a.shape[1]])
    piece.load_state_dict({"gamma": given["w_loramat_A"], "lambda_": given["w_loramat_B"]})
    outputs = {"y": adapted.backbone.body.fc(x), "delta_branch": piece(x)}
    (outputs["y"] * kit.group("in")["cotangent"]).sum().backward()
    return outputs, {"w_loramat_A": piece.gamma.grad, "w_loramat_B": piece.lambda_.grad}


# ---- SNELL, SNELLA ---------------------------------------------------------------------------------------------------
OFFICIAL = {"inputs": "In_Qs", "outputs": "Out_Qs", "alpha": "alpha", "gamma": "gamma", "beta": "beta"}


def load_vectors(piece, given, prefix):
    piece.load_state_dict({k: given[f"{prefix}.{OFFICIAL[k]}"] for k, _ in piece.named_parameters()}, strict=False)


def vector_gradients(piece, prefix):
    return {f"{prefix}.{OFFICIAL[k]}": p.grad for k, p in piece.named_parameters()}


def snell_layer(kit):
    """Each module alone: the official ones are the update without a base weight."""
    args, given, ins = kit.args, kit.group("param"), kit.group("in")
    rank, share = args["q_dim"], args["init_thres"]
    common = dict(targets=["fc1"])
    adapters = {
        "klora": SNELL(rank, 0.0, "official", **common),
        "snell": SNELL(rank, share, "official", **common),
        "snella": SNELLA(rank, start=share, **common),
        "mixk": SNELLA(rank, None, **common),
    }
    outputs, gradients = {}, {}
    for name, adapter in adapters.items():
        adapted = Adapted(one_linear(torch.zeros(args["out_features"], args["in_features"])))
        (piece,) = adapted.add("a", adapter).pieces.values()
        load_vectors(piece, given, name)
        y = adapted.backbone.body.fc(ins["x"])
        (y * ins["cot"]).sum().backward()
        gradients |= vector_gradients(piece, name)
        outputs |= {f"{name}.y": y, f"{name}.dense_weight": piece.kernel().T, f"{name}.sparse_weight": piece.delta().T}
    return outputs, gradients


class OneBlock(Backbone):
    """A block of timm with its sites."""

    def __init__(self, block, width, hidden):
        super().__init__()
        self.body, self.width, self.hidden = block, width, hidden

    def sites(self):
        d, h = self.width, self.hidden
        slices = [Site("attn.qkv", role, 0, d, d, rows=(n * d, (n + 1) * d)) for n, role in enumerate("qkv")]
        shapes = {"attn.proj": ("proj", d, d), "mlp.fc1": ("fc1", d, h), "mlp.fc2": ("fc2", h, d)}
        return [*slices, *(Site(path, role, 0, i, o) for path, (role, i, o) in shapes.items())]


def snell_block(kit):
    args, given, ins = kit.args, kit.group("param"), kit.group("in")
    norm = partial(nn.LayerNorm, eps=args["ln_eps"])
    block = Block(args["dim"], args["num_heads"], args["mlp_ratio"], qkv_bias=args["qkv_bias"], norm_layer=norm)
    base = {k: v for k, v in given.items() if "additional" not in k}
    for kind in ("weight", "bias") if args["qkv_bias"] else ("weight",):
        base[f"attn.qkv.{kind}"] = torch.cat([base.pop(f"attn.{role}.{kind}") for role in "qkv"])
    block.load_state_dict(base)
    adapted = Adapted(OneBlock(block, args["dim"], int(args["dim"] * args["mlp_ratio"]))).eval()
    rank, share = args["low_rank_dim"], args["init_thres"]
    made = {"snell": lambda: SNELL(rank, share, "official"), "snella": lambda: SNELLA(rank, start=share)}
    pieces = adapted.add("a", made[args["tuning_model"]]()).pieces.values()
    where = {p: ("mlp" if p.site.role.startswith("fc") else "attn") for p in pieces}
    prefix = {p: f"{where[p]}.additional_{p.site.role}.learnable" for p in pieces}
    for piece in pieces:
        load_vectors(piece, given, prefix[piece])
    y = block(ins["x"])
    (y * ins["cot"]).sum().backward()
    return {"y": y}, {k: g for p in pieces for k, g in vector_gradients(p, prefix[p]).items()}


def snella_alloc(kit):
    """The official order: the allotment of an epoch, then two updates whose values and gradients are given."""
    args, ins, outputs = kit.args, kit.group("in"), {}
    adapted = Adapted(Linears(nn.ModuleList(nn.Linear(i, o) for i, o in args["dims"])))
    schedule = dict(init_warmup=args["init_warmup"], final_warmup=args["final_warmup"], interval=args["mask_interval"])
    made = SNELLA(args["q_dim"], args["target_ratio"], args["init_thres"], targets=["fc1"], **schedule)
    adapter = adapted.add("a", made)
    pieces = list(adapter.pieces.values())
    iterations = 1 + max(int(name.split(".")[1][1:]) for name in ins)
    for step in range(args["total_step"]):
        progress = Progress(step, args["total_step"], step, args["total_step"], torch.Generator())
        adapter.on_step(progress)
        outputs[f"step{step}.thres"] = torch.tensor([p.sparsity for p in pieces])
        for iteration in range(iterations):
            for m, piece in enumerate(pieces):
                for ours in ("inputs", "outputs"):
                    prefix, vectors = f"s{step}.i{iteration}.m{m}.{OFFICIAL[ours]}", getattr(piece, ours)
                    vectors.data, vectors.grad = ins[f"{prefix}.value"], ins[f"{prefix}.grad"]
            adapter.on_update(progress)
    for m, piece in enumerate(pieces):
        for ours in ("inputs", "outputs"):
            for official, prefix in {"avg": "mean", "unc": "spread"}.items():
                outputs[f"final.m{m}.{OFFICIAL[ours]}.{official}"] = getattr(piece, f"{prefix}_{ours}")
    return outputs, {}


BUILDERS = {
    "shira": shira,
    "shira_multi": shira_multi,
    "paca": paca,
    "randlora": randlora,
    "snell_layer": snell_layer,
    "snell_block": snell_block,
    "snella_alloc": snella_alloc,
}
