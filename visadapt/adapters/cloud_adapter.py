"""A light convolutional network reads the image, and its context is given to the patches after every block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.context import Context
from ..core.kinds import Tokens
from ..core.sites import Site
from ..errors import InputError, hint
from ..registry import ADAPTERS
from ._common.context_net import ConvNeXtPyramid, LinearPyramid, Perception

HEADS, HEAD_DIM = 8, 64
"""Of the cross-attention, whatever the width of the backbone."""

CHOICES = {
    "perception": ("pmaa", "convnext"),
    "interaction": ("attention", "gate"),
    "context": ("sum", "levels", "last"),
}


def projection(dim_in: int, dim_out: int, rank: int | None) -> nn.Module:
    if rank is None:
        return nn.Linear(dim_in, dim_out, bias=False)
    return nn.Sequential(nn.Linear(dim_in, rank, bias=False), nn.Linear(rank, dim_out, bias=False))


class ContextAttention(Tokens):
    """y' = y + out(attention(q(y), k(c), v(c))) on patches y (B, h*w, D), c (B, h*w, width) being the context.

    All four projections are pairs of rank r without bias, or full ones where `rank` is None.
    """

    def __init__(self, site: Site, width: int, rank: int | None, read: int) -> None:
        super().__init__(site)
        inner = HEADS * HEAD_DIM
        self.q = projection(site.dim_out, inner, rank)
        self.k, self.v = projection(width, inner, rank), projection(width, inner, rank)
        self.out = projection(inner, site.dim_out, rank)
        self.read, self.rank = read, rank

    def forward(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        context = ctx.values[f"{self.owner}.context{self.read}"]
        mix = self._mix if self.rank is None or self.rank >= HEAD_DIM else self._mix_in_rank
        return y + mix(y, context, ctx.prefix + ctx.inserted)

    def _mix(self, y: Tensor, context: Tensor, lead: int) -> Tensor:
        """What is added to the tokens y, zero for the first `lead` ones, which are cut away where values are few."""
        projected = (self.q(y)[:, lead:], self.k(context), self.v(context))
        q, k, v = (t.unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2) for t in projected)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(F.pad(mixed, (0, 0, lead, 0)))

    def _mix_in_rank(self, y: Tensor, context: Tensor, lead: int) -> Tensor:
        """The same in heads of r channels: what lies between two first factors is multiplied out, (r, r) per head.

        Scores are y A_q (B_q B_k^T)_h (c A_k)^T, and head h gives softmax(scores / 8) (c A_v) (B_v A_out)_h B_out.
        """
        b_q, b_k, b_v = (f[1].weight.unflatten(0, (HEADS, HEAD_DIM)) for f in (self.q, self.k, self.v))
        between = torch.einsum("hdr,hds->hsr", b_q, b_k).flatten(0, 1)
        back = torch.einsum("ohd,hdr->ohr", self.out[0].weight.unflatten(1, (HEADS, HEAD_DIM)), b_v).flatten(1)
        q = F.linear(self.q[0](y)[:, lead:], between).unflatten(2, (HEADS, -1)).transpose(1, 2)
        k, v = (f[0](context)[:, None].expand(-1, HEADS, -1, -1) for f in (self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, scale=HEAD_DIM**-0.5)
        mixed = F.linear(mixed.transpose(1, 2).flatten(2), back)
        return self.out[1](F.pad(mixed, (0, 0, lead, 0)))


class ContextGate(Tokens):
    """y' = local(y) * sigmoid(gate(c)) + shift(c) on the patch map y (B, D, h, w); c is the map of the context.

    Each of the three is a 1 x 1 convolution without bias and a batch norm. What comes from c is resized to the grid
    with its nearest values. There is no residual sum.
    """

    def __init__(self, site: Site, width: int, local_groups: int, global_groups: int, read: int) -> None:
        super().__init__(site)

        def conv_norm(dim: int, groups: int) -> nn.Sequential:
            conv = nn.Conv2d(dim, site.dim_out, 1, groups=groups, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(site.dim_out))

        self.local = conv_norm(site.dim_out, local_groups)
        self.gate, self.shift = conv_norm(width, global_groups), conv_norm(width, global_groups)
        self.read = read

    def forward(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        lead, patches = ctx.split(y)
        context, mark = ctx.values[f"{self.owner}.context{self.read}"], f"{self.owner}/{self.site.key}/ran"
        again = ctx.values.get(mark, False)  # under gradient checkpointing; running statistics count an image once
        ctx.values[mark] = True

        def run(part: nn.Sequential, given: Tensor) -> Tensor:
            conv, norm = part
            if not (again and norm.training):
                return norm(conv(given))
            statistics = (norm.running_mean.clone(), norm.running_var.clone())
            return F.batch_norm(conv(given), *statistics, norm.weight, norm.bias, training=True, eps=norm.eps)

        gate = F.interpolate(run(self.gate, context).sigmoid(), ctx.grid, mode="nearest")
        shift = F.interpolate(run(self.shift, context), ctx.grid, mode="nearest")
        new = run(self.local, patches.mT.unflatten(2, ctx.grid)) * gate + shift
        return torch.cat([lead, new.flatten(2).mT.to(lead.dtype)], 1)


@ADAPTERS.register_module()
class CloudAdapter(Adapter):
    """A convolutional network perceives the image once; after every block patches attend to what it gives.

    For a patch map y behind a block and the context c, resized to the same grid: y + softmax(q(y) k(c)^T / 8) v(c) out
    in 8 heads of 64 channels, all projections of low rank and without bias. Nothing starts at zero, so a fresh adapter
    changes the output. Class, register and prompt tokens pass as they are.

    The details are those of the authors' code: the network "pmaa" has no activation at all, and its 3 x 3 convolutions,
    called depthwise there, are full ones. With rank r, width w and D channels a block takes 2 r (D + w + 1024)
    parameters. Batch norms learn from batches in training and are stored with the adapter.

    `context` "levels" gives block number l of n adapted blocks the map l // (n // 4), at most the last one; with fewer
    than four blocks it is map l. Maps that no block reads are not computed. Not taken over from the code: contexts that
    are joined to the feature maps for the head (`has_cat`), and no interaction at all, which are off in the paper.

    Args:
        width: channels of the context.
        rank: of the projections of "attention"; full ones where None.
        depth: times that the network halves the image.
        perception: "pmaa", a pyramid of 3 x 3 convolutions, or "convnext", one of ConvNeXt blocks (the code's
            cnn_type).
        interaction: "attention", or "gate", which replaces patches by local(y) * sigmoid(gate(c)) + shift(c) (the
            code's int_type "convnext" and "pmaa").
        context: "sum" of all maps, pooled to the size of the last; the "last" map; or "levels", early blocks reading
            finer maps than late ones (the code's return_last_feature and return_multi_feats).
        local_groups: groups of the convolution on patches, of "gate".
        global_groups: groups of those on the context, of "gate".
        stem: a unit at full resolution, of "pmaa".
        pool: halve by 2 x 2 max pooling in place of convolutions, of "pmaa".
        layers: indices of the adapted blocks; all where None.
    """

    kinds = ("side", "tokens")
    targets = ("block",)
    roles = ("block",)
    needs = frozenset({"tokens"})
    identity_at_init = False
    zero_grad = ("norm1.bias",)  # a batch norm follows that takes it away
    paper = (
        "Adapting Vision Foundation Models for Robust Cloud Segmentation in Remote Sensing Images (Zou et al., 2024), "
        "arXiv 2411.13127"
    )

    def __init__(
        self,
        width: int = 64,
        rank: int | None = 16,
        depth: int = 4,
        perception: str = "pmaa",
        interaction: str = "attention",
        context: str = "sum",
        local_groups: int = 1,
        global_groups: int = 1,
        stem: bool = True,
        pool: bool = False,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(layers=layers)
        self.require_positive(width=width, depth=depth, local_groups=local_groups, global_groups=global_groups)
        self.require_positive(rank=1 if rank is None else rank)
        given = {"perception": perception, "interaction": interaction, "context": context}
        for name, value in given.items():
            if value not in CHOICES[name]:
                raise InputError(f"CloudAdapter: unknown {name} '{value}'{hint(value, CHOICES[name])}")
        if perception != "pmaa" and (not stem or pool):
            raise InputError("CloudAdapter: stem and pool are options of perception='pmaa'")
        if interaction != "gate" and (local_groups, global_groups) != (1, 1):
            raise InputError("CloudAdapter: local_groups and global_groups are options of interaction='gate'")
        if width % global_groups:
            raise InputError(f"CloudAdapter: width {width} does not split into global_groups={global_groups}")
        self.width, self.rank, self.depth = width, rank, depth
        self.perception, self.interaction, self.context = perception, interaction, context
        self.local_groups, self.global_groups, self.stem, self.pool = local_groups, global_groups, stem, pool

    def shared(self, sites: list[Site], backbone) -> nn.ModuleDict:
        depth, reads = self.depth, dict.fromkeys((s.key for s in sites), 0)
        if self.context == "levels":
            reads = {s.key: min(n // max(len(sites) // 4, 1), depth - 1) for n, s in enumerate(sites)}
            depth = max(reads.values()) + 1
        if self.perception == "pmaa":
            net = LinearPyramid(backbone.in_chans, self.width, depth, self.stem, self.pool)
        else:
            net = ConvNeXtPyramid(backbone.in_chans, self.width, depth, only_last=self.context == "last")
        return nn.ModuleDict({"perception": Perception(net, self.context, self.interaction == "attention", reads)})

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> Tokens:
        read = shared["perception"].reads[site.key]
        if self.interaction == "attention":
            return ContextAttention(site, self.width, self.rank, read)
        for groups in (self.local_groups, self.global_groups):
            if site.dim_out % groups:
                raise InputError(
                    f"CloudAdapter: the {site.dim_out} channels of the backbone do not split into {groups}"
                )
        return ContextGate(site, self.width, self.local_groups, self.global_groups, read)
