"""An adapted backbone for MMSegmentation's own models and configs; needs `pip install 'visadapt[seg]'`."""

from __future__ import annotations

from mmseg.registry import MODELS
from torch import Tensor, nn

from ..core.adapted import Adapted
from ..errors import InputError
from ..registry import ADAPTERS, BACKBONES, NECKS


@MODELS.register_module()
class AdaptedBackbone(nn.Module):
    """Maps of a frozen backbone with adapters, as the `backbone` of an EncoderDecoder.

    `custom_imports = dict(imports=["visadapt.backbones.mmseg"])` in a config of MMSegmentation makes it known there.
    Parameters of the base do not require gradients. Give the optimizer the others alone: mmengine's default takes all.
    Images are padded to multiples of the patch in the data preprocessor (`size_divisor` of SegDataPreProcessor), for
    MMSegmentation stretches maps to what it gave.

    Args:
        backbone: config of a backbone with `out_indices`.
        adapters: configs by adapter name.
        neck: config of a neck, e.g. dict(type="Pyramid").

    Raises:
        InputError: the backbone gives no maps, or an adapter offers queries, which no head of MMSegmentation takes;
            when called, sides that are no multiples of the patch.
    """

    def __init__(self, backbone: dict, adapters: dict[str, dict] | None = None, neck: dict | None = None) -> None:
        super().__init__()
        self.adapted = Adapted(BACKBONES.build(backbone))
        if not self.adapted.backbone.out_indices:
            raise InputError("AdaptedBackbone: name the levels of the maps, e.g. out_indices=[2, 5, 8, 11]")
        for name, cfg in (adapters or {}).items():
            self.adapted.add(name, ADAPTERS.build(cfg))
        if self.adapted.queries() is not None:
            raise InputError("AdaptedBackbone: an adapter offers queries and MMSegmentation takes none; leave them out")
        self.neck = None if neck is None else NECKS.build(neck)
        self.adapted.set_trainable(*self.adapted.adapters)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Normalised images (B, C, H, W) to maps (B, D, h, w) per level, fine to coarse."""
        patch = self.adapted.backbone.patch
        if x.shape[2] % patch or x.shape[3] % patch:
            raise InputError(
                f"AdaptedBackbone: images of {x.shape[2]}x{x.shape[3]} are no multiples of the patch of {patch} "
                f"pixels; set size_divisor={patch} in the data preprocessor"
            )
        maps = self.adapted(x).maps
        return tuple(maps if self.neck is None else self.neck(maps))
