"""What backbones made of timm's models share: building them, their weights, bands, levels and image sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import shorten
from typing import Any, ClassVar

import timm
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, hint
from ..registry import BACKBONES
from .base import Backbone
from .patch_embed import BAND_MODES, expand_patch_embed, first_conv
from .weights import is_local, load_weights

MISTAKES = (TypeError, ValueError, AssertionError, ArithmeticError, LookupError, RuntimeError, OSError)
"""What timm and torch raise for arguments that make no sense and for weights that cannot be had."""


class TimmModel(Backbone):
    """A model of timm, for images of any number of bands.

    Args:
        name: timm model name, with or without a tag.
        weights: None for random weights, "timm" for timm's hub, "timm:<tag>" for one of its tags, or a file.
        in_chans: bands of the input.
        bands: how the first convolution is widened to other bands: repeat, mean or zero.
        out_indices: levels whose feature maps are given, shallow to deep, negative from the end; none by default.
        mean: per band on the 0..255 scale; the model's own, repeated over the bands, where None.
        std: likewise.
        arch: constructor arguments of timm that change the architecture.

    Attributes:
        sources: files of timm with the models of the family.
        family: what the family is called in messages, in the plural.
        level: what a level is called in messages, in the plural.
        options: further arguments for timm.
        own_weights: names of weights beside files and timm's hub.
        strides: pixels per cell of each map of `out_indices`, of the last level where there is none.
    """

    sources: ClassVar[tuple[str, ...]] = ()
    family: ClassVar[str] = ""
    level: ClassVar[str] = "blocks"
    options: ClassVar[dict[str, Any]] = {}
    own_weights: ClassVar[tuple[str, ...]] = ()

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
        self.who = type(self).__name__
        if not isinstance(in_chans, int) or in_chans < 1:
            raise InputError(f"{self.who}: in_chans must be a whole number of at least 1, got {in_chans!r}")
        if bands not in BAND_MODES:
            raise InputError(f"{self.who}: unknown bands '{bands}'{hint(bands, BAND_MODES)}")
        self.name, self.weights, self.in_chans, self.bands = name, weights, in_chans, bands
        self.arch = dict(arch or {})
        local = weights is None or is_local(weights)
        self.body = self._create(in_chans if local else 3)
        if weights is not None and local:
            self.weight_report = load_weights(self.body, weights, bands, "patch_size" in self.arch)
        elif in_chans != 3 and not local:
            self._widen()
        levels = self.levels()
        self.out_indices = self._chosen(out_indices, len(levels))
        shown = [levels[i] for i in self.out_indices or (-1,)]
        self.embed_dims, self.strides = [width for width, _ in shown], [stride for _, stride in shown]
        self.patch = levels[-1][1]
        self.mean, self.std = (self._statistic(key, given) for key, given in (("mean", mean), ("std", std)))

    def check(self, body: nn.Module) -> None:
        """Refuse what is built in another way than sites, grid and features say.

        Raises:
            InputError: with the reason.
        """
        raise NotImplementedError

    def levels(self) -> list[tuple[int, int]]:
        """Width and stride of all levels, shallow to deep; the stride of the last is the patch size."""
        raise NotImplementedError

    @classmethod
    def known_models(cls) -> list[str]:
        return [name for module in cls.sources for name in timm.list_models(module=module)]

    def _create(self, in_chans: int) -> nn.Module:
        base, _, tag = self.name.partition(".")
        if not timm.is_model(base):
            raise InputError(f"timm has no model '{base}'{hint(base, self.known_models())}")
        remote = self.weights is not None and not is_local(self.weights)
        if remote and not (self.weights == "timm" or self.weights.startswith("timm:")):
            others = "".join(f", '{name}'" for name in self.own_weights)
            raise InputError(f"{self.who} weights '{self.weights}': no such file, nor 'timm', 'timm:<tag>'{others}")
        if remote and self.weights != "timm":
            tag = self.weights.removeprefix("timm:")
        full = f"{base}.{tag}" if tag else base
        try:
            body = timm.create_model(
                full, pretrained=remote, num_classes=0, in_chans=in_chans, **self.options, **self.arch
            )
        except MISTAKES as error:
            raise InputError(self._reason(base, error, remote)) from error
        self.check(body)
        return body

    def _reason(self, base: str, error: Exception, remote: bool) -> str:
        reason = shorten(str(error), 200).rstrip(".") or type(error).__name__
        if remote and isinstance(error, OSError):
            return f"weights of '{self.name}' could not be fetched by timm ({reason}); give a file"
        if isinstance(error, TypeError) and base not in self.known_models():  # it lacks the family's arguments
            return f"'{self.name}' is none of the {self.family} that {self.who} takes ({reason})"
        return f"{self.who}('{self.name}', weights={self.weights!r}) cannot be built: {reason}; see also arch"

    def _widen(self) -> None:
        path = first_conv(self.body)
        parent, _, child = path.rpartition(".")
        old = self.body.get_submodule(path)
        new = nn.Conv2d(
            *(self.in_chans, old.out_channels, old.kernel_size, old.stride, old.padding), bias=old.bias is not None
        )
        new.weight.data = expand_patch_embed(old.weight.data, self.in_chans, self.bands)
        if old.bias is not None:
            new.bias = old.bias
        setattr(self.body.get_submodule(parent), child, new)

    def _chosen(self, indices: Sequence[int], count: int) -> tuple[int, ...]:
        for index in indices:
            if not -count <= index < count:
                raise InputError(
                    f"{self.who}: out_indices has {index}; '{self.name}' has the {self.level} 0 to {count - 1}"
                )
        chosen = tuple(index % count for index in indices)
        if list(chosen) != sorted(set(chosen)):
            raise InputError(
                f"{self.who}: out_indices must name each of the {self.level} once, shallow to deep, got {list(indices)}"
            )
        return chosen

    def _statistic(self, key: str, given: Sequence[float] | None) -> tuple[float, ...]:
        own = self.body.pretrained_cfg.get(key) or (0.5, 0.5, 0.5)
        values = tuple(given) if given is not None else tuple(255 * own[i % 3] for i in range(self.in_chans))
        if len(values) != self.in_chans:
            raise InputError(f"{self.who}: {key} has {len(values)} values for {self.in_chans} bands")
        if not all(math.isfinite(v) for v in values) or (key == "std" and min(values) <= 0):
            raise InputError(f"{self.who}: {key} must be finite{' and above 0' * (key == 'std')}, got {list(values)}")
        return values

    def grid(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of the last level for a batch (B, C, H, W), after padding."""
        return -(-x.shape[-2] // self.patch), -(-x.shape[-1] // self.patch)

    def pad(self, x: Tensor) -> Tensor:
        """The batch with sides that are multiples of the patch; padding is 0, the mean colour of normalised images."""
        h, w = self.grid(x)
        bottom, right = h * self.patch - x.shape[-2], w * self.patch - x.shape[-1]
        return F.pad(x, (0, right, 0, bottom)) if bottom or right else x

    def ready(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), padded.

        Raises:
            InputError: another number of bands than the backbone was built for.
        """
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            advice = "for clips take VideoClassifier" if x.ndim == 5 else "see in_chans"
            raise InputError(f"{self.who} takes (B, {self.in_chans}, H, W) images, got {tuple(x.shape)}; {advice}")
        return self.pad(x)


def family_of(name: str) -> str:
    """The registered backbone that takes this timm model, by the file of timm that it is in.

    Raises:
        InputError: no such model, or none of the backbones takes it.
    """
    families = {n: kind for n in BACKBONES.names() if issubclass(kind := BACKBONES.get(n), TimmModel)}
    base = name.partition(".")[0]
    for found, kind in families.items():
        if timm.models.is_model_in_modules(base, set(kind.sources)):
            return found
    if timm.is_model(base):
        raise InputError(f"timm's '{base}' belongs to none of the families {', '.join(families)}")
    known = [model for kind in families.values() for model in kind.known_models()]
    raise InputError(f"timm has no model '{base}'{hint(base, known)}")
