"""From the equal maps of a plain vision transformer to a pyramid."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..errors import InputError
from ..registry import NECKS


@NECKS.register_module()
class Pyramid(nn.Module):
    """Resizes every level by a factor of its own, as Rein, Cloud-Adapter and Earth-Adapter do; nothing is trained.

    Four maps (B, D, h, w) at the stride p of the patches become maps at the strides p/4, p/2, p and 2p: bilinear,
    without aligned corners and without antialiasing.

    Args:
        factors: of height and width, per level, fine to coarse.

    Raises:
        InputError: a factor that is not above 0.
    """

    def __init__(self, factors: Sequence[float] = (4, 2, 1, 0.5)) -> None:
        super().__init__()
        if not factors or not all(f > 0 for f in factors):
            raise InputError(f"Pyramid: factors must be above 0, got {list(factors)}")
        self.factors = tuple(factors)

    def out_channels(self, in_channels: list[int]) -> list[int]:
        """Channels per level for those of the backbone's levels.

        Raises:
            InputError: another number of levels than factors.
        """
        if len(in_channels) != len(self.factors):
            raise InputError(
                f"Pyramid has {len(self.factors)} factors and the backbone gives {len(in_channels)} levels; name "
                f"{len(self.factors)} blocks in its out_indices"
            )
        return in_channels

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Per level (B, D, h, w) to (B, D, h * factor, w * factor)."""
        return [
            x if f == 1 else interpolate(x, scale_factor=f, mode="bilinear", align_corners=False)
            for x, f in zip(maps, self.factors)
        ]
