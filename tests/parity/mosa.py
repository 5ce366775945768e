"""MoSA's block and its loss."""

from __future__ import annotations

import torch

from visadapt.adapters.mosa import MoSA, owners
from visadapt.backbones.timm_vit import TimmViT
from visadapt.core.adapted import Adapted
from visadapt.losses.consistency import Consistency, symmetric_kl

PROJECTIONS, LEAVES = ("down", "up"), ("weight", "bias")


def official(given, name, place):
    """The official name of one of our parts; the Houlsby style has two of each and names their place as well."""
    stems = [key.partition(".")[0] for key in given if key.startswith("adapter_")]
    found = {stem for stem in stems if name in stem.split("_") and "merge" not in stem}
    return found.pop() if len(found) == 1 else next(stem for stem in found if place in stem.split("_"))


def attached(kit, merge):
    """One block with the kit's values, the adapter in it, and its pieces by their place."""
    args, given, style = kit.args, kit.group("param"), kit.args["style"].lower()
    arch = dict(depth=1, embed_dim=args["hidden_size"], num_heads=args["num_heads"], img_size=32)
    arch["mlp_ratio"] = args["mlp_dim"] / args["hidden_size"]
    adapted = Adapted(TimmViT("vit_base_patch16_224", arch=arch))
    adapter = MoSA(
        args["bottleneck"],
        args["experts"],
        style=style,
        share=args["share"],
        merge=merge,
        scale=args["scalar"] if style == "adaptformer" else None,
        dropout=args["dropout"],
        split_bias=not args["bias_mask_all_ones"],
        variant="official",
    )
    adapted.add("a", adapter)
    adapted.set_trainable("a")
    names = {"norm1": "attention_norm", "norm2": "ffn_norm", "attn.proj": "attn.out", "mlp.fc1": "ffn.fc1"}
    names["mlp.fc2"] = "ffn.fc2"
    base = {f"{ours}.{leaf}": given[f"{theirs}.{leaf}"] for ours, theirs in names.items() for leaf in LEAVES}
    for leaf in LEAVES:
        base[f"attn.qkv.{leaf}"] = torch.cat([given[f"attn.{part}.{leaf}"] for part in ("query", "key", "value")])
    adapted.backbone.body.blocks[0].load_state_dict(base)
    places = {"ffn" if piece.site.role == "mlp_res" else "attn": piece for piece in adapter.pieces.values()}
    for place, piece in places.items():
        if style != "houlsby":
            piece.norm.load_state_dict({leaf: given[f"adapter_norm.{leaf}"] for leaf in LEAVES})
        for name in PROJECTIONS:
            part, theirs = getattr(piece, name), official(given, name, place)
            for leaf in LEAVES:
                getattr(part, leaf).data.copy_(values(given, theirs, leaf, len(part.weight)))
                if (score := kit.group("in").get(f"score.{theirs}.{leaf}")) is not None:
                    getattr(part, f"{leaf}_owner").copy_(owners(score, args["experts"]))
    return adapted, places


def values(given, theirs, leaf, count):
    """All experts of a projection, or the one of a shared projection."""
    names = [f"{theirs}.{leaf}"] if count == 1 else [f"{theirs}.{n}.{leaf}" for n in range(count)]
    return torch.stack([given[name] for name in names])


def mosa(kit):
    """A training pass with given draws, the masks, and both merges with an evaluation each."""
    given, fed, outputs, gradients = kit.group("param"), kit.group("in"), {}, {}
    for merge in ("add", "joint"):
        adapted, places = attached(kit, merge)
        outputs[f"y_eval_{merge}"] = adapted.eval().backbone.body.blocks[0](fed["x"])
        for place, piece in places.items():
            for name in PROJECTIONS:
                merged = zip(LEAVES, getattr(piece, name).merged())
                theirs = official(given, name, place)
                outputs |= {f"{merge}.{theirs}_merge.{leaf}": value for leaf, value in merged}
    draws = iter(kit.args["expert_draws"])
    for place in ("attn", "ffn"):
        for name in PROJECTIONS if place in places else ():
            part, draw = getattr(places[place], name), next(draws)
            part.drawn.fill_(draw if len(part.weight) > 1 else 0)
    outputs["y_train"] = adapted.train().backbone.body.blocks[0](fed["x"])
    (outputs["y_train"] * fed["cot"]).sum().backward()
    for place, piece in places.items():
        if kit.args["style"] != "Houlsby":
            gradients |= {f"adapter_norm.{leaf}": getattr(piece.norm, leaf).grad for leaf in LEAVES}
        for name in PROJECTIONS:
            part, theirs = getattr(piece, name), official(given, name, place)
            for leaf, mask in zip(LEAVES, part.masks()):
                gradient = getattr(part, leaf).grad
                gradients |= {f"{theirs}.{n}.{leaf}": g for n, g in enumerate(gradient)}
                gradients[f"{theirs}.{leaf}"] = gradient[0]
                outputs |= {f"mask.{theirs}.{leaf}.{n}": m.float() for n, m in enumerate(mask)}
    return outputs, gradients


def mosa_loss(kit):
    fed = kit.group("in")
    first, second = (fed[name].requires_grad_() for name in ("logits1", "logits2"))
    criterion = Consistency(weight=kit.args["reg_weight"], second=kit.args["add_weight"])
    target = fed["targets"].long()
    outputs = {"ce": criterion.loss(first, target), "sym_kl": symmetric_kl(first, second)}
    outputs["total"] = criterion(torch.cat([first, second]), target)
    outputs["total"].backward()
    return outputs, {"logits1": first.grad, "logits2": second.grad}


BUILDERS = {"mosa": mosa, "mosa_loss": mosa_loss}
