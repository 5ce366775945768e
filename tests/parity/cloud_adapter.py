"""Cloud-Adapter in a whole backbone, without one, and its network for itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from visadapt.adapters._common.context_net import LinearPyramid, Perception
from visadapt.adapters.cloud_adapter import CloudAdapter
from visadapt.backbones.base import Backbone
from visadapt.backbones.timm_vit import TimmViT
from visadapt.convert.cloud_adapter import cloud_adapter_keys
from visadapt.core.adapted import Adapted
from visadapt.core.sites import Site

INTERACTIONS = {"convnext": "attention", "pmaa": "gate"}


def context_of(args):
    return "levels" if args["return_multi_feats"] else "last" if args["return_last_feature"] else "sum"


def adapter_of(args, layers=None):
    """Ours by the official arguments; their ConvNeXt has four stages whatever `depth` says."""
    gate = args["int_type"] == "pmaa"
    pmaa = args["cnn_type"] == "pmaa"
    return CloudAdapter(
        args["context_dim"],
        args["rank_dim"],
        args["depth"] if pmaa else 4,
        perception=args["cnn_type"],
        interaction=INTERACTIONS[args["int_type"]],
        context=context_of(args),
        local_groups=args["local_groups"] if gate else 1,
        global_groups=args["global_groups"] if gate else 1,
        stem=args.get("has_stem", True) or not pmaa,
        pool=pmaa and not args.get("has_block", True),
        layers=layers,
    )


class Renamed:
    """The official values in an adapter, and its gradients under their names."""

    def __init__(self, adapter, given, layers=None):
        self.adapter, self.given, self.layers = adapter, given, layers
        for key, values in self.ours(given).items():
            part = adapter.common if key == "shared" else adapter.pieces[key]
            part.load_state_dict(values)

    def ours(self, official):
        return cloud_adapter_keys(official, self.layers, self.adapter.context)

    def gradients(self):
        """The official names themselves go through the key map, to be read back."""
        found = {}
        for key, names in self.ours({name: name for name in self.given}).items():
            part = self.adapter.common if key == "shared" else self.adapter.pieces[key]
            learns = dict(part.named_parameters())
            found |= {theirs: learns[ours].grad for ours, theirs in names.items() if ours in learns}
        return found


class Silent(Backbone):
    """Blocks that hand on what they get, so that what comes out of each is the adapter behind it."""

    capabilities = frozenset({"tokens"})
    in_chans = 3

    def __init__(self, width, depth):
        super().__init__()
        self.width, self.body = width, nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))
        for linear in self.body:
            nn.init.eye_(linear.weight)

    def sites(self):
        return [Site(str(n), "block", n, self.width, self.width) for n in range(len(self.body))]


def alone(kit):
    """The modules one behind the other on given tokens."""
    args, fed = kit.args, kit.group("in")
    adapted = Adapted(Silent(args["emd_dim"], args["num_layers"]))
    adapter = adapted.add("a", adapter_of(args))
    official = Renamed(adapter, kit.group("param"))
    adapted.set_trainable("a")
    adapted.train(kit.info["eval_or_train"] == "train")
    side = round((fed["tokens"].shape[1] - 1) ** 0.5)
    adapted.ctx.begin(fed["image"], (side, side), prefix=1)
    (perception,) = adapter.sides()
    maps = perception.net(fed["image"])
    outputs = {f"cache{n}": m for n, m in enumerate(perception.joined(maps))}
    adapted.ctx.values = {f"a.{key}": value for key, value in perception(adapted.ctx).items()}
    x = fed["tokens"]
    for n, block in enumerate(adapted.backbone.body):
        outputs[f"tokens_after_{n}"] = x = block(x)
    (x * fed["cot"]).sum().backward()
    return outputs, official.gradients()


def network(kit):
    """The perception network, and what a training pass leaves in the statistics of its norms."""
    args, fed = kit.args, kit.group("in")
    sizes = (args["in_channels"], args["hidden_channels"], args["depth"])
    net = LinearPyramid(*sizes, args["has_stem"], not args["has_block"])
    perception = Perception(net, context_of(args), on_grid=False, reads={})
    block = "net.0.attn.to_q.weight"  # a file holds modules of blocks as well
    official = {f"cnn.{name}": value for name, value in kit.group("param").items()} | {block: torch.zeros(0)}
    common = nn.ModuleDict({"perception": perception})
    common.load_state_dict(cloud_adapter_keys(official)["shared"])
    perception.train(kit.info["eval_or_train"] == "train")
    maps = perception.joined(net(fed["image"]))
    sum((m * fed[f"cot{n}"]).sum() for n, m in enumerate(maps)).backward()
    names = cloud_adapter_keys({name: name for name in official})["shared"]
    names = {ours: theirs.removeprefix("cnn.") for ours, theirs in names.items()}
    outputs = {f"feat{n}": m for n, m in enumerate(maps)}
    outputs |= {f"after/{names[ours]}": value for ours, value in common.named_buffers()}
    return outputs, {names[ours]: value.grad for ours, value in common.named_parameters()}


def whole(kit):
    """A backbone with the adapter behind its blocks; the maps are resized to four strides."""
    args, fed, given = kit.args, kit.group("in"), kit.group("param")
    arch = {k: args[k] for k in ("embed_dim", "depth", "num_heads", "mlp_ratio", "img_size", "patch_size")}
    arch["init_values"] = args["init_values"]
    backbone = TimmViT("vit_small_patch14_dinov2", arch=arch, out_indices=args["out_indices"])
    layers, prefix = args["adapter_index"], "cloud_adapter."
    base = {k: v for k, v in given.items() if not k.startswith(prefix) and k != "mask_token"}
    backbone.body.load_state_dict(base)
    adapted = Adapted(backbone)
    adapter = adapted.add("a", adapter_of(args["cloud_adapter_config"], layers))
    used = (f"{prefix}cnn.", *(f"{prefix}net.{n}." for n in range(len(layers))))  # theirs may have idle modules
    official = Renamed(adapter, {k: v for k, v in given.items() if k.startswith(used)}, layers)
    adapted.set_trainable("a")
    adapted.train(kit.info["eval_or_train"] == "train")
    maps = adapted(fed["image"]).maps
    sizes = [fed[f"cot{n}"].shape[-2:] for n in range(len(maps))]
    outputs = {f"feat{n}": F.interpolate(m, s, mode="bilinear") for n, (m, s) in enumerate(zip(maps, sizes))}
    sum((outputs[f"feat{n}"] * fed[f"cot{n}"]).sum() for n in range(len(maps))).backward()
    (perception,) = adapter.sides()
    outputs["cache"] = perception.joined(perception.net(fed["image"]))[0]
    return outputs, official.gradients()


BUILDERS = {
    "cloud_adapter": whole,
    "cloud_adapter_spm": network,
    "cloud_adapter_convnext": alone,
    "cloud_adapter_pmaaint": alone,
}
