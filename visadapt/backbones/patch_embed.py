"""First convolutions for other bands than red, green and blue."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import InputError, hint

BAND_MODES = ("repeat", "mean", "zero")


def first_conv(model: nn.Module) -> str:
    """Path of the convolution that reads the image: the patch embedding of a transformer, the stem of a network of
    convolutions.
    """
    return next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))


def expand_patch_embed(weight: Tensor, in_chans: int, mode: str = "repeat") -> Tensor:
    """The weight of an RGB patch embedding, or another first convolution, for images of `in_chans` bands.

    With "repeat" and "mean" an image whose bands are all equal gives what the same grey image gave as RGB, for every
    number of bands; for one band both are the sum over RGB.

    Args:
        weight: (D, 3, p, p).
        mode: "repeat": red, green and blue in turn, each divided by how often it comes; as "mean" for fewer than three
            bands, where a colour would be lost. "mean": every band has the mean over RGB, times 3 / in_chans. "zero":
            the first three bands are RGB, the others are ignored until they are trained.

    Returns:
        (D, in_chans, p, p), a new tensor.

    Raises:
        InputError: unknown mode, a weight that is not for RGB, no bands, or "zero" with fewer than three.
    """
    if mode not in BAND_MODES:
        raise InputError(f"unknown mode '{mode}' for the bands of the patch embedding{hint(mode, BAND_MODES)}")
    if weight.ndim != 4 or weight.shape[1] != 3:
        raise InputError(f"only an RGB patch embedding (D, 3, p, p) can be widened, not {tuple(weight.shape)}")
    if in_chans < 1:
        raise InputError(f"a backbone needs at least one band, got in_chans={in_chans}")
    if mode == "zero":
        return _zero(weight, in_chans)
    if mode == "mean" or in_chans < 3:
        return (weight.sum(1, keepdim=True) / in_chans).repeat(1, in_chans, 1, 1)
    colour = torch.arange(in_chans, device=weight.device) % 3
    return weight[:, colour] / torch.bincount(colour)[colour].view(1, -1, 1, 1)


def _zero(weight: Tensor, in_chans: int) -> Tensor:
    if in_chans < 3:
        raise InputError(f"mode 'zero' keeps red, green and blue, and there are only {in_chans} bands; use mode 'mean'")
    return torch.cat([weight, weight.new_zeros(weight.shape[0], in_chans - 3, *weight.shape[2:])], 1)
