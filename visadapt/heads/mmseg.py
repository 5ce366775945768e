"""Decode heads of MMSegmentation as typed classes; needs `pip install 'visadapt[seg]'`.

They are MMSegmentation's own modules, built without its registries and strings: arguments are checked, and their losses
are not used. Its heads that need compiled operations or mmdet (PointHead, Mask2FormerHead) are not among them.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any, ClassVar

from mmengine.model import normal_init
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from ..errors import InputError, hint
from ..registry import HEADS

NORMS = {"BN": {"type": "BN"}, "SyncBN": {"type": "SyncBN"}, "GN": {"type": "GN", "num_groups": 32}}


def build_decode_head(module: str, name: str, **arguments: Any) -> nn.Module:
    """A decode head of MMSegmentation with its initial values.

    Raises:
        InputError: MMSegmentation is not installed, or refuses the arguments.
    """
    try:
        with warnings.catch_warnings():  # that compiled operations are missing, which none of these heads needs
            warnings.simplefilter("ignore")
            kind = getattr(importlib.import_module(f"mmseg.models.decode_heads.{module}"), name)
    except ImportError as error:
        raise InputError(f"{name} comes from MMSegmentation: pip install 'visadapt[seg]' ({error})") from error
    with DefaultScope.overwrite_default_scope("mmseg"):  # a training run has mmengine's, where its parts have no name
        head = kind(**arguments)
    normal_init(head.conv_seg, std=0.01)  # all that its init_weights() does, without the page of log that this prints
    return head


class MMSegHead(nn.Module):
    """What the heads below share: levels (B, D, h, w) to logits (B, num_classes, h, w).

    Args:
        num_classes: K.
        in_channels: per level, fine to coarse.
        channels: width of the head.
        dropout: share of channels set to zero before the last layer, in training.
        norm: BN, SyncBN (over the processes of a distributed run) or GN.

    Attributes:
        decode: MMSegmentation's module.

    Raises:
        InputError: fewer than 2 classes, an unknown norm, a share out of range, or MMSegmentation is not there.
    """

    def __init__(
        self, num_classes: int, in_channels: list[int], channels: int = 256, dropout: float = 0.1, norm: str = "BN"
    ) -> None:
        super().__init__()
        who = type(self).__name__
        if num_classes < 2:
            raise InputError(f"{who}: num_classes must be 2 or more, got {num_classes}")
        if norm not in NORMS:
            raise InputError(f"{who}: unknown norm '{norm}'{hint(norm, NORMS)}")
        if not 0 <= dropout < 1:
            raise InputError(f"{who}: dropout must be in [0, 1), got {dropout}")
        if norm == "GN" and channels % NORMS["GN"]["num_groups"]:
            raise InputError(f"{who}: GN makes 32 groups, channels {channels} cannot be divided by it")
        self.num_classes, self.in_channels, self.channels = num_classes, in_channels, channels
        self.dropout, self.norm = dropout, norm

    def _build(self, module: str, name: str, all_levels: bool = True, **arguments: Any) -> nn.Module:
        """Of all levels, or of the last alone."""
        return build_decode_head(
            *(module, name),
            in_channels=self.in_channels if all_levels else self.in_channels[-1],
            in_index=list(range(len(self.in_channels))) if all_levels else -1,
            channels=self.channels,
            num_classes=self.num_classes,
            dropout_ratio=self.dropout,
            norm_cfg=NORMS[self.norm],
            loss_decode={"type": "CrossEntropyLoss", "avg_non_ignore": True},  # not used; its default warns
            **arguments,
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.decode(maps)


@HEADS.register_module()
class FCNHead(MMSegHead):
    """Convolutions on the last level (Long et al. 2015), or on all levels in one.

    Args:
        num_classes: see MMSegHead, as are the four below.
        in_channels: per level.
        channels: width of the head.
        dropout: before the last layer.
        norm: BN, SyncBN or GN.
        convs: number of 3 x 3 convolutions.
        all_levels: resize all levels to the finest and concatenate them.
    """

    extra = "seg"

    def __init__(
        self,
        num_classes: int,
        in_channels: list[int],
        channels: int = 256,
        dropout: float = 0.1,
        norm: str = "BN",
        convs: int = 2,
        all_levels: bool = True,
    ) -> None:
        super().__init__(num_classes, in_channels, channels, dropout, norm)
        if convs < 1:
            raise InputError(f"FCNHead: convs must be 1 or more, got {convs}; LinearSegHead has none")
        self.convs, self.all_levels = convs, all_levels
        own = {"num_convs": convs, "concat_input": False, "input_transform": "resize_concat" if all_levels else None}
        self.decode = self._build("fcn_head", "FCNHead", all_levels, **own)


class _PlainHead(MMSegHead):
    """A head of all levels without arguments of its own; `source` is its file and class in MMSegmentation."""

    source: ClassVar[tuple[str, str]]

    def __init__(
        self, num_classes: int, in_channels: list[int], channels: int = 256, dropout: float = 0.1, norm: str = "BN"
    ) -> None:
        super().__init__(num_classes, in_channels, channels, dropout, norm)
        self.decode = self._build(*self.source)


@HEADS.register_module()
class UPerHead(_PlainHead):
    """Pyramid pooling on the coarsest level and a feature pyramid over all (UPerNet, Xiao et al. 2018)."""

    extra = "seg"
    source = ("uper_head", "UPerHead")


@HEADS.register_module()
class SegFormerHead(_PlainHead):
    """One linear layer per level, then one over all of them (SegFormer, Xie et al. 2021)."""

    extra = "seg"
    source = ("segformer_head", "SegformerHead")


@HEADS.register_module()
class ASPPHead(MMSegHead):
    """Atrous spatial pyramid pooling on the last level (DeepLabV3, Chen et al. 2017).

    Args:
        num_classes: see MMSegHead, as are the four below.
        in_channels: per level.
        channels: width of the head.
        dropout: before the last layer.
        norm: BN, SyncBN or GN.
        dilations: of the branches; the authors' are for a stride of 8.
    """

    extra = "seg"

    def __init__(
        self,
        num_classes: int,
        in_channels: list[int],
        channels: int = 256,
        dropout: float = 0.1,
        norm: str = "BN",
        dilations: list[int] = (1, 6, 12, 18),
    ) -> None:
        super().__init__(num_classes, in_channels, channels, dropout, norm)
        self.dilations = tuple(dilations)
        self.decode = self._build("aspp_head", "ASPPHead", False, dilations=self.dilations)


@HEADS.register_module()
class DPTHead(MMSegHead):
    """Reassembles four equal maps of a vision transformer to a pyramid and fuses it (DPT, Ranftl et al. 2021).

    It takes the backbone's maps as they are, without a neck; the class token is left out ("ignore" in the paper).

    Args:
        num_classes: see MMSegHead, as are the four below.
        in_channels: of four levels of one width.
        channels: width of the head.
        dropout: before the last layer.
        norm: BN, SyncBN or GN.
        post_channels: width of the four levels after reassembling.
    """

    extra = "seg"

    def __init__(
        self,
        num_classes: int,
        in_channels: list[int],
        channels: int = 256,
        dropout: float = 0.1,
        norm: str = "BN",
        post_channels: list[int] = (96, 192, 384, 768),
    ) -> None:
        super().__init__(num_classes, in_channels, channels, dropout, norm)
        if len(in_channels) != 4 or len(set(in_channels)) != 1 or len(post_channels) != 4:
            raise InputError(f"DPTHead takes four levels of one width, got {in_channels}; name four in out_indices")
        self.post_channels = tuple(post_channels)
        own = {"input_transform": "multiple_select", "embed_dims": in_channels[0]}
        own |= {"post_process_channels": list(post_channels), "readout_type": "ignore"}
        self.decode = self._build("dpt_head", "DPTHead", **own)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.decode([(x, x.new_zeros(x.shape[:2])) for x in maps])
