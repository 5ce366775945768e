"""BLIP: a vision transformer, and a text decoder that looks at its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor, nn

from ..core.sites import Site
from ..errors import InputError
from ..registry import BACKBONES, mistyped_arguments, unknown_arguments
from ._blip_text import Attention, AttentionView, TextDecoder
from .attention import TimmAttentionView
from .base import Backbone, Features
from .timm_vit import TimmViT
from .weights import load_weights

PROMPT = (30522, 1037, 3861, 1997)
"""The begin token and "a picture of" in BLIP's vocabulary, with which its authors start captions."""

VISION = "vision."

TEXT_ROLES = {f"{sub}.{name}": sub[:-4] + name for sub in ("attn", "xattn") for name in ("q", "k", "v", "proj")}
TEXT_ROLES |= {"mlp.fc1": "fc1", "mlp.fc2": "fc2", "attn": "attn", "xattn": "xattn", "mlp": "mlp"}
TEXT_ROLES |= {"norm1": "norm1", "xnorm": "norm1", "norm2": "norm2"}
"""Roles of the modules in a block of the decoder."""


class BlipBody(nn.Module):
    """Both networks."""

    def __init__(self, vision: nn.Module, text: TextDecoder) -> None:
        super().__init__()
        self.vision, self.text = vision, text

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.vision.set_grad_checkpointing(enable)
        self.text.saving = enable


@BACKBONES.register_module()
class Blip(Backbone):
    """BLIP with its text decoder, for features of images, scores of texts and captions.

    As features of an image, tokens and class token are those of the vision transformer; the pooled vector (`native`) is
    what the decoder compares the words with to find the next one after the `prompt`, so that it depends on both parts.
    Sites of the vision transformer are those of `TimmViT`, with "vision." before their paths. Those of the decoder
    (post-norm BERT) have paths that begin with "text." and are of the part "text"; layers count from 0 in both. A role
    names sites of both parts, a path such as "text.*.xattn" those of one. Layer-wise learning rates and `layers` of
    FullFineTune take the decoder as lying beyond the blocks.

    `logits` and `generate` run whatever is attached. Adapters with side networks need `adapted.begin(images)` for
    `images`.

    Args:
        vision: timm name of the vision transformer.
        weights: None for random weights, or a file of BLIP (its authors' or Hugging Face's layout, or these names).
        arch: constructor arguments of timm that change the vision transformer, e.g. dict(img_size=384).
        text: sizes of the decoder: layers, width, heads, vocab, hidden, positions.
        prompt: words after which `native` is taken, at least two.

    """

    tower: TimmViT  # the vision transformer as a backbone of its own

    def __init__(
        self,
        vision: str = "vit_base_patch16_224",
        weights: str | None = None,
        arch: dict[str, Any] | None = None,
        text: dict[str, int] | None = None,
        prompt: Sequence[int] = PROMPT,
    ) -> None:
        super().__init__()
        self.vision, self.weights, self.prompt = vision, weights, tuple(prompt)
        self.arch, self.text = dict(arch or {}), dict(text or {})
        for problem in [*unknown_arguments(TextDecoder, self.text), *mistyped_arguments(TextDecoder, self.text)]:
            raise InputError(f"Blip: text: {problem}")
        if "image_width" in self.text:
            raise InputError("Blip: text: image_width is that of the vision transformer; leave it out")
        mean, std = ([255 * value for value in values] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        tower = TimmViT(vision, mean=mean, std=std, arch=self.arch)
        tower.ctx = self.ctx
        self.__dict__["tower"] = tower  # not among the modules, or its parameters would be there twice
        self.embed_dims, self.depth = tower.embed_dims, tower.depth
        self.patch, self.prefix, self.in_chans = tower.patch, tower.prefix, tower.in_chans
        self.mean, self.std = tower.mean, tower.std
        self.capabilities = tower.capabilities - {"maps"}
        self.body = BlipBody(tower.body, TextDecoder(tower.embed_dims[-1], **self.text))
        if len(self.prompt) < 2:  # a single word has no other to attend to
            raise InputError(f"Blip: prompt must have at least 2 words, got {list(self.prompt)}")
        ids = torch.tensor([self.prompt], device="cpu")
        self._check(ids, 1)
        self.register_buffer("prompt_ids", ids.to(self.body.text.bias.device), persistent=False)
        if weights is not None:
            self.weight_report = load_weights(self.body, weights)

    def grid(self, x: Tensor) -> tuple[int, int]:
        return self.tower.grid(x)

    def pad(self, x: Tensor) -> Tensor:
        return self.tower.pad(x)

    def pooled_dim(self, kind: str) -> int:
        return self.body.text.words.embedding_dim if kind == "native" else super().pooled_dim(kind)

    def layer_id(self, name: str) -> int:
        return self.tower.layer_id(name.removeprefix(VISION)) if name.startswith(VISION) else self.depth + 1

    def sites(self) -> list[Site]:
        found = [
            replace(site, path=VISION + site.path, source=site.source and VISION + site.source)
            for site in self.tower.sites()
        ]
        d = self.body.text.words.embedding_dim
        found.append(Site("text.norm", "norm", -1, d, d, part="text"))
        for i in range(len(self.body.text.blocks)):
            found += self._text_sites(i, f"text.blocks.{i}", d)
        return found

    def _text_sites(self, i: int, path: str, d: int) -> Iterator[Site]:
        for name, role in TEXT_ROLES.items():
            module = self.body.get_submodule(f"{path}.{name}")
            dim_in, dim_out = (getattr(module, side, d) for side in ("in_features", "out_features"))
            yield Site(f"{path}.{name}", role, i, dim_in, dim_out, part="text", n=int(name == "xnorm"))
        yield Site(path, "block", i, d, d, part="text")

    def attention(self, path: str) -> TimmAttentionView | AttentionView:
        if path.startswith(VISION):
            return self.tower.attention(path.removeprefix(VISION))
        module = self.body.get_submodule(path)
        if not isinstance(module, Attention):
            raise InputError(f"{path}: no attention view for {type(module).__name__}")
        return AttentionView(module)

    def forward(self, x: Tensor) -> Features:
        """(B, C, H, W) normalised images to features."""
        features = self.tower(x)
        text = self.body.text
        hidden = text(self.prompt_ids.expand(len(x), -1), self._tokens(features))
        return replace(features, native=text.answers(hidden[:, -1]))

    def logits(self, images: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scores (B, L, vocab) of the word after each word, the whole text in one pass.

        Args:
            images: (B, C, H, W), normalised.
            ids: (B, L) int64, one text per image.
            mask: (B, L) bool, False for padding, which nothing attends to; a text begins with a word.

        Raises:
            InputError: words that are unknown or too many, or a mask that does not fit.
        """
        self._check(ids, len(images), mask)
        return self.body.text.scores(self.body.text(ids, self._seen(images), mask))

    @torch.no_grad()
    def generate(
        self, images: Tensor, ids: Tensor, max_new: int, cached: bool = True, end: int | None = None
    ) -> Tensor:
        """The most probable next word, again and again: (B, L + n) words, n <= max_new.

        Args:
            images: (B, C, H, W), normalised.
            ids: (B, L) int64, how the texts begin, without padding.
            max_new: words to add.
            cached: keep keys and values; else every word is found by a pass over the whole text.
            end: the word that ends a text and fills it up behind; all texts get `max_new` words where None.

        Raises:
            InputError: likewise.
        """
        self._check(ids, len(images), more=max_new)
        text, image = self.body.text, self._seen(images)
        cache = text.cache() if cached else None
        new, done = ids, torch.zeros_like(ids[:, :1], dtype=torch.bool)
        for _ in range(max_new):
            hidden = text(new if cached else ids, image, cache=cache)
            new = text.scores(hidden[:, -1:]).argmax(-1)
            if end is not None:
                new = new.masked_fill(done, end)
                done = new == end
            ids = torch.cat([ids, new], 1)
            if end is not None and done.all():
                break
        return ids

    def _seen(self, images: Tensor) -> Tensor:
        """Image tokens (B, N, D) for the decoder."""
        x = self.pad(images)
        if self.ctx.image is not x:  # or pieces would look at the image of an earlier pass
            self.ctx.begin(x, self.grid(x), self.prefix)
        return self._tokens(self.tower(x))

    @staticmethod
    def _tokens(features: Features) -> Tensor:
        return features.tokens if features.cls is None else torch.cat([features.cls[:, None], features.tokens], 1)

    def _check(self, ids: Tensor, images: int, mask: Tensor | None = None, more: int = 0) -> None:
        words, longest = self.body.text.words.num_embeddings, self.body.text.positions.num_embeddings
        if ids.ndim != 2 or ids.shape[0] != images or not ids.shape[1] or ids.dtype != torch.int64:
            given = f"{list(ids.shape)} of {str(ids.dtype).removeprefix('torch.')}"
            raise InputError(f"Blip: {images} images need words of shape [{images}, L] of int64, got {given}")
        if ids.shape[1] + more > longest:
            raise InputError(f"Blip: texts of {ids.shape[1] + more} words; the decoder has {longest} positions")
        if mask is not None and (mask.shape != ids.shape or mask.dtype != torch.bool):
            given = f"{list(mask.shape)} of {str(mask.dtype).removeprefix('torch.')}"
            raise InputError(f"Blip: the mask is {given}; words of shape {list(ids.shape)} need one of bool")
        if torch.compiler.is_compiling():  # what follows looks at values
            return
        if ids.min() < 0 or ids.max() >= words:
            found = f"{ids.min().item()} to {ids.max().item()}"
            raise InputError(f"Blip: words are numbers from 0 to {words - 1}, got {found}")
        if mask is not None and not mask[:, 0].all():  # it would have nothing to attend to
            raise InputError("Blip: the mask hides the first word of a text; put padding behind the words")
