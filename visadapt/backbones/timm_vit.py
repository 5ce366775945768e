"""Every plain vision transformer of timm: ViT, DeiT, DINOv2 (with and without registers), CLIP, SigLIP, EVA, DINOv3."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from textwrap import shorten
from typing import Any

import timm
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.eva import Eva, EvaBlockPostNorm
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn

from ..core.sites import Site
from ..errors import InputError, hint
from ..registry import BACKBONES
from .attention import TimmAttentionView, has_attention_view, timm_attention_view
from .base import Backbone, Features
from .patch_embed import BAND_MODES, expand_patch_embed
from .weights import is_local, load_weights

MODULES = ("vision_transformer", "deit", "eva")
"""Files of timm with plain vision transformers."""

MISTAKES = (TypeError, ValueError, AssertionError, ArithmeticError, LookupError, RuntimeError, OSError)
"""What timm and torch raise for arguments that make no sense and for weights that cannot be had."""


@BACKBONES.register_module()
class TimmViT(Backbone):
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
        arch: constructor arguments of timm that change the architecture, e.g. dict(depth=2, embed_dim=48).
    """

    def __init__(
        self,
        name: str,
        weights: str | None = None,
        in_chans: int = 3,
        bands: str = "repeat",
        out_indices: Sequence[int] = (),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        arch: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(in_chans, int) or in_chans < 1:
            raise InputError(f"TimmViT: in_chans must be a whole number of at least 1, got {in_chans!r}")
        if bands not in BAND_MODES:
            raise InputError(f"TimmViT: unknown bands '{bands}'{hint(bands, BAND_MODES)}")
        self.name, self.weights, self.in_chans, self.bands = name, weights, in_chans, bands
        self.arch = dict(arch or {})
        local = weights is None or is_local(weights)
        self.body = self._create(in_chans if local else 3)
        if weights is not None and local:
            self.weight_report = load_weights(self.body, weights, bands)
        elif in_chans != 3 and not local:
            self._widen()
        body = self.body
        self.depth, self.prefix = len(body.blocks), body.num_prefix_tokens
        self.out_indices = self._levels(out_indices)
        self.embed_dims = [body.embed_dim] * max(1, len(self.out_indices))
        self.patch = body.patch_embed.patch_size[0]
        self.mean, self.std = (self._statistic(key, given) for key, given in (("mean", mean), ("std", std)))
        viewed = all(has_attention_view(block.attn) for block in body.blocks)
        rotary = getattr(body, "rope", None) is not None
        self.capabilities = frozenset({"tokens", "maps", *["attention"] * viewed, *["prompts"] * (not rotary)})

    def _create(self, in_chans: int) -> nn.Module:
        base, _, tag = self.name.partition(".")
        if not timm.is_model(base):
            raise InputError(f"timm has no model '{base}'{hint(base, _plain_models())}")
        remote = self.weights is not None and not is_local(self.weights)
        if remote and not (self.weights == "timm" or self.weights.startswith("timm:")):
            raise InputError(
                f"TimmViT weights '{self.weights}': no such file, nor 'timm', 'timm:<tag>' or 'dinov2_vits14_focus'"
            )
        if remote and self.weights != "timm":
            tag = self.weights.removeprefix("timm:")
        try:
            body = timm.create_model(
                f"{base}.{tag}" if tag else base,
                pretrained=remote,
                num_classes=0,
                in_chans=in_chans,
                dynamic_img_size=True,
                **self.arch,
            )
        except MISTAKES as error:
            reason = shorten(str(error), 200).rstrip(".") or type(error).__name__
            if remote and isinstance(error, OSError):
                message = f"weights of '{self.name}' could not be fetched by timm ({reason}); give a file"
            elif isinstance(error, TypeError) and base not in _plain_models():  # it takes no dynamic_img_size
                message = f"'{self.name}' is none of the plain vision transformers that TimmViT takes ({reason})"
            else:
                message = f"TimmViT('{self.name}', weights={self.weights!r}) cannot be built: {reason}; see also arch"
            raise InputError(message) from error
        _require_plain(self.name, body)
        for block in body.blocks:
            if getattr(block.attn, "q_bias", None) is not None:
                block.attn.qkv_bias_separate = True  # or EVA reads qkv.weight itself and the linear is never called
        return body

    def _widen(self) -> None:
        old = self.body.patch_embed.proj
        new = nn.Conv2d(self.in_chans, old.out_channels, old.kernel_size, old.stride, bias=old.bias is not None)
        new.weight.data = expand_patch_embed(old.weight.data, self.in_chans, self.bands)
        if old.bias is not None:
            new.bias = old.bias
        self.body.patch_embed.proj = new

    def _levels(self, indices: Sequence[int]) -> tuple[int, ...]:
        for index in indices:
            if not -self.depth <= index < self.depth:
                raise InputError(
                    f"TimmViT: out_indices has {index}; '{self.name}' has the blocks 0 to {self.depth - 1}"
                )
        levels = tuple(index % self.depth for index in indices)
        if list(levels) != sorted(set(levels)):
            raise InputError(f"TimmViT: out_indices must name each block once, shallow to deep, got {list(indices)}")
        return levels

    def _statistic(self, key: str, given: Sequence[float] | None) -> tuple[float, ...]:
        own = self.body.pretrained_cfg.get(key) or (0.5, 0.5, 0.5)
        values = tuple(given) if given is not None else tuple(255 * own[i % 3] for i in range(self.in_chans))
        if len(values) != self.in_chans:
            raise InputError(f"TimmViT: {key} has {len(values)} values for {self.in_chans} bands")
        if not all(math.isfinite(v) for v in values) or (key == "std" and min(values) <= 0):
            raise InputError(f"TimmViT: {key} must be finite{' and above 0' * (key == 'std')}, got {list(values)}")
        return values

    def sites(self) -> list[Site]:
        d, conv = self.embed_dims[-1], self.body.patch_embed.proj
        found = [Site("patch_embed.proj", "patch", -1, conv.in_channels, conv.out_channels, layout="NCHW")]
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

    def attention(self, path: str) -> TimmAttentionView:
        return timm_attention_view(self.body.get_submodule(path), path)

    def layer_id(self, name: str) -> int:
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return self.depth + 1 if name.split(".")[0] in ("norm", "fc_norm", "head", "attn_pool") else 0

    def grid(self, x: Tensor) -> tuple[int, int]:
        """Patch rows and columns of a batch (B, C, H, W) after padding."""
        return -(-x.shape[-2] // self.patch), -(-x.shape[-1] // self.patch)

    def pad(self, x: Tensor) -> Tensor:
        """The batch with sides that are multiples of the patch; padding is 0, the mean colour of normalised images."""
        h, w = self.grid(x)
        bottom, right = h * self.patch - x.shape[-2], w * self.patch - x.shape[-1]
        return F.pad(x, (0, right, 0, bottom)) if bottom or right else x

    def forward(self, x: Tensor) -> Features:
        """(B, C, H, W) normalised images to features.

        Raises:
            InputError: another number of bands than the backbone was built for.
        """
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise InputError(f"TimmViT takes (B, {self.in_chans}, H, W) images, got {tuple(x.shape)}; see in_chans")
        x = self.pad(x)
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


def _plain_models() -> list[str]:
    return [name for module in MODULES for name in timm.list_models(module=module)]


def _require_plain(name: str, body: nn.Module) -> None:
    """Refuse what is built in another way than sites, grid and features say."""
    if not isinstance(body, VisionTransformer | Eva):
        raise InputError(f"'{name}' is a {type(body).__name__}; TimmViT takes plain vision transformers")
    embed = body.patch_embed
    if not isinstance(embed, PatchEmbed):
        raise InputError(
            f"'{name}' has a {type(embed).__name__} before its blocks; TimmViT takes one patch convolution"
        )
    rows, cols = embed.patch_size
    if rows != cols or min(embed.grid_size) < 1:
        raise InputError(
            f"'{name}' has patches of {rows}x{cols} in images of {embed.img_size[0]}x{embed.img_size[1]}; TimmViT takes"
            " square patches and at least one per image"
        )
    for block in body.blocks:
        if not hasattr(block, "drop_path1") or not hasattr(block, "attn"):
            raise InputError(f"'{name}' has {type(block).__name__}s; TimmViT knows blocks of attention and MLP in turn")
    if not body.global_pool:
        raise InputError(f"'{name}' has no pooling and so no vector per image; set global_pool in arch, e.g. to 'avg'")
