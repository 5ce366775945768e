"""Every plain vision transformer of timm: ViT, DeiT, DINOv2 (with and without registers), CLIP, SigLIP, EVA, DINOv3."""

from __future__ import annotations

from collections.abc import Iterator

from timm.layers import PatchEmbed
from timm.models.eva import Eva, EvaBlockPostNorm
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn

from ..core.sites import Site
from ..errors import InputError
from ..registry import BACKBONES
from .attention import TimmAttentionView, has_attention_view, timm_attention_view
from .base import Features
from .timm_model import TimmModel
from .weights import FOCUS


@BACKBONES.register_module()
class TimmViT(TimmModel):
    """A plain ViT of timm for images of any size and any number of bands.

    Position embeddings are resampled to the image at hand as timm does; images whose sides are no multiple of the patch
    are padded at the right and bottom with the mean colour.

    Args:
        name: timm model name, e.g. "vit_small_patch14_dinov2".
        weights: None for random weights, "timm" for timm's hub, "timm:<tag>" for one of its tags, a file (timm, DINOv2
            and CLIP layouts are recognised), or "dinov2_vits14_focus", the offline ViT-S/14 of the `weights` extra.
        in_chans: bands of the input.
        bands: how the patch embedding is widened to other bands: repeat, mean or zero.
        out_indices: blocks whose feature maps are given, shallow to deep, negative from the end; none by default. Maps
            are the blocks' outputs, before the final norm.
        mean: per band on the 0..255 scale; the model's own, repeated over the bands, where None.
        std: likewise.
        arch: constructor arguments of timm that change the architecture, e.g. dict(depth=2, embed_dim=48). With a
            `patch_size` the patch embedding of a weights file is resampled to it, where it has another.
    """

    sources = ("vision_transformer", "deit", "eva")
    family = "plain vision transformers"
    options = {"dynamic_img_size": True}
    own_weights = (FOCUS,)

    def check(self, body: nn.Module) -> None:
        if not isinstance(body, VisionTransformer | Eva):
            raise InputError(f"'{self.name}' is a {type(body).__name__}; TimmViT takes {self.family}")
        embed = body.patch_embed
        if not isinstance(embed, PatchEmbed):
            raise InputError(
                f"'{self.name}' has a {type(embed).__name__} before its blocks; TimmViT takes one patch convolution"
            )
        rows, cols = embed.patch_size
        if rows != cols or min(embed.grid_size) < 1:
            raise InputError(
                f"'{self.name}' has patches of {rows}x{cols} in images of {embed.img_size[0]}x{embed.img_size[1]}; "
                "TimmViT takes square patches and at least one per image"
            )
        for block in body.blocks:
            if not hasattr(block, "drop_path1") or not hasattr(block, "attn"):
                raise InputError(
                    f"'{self.name}' has {type(block).__name__}s; TimmViT knows blocks of attention and MLP in turn"
                )
            if getattr(block.attn, "q_bias", None) is not None:
                block.attn.qkv_bias_separate = True  # or EVA reads qkv.weight itself and the linear is never called
        if not body.global_pool:
            raise InputError(
                f"'{self.name}' has no pooling and so no vector per image; set global_pool in arch, e.g. to 'avg'"
            )

    def levels(self) -> list[tuple[int, int]]:
        return [(self.body.embed_dim, self.body.patch_embed.patch_size[0])] * self.depth

    @property
    def depth(self) -> int:
        return len(self.body.blocks)

    @property
    def prefix(self) -> int:
        return self.body.num_prefix_tokens

    @property
    def capabilities(self) -> frozenset[str]:
        viewed = all(has_attention_view(block.attn) for block in self.body.blocks)
        rotary = getattr(self.body, "rope", None) is not None
        return frozenset({"tokens", "maps", *["attention"] * viewed, *["prompts"] * (not rotary)})

    def sites(self) -> list[Site]:
        d, conv = self.embed_dims[-1], self.body.patch_embed.proj
        found = [
            Site("patch_embed.proj", "patch", -1, conv.in_channels, conv.out_channels, layout="NCHW"),
            Site("norm_pre", "stem", -1, d, d),  # all tokens with their positions, on their way to the first block
        ]
        for i, block in enumerate(self.body.blocks):
            found += self._block_sites(i, block, f"blocks.{i}", d)
        for name in ("norm", "fc_norm"):
            if isinstance(getattr(self.body, name, None), nn.LayerNorm):
                found.append(Site(name, "norm", -1, d, d))
                break
        return found

    def _block_sites(self, i: int, block: nn.Module, path: str, d: int) -> Iterator[Site]:
        def linear(name: str, role: str) -> Iterator[Site]:
            module = block.get_submodule(name)
            yield Site(f"{path}.{name}", role, i, module.in_features, module.out_features)

        attn = block.attn
        if getattr(attn, "qkv", None) is not None:
            yield from linear("attn.qkv", "qkv")
            width = attn.qkv.out_features // 3
            for n, role in enumerate("qkv"):
                yield Site(f"{path}.attn.qkv", role, i, d, width, rows=(n * width, (n + 1) * width))
        else:
            for role in "qkv":
                yield from linear(f"attn.{role}_proj", role)
        yield from linear("attn.proj", "proj")
        for name, role in {"fc1": "fc1", "fc1_x": "fc1", "fc1_g": "gate", "fc2": "fc2"}.items():
            if isinstance(getattr(block.mlp, name, None), nn.Linear):
                yield from linear(f"mlp.{name}", role)
        post = isinstance(block, ResPostBlock | EvaBlockPostNorm)
        for n, sub in ((1, "attn"), (2, "mlp")):
            yield Site(f"{path}.{sub}", sub, i, d, d)
            source = f"{path}.{sub}" if post else f"{path}.norm{n}"
            yield Site(f"{path}.drop_path{n}", f"{sub}_res", i, d, d, source=source)
            if isinstance(block.get_submodule(f"norm{n}"), nn.LayerNorm):
                yield Site(f"{path}.norm{n}", f"norm{n}", i, d, d)
        yield Site(path, "block", i, d, d)

    def blocks(self) -> list[nn.Module]:
        return list(self.body.blocks)

    def attention(self, path: str) -> TimmAttentionView:
        return timm_attention_view(self.body.get_submodule(path), path)

    def layer_id(self, name: str) -> int:
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return self.depth + 1 if name.split(".")[0] in ("norm", "fc_norm", "head", "attn_pool") else 0

    def forward(self, x: Tensor) -> Features:
        """(B, C, H, W) normalised images to features.

        Raises:
            InputError: another number of bands than the backbone was built for.
        """
        x = self.ready(x)
        h, w = self.grid(x)
        stream, levels = self.body.forward_intermediates(x, indices=list(self.out_indices) or 1, output_fmt="NLC")
        inserted = self.ctx.inserted  # shallow prompts are still between prefix and patches
        if inserted:
            stream = self._without_prompts(stream, inserted)
            levels = [level[:, level.shape[1] - h * w :] for level in levels]
        maps = [level.mT.unflatten(2, (h, w)).contiguous() for level in levels] if self.out_indices else []
        cls = stream[:, 0] if getattr(self.body, "cls_token", None) is not None else None
        native = self.body.forward_head(stream, pre_logits=True)
        return Features(stream[:, self.prefix :], (h, w), cls, native, maps)

    def _without_prompts(self, x: Tensor, count: int) -> Tensor:
        keep = list(range(self.prefix)) + list(range(self.prefix + count, x.shape[1]))
        return x[:, keep]
