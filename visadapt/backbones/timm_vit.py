"""Every plain vision transformer of timm: ViT, DeiT, DINOv2 (with and without registers), CLIP, SigLIP, EVA, DINOv3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import timm
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..core.sites import Site
from ..errors import InputError, hint
from ..registry import BACKBONES
from .attention import TimmAttentionView, timm_attention_view
from .base import Backbone, Features
from .patch_embed import expand_patch_embed
from .weights import is_local, load_weights


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
        out_indices: blocks whose feature maps are given, negative from the end; none by default.
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
        self.out_indices = tuple(self._level(i) for i in out_indices)
        self.embed_dims = [body.embed_dim]
        self.patch = body.patch_embed.patch_size[0]
        self.mean, self.std = (self._statistic(key, given) for key, given in (("mean", mean), ("std", std)))
        rotary = getattr(body, "rope", None) is not None
        self.capabilities = frozenset({"tokens", "attention", "maps"} | (set() if rotary else {"prompts"}))

    def _create(self, in_chans: int) -> nn.Module:
        base, _, tag = self.name.partition(".")
        if not timm.is_model(base):
            raise InputError(f"timm has no model '{base}'{hint(base, timm.list_models(module='vision_transformer'))}")
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
        except TypeError as error:
            raise InputError(f"TimmViT('{self.name}') cannot be built: {error}") from error
        except (OSError, RuntimeError) as error:
            if not remote:
                raise
            raise InputError(f"weights of '{self.name}' could not be fetched by timm ({error}); give a file") from error
        if not isinstance(body, VisionTransformer | Eva):
            raise InputError(f"'{self.name}' is a {type(body).__name__}; TimmViT takes plain vision transformers")
        for block in body.blocks:
            if not hasattr(block, "drop_path1") or not hasattr(block, "attn"):
                raise InputError(
                    f"'{self.name}' has {type(block).__name__}s; TimmViT knows blocks of attention and MLP in turn"
                )
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

    def _level(self, index: int) -> int:
        if not -self.depth <= index < self.depth:
            raise InputError(f"TimmViT: out_indices has {index}; '{self.name}' has the blocks 0 to {self.depth - 1}")
        return index % self.depth

    def _statistic(self, key: str, given: Sequence[float] | None) -> tuple[float, ...]:
        own = self.body.pretrained_cfg.get(key) or (0.5, 0.5, 0.5)
        values = tuple(given) if given is not None else tuple(255 * own[i % 3] for i in range(self.in_chans))
        if len(values) != self.in_chans:
            raise InputError(f"TimmViT: {key} has {len(values)} values for {self.in_chans} bands")
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
        names = {"fc1": "fc1", "fc2": "fc2", "fc1_x": "fc1", "fc1_g": "gate", "w1": "gate", "w2": "fc1", "w3": "fc2"}
        for name, role in names.items():
            if isinstance(getattr(block.mlp, name, None), nn.Linear):
                yield from linear(f"mlp.{name}", role)
        post = type(block).__name__.endswith("PostBlock") or getattr(block, "norm_first", True) is False
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
        return self.depth + 1 if name.startswith(("norm", "fc_norm", "head", "attn_pool")) else 0

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
