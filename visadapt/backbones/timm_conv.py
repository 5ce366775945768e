"""The convolutional networks of timm with residual blocks: ResNet (ResNeXt, SE-ResNet, ...) and ConvNeXt (V1, V2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from timm.layers import LayerNorm2d
from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.sites import Site
from ..errors import InputError
from ..registry import BACKBONES
from .base import Features
from .patch_embed import first_conv
from .timm_model import TimmModel

STEM = ("stem", "conv1", "bn1", "act1", "maxpool")
"""Modules of a body that come before its stages."""


@BACKBONES.register_module()
class TimmConv(TimmModel):
    """A ResNet or ConvNeXt of timm for images of any size and any number of bands.

    Images whose sides are no multiple of the last stride, mostly 32, are padded at the right and bottom with the mean
    colour, so that the map of a stage with stride s is exactly 1/s of the padded image; a bare ConvNeXt would drop what
    is left over. `tokens` are the pixels of the last map, behind the final norm where there is one (ConvNeXt). Since
    blocks work on maps of several sizes and not on one token sequence, the capability "tokens" is not offered.

    Sites: "patch" is the convolution that reads the image, "conv" are all others but those of the downsampling, which
    are "down"; "norm1" are the norms in blocks, "norm" those outside; "fc1", "fc2" and "mlp" are ConvNeXt's MLP where
    it is made of linears (with `conv_mlp` it is two convolutions). Blocks are numbered through all stages; the
    downsampling before a stage counts to the block behind it. Batch norms never leave eval mode.

    Args:
        name: timm model name, e.g. "resnet50" or "convnext_tiny".
        weights: None for random weights, "timm" for timm's hub, "timm:<tag>" for one of its tags, or a file (the
            layouts of timm, torchvision's ResNets, Meta's ConvNeXt and open_clip are recognised).
        in_chans: bands of the input.
        bands: how the first convolution is widened to other bands: repeat, mean or zero.
        out_indices: stages whose feature maps are given, shallow to deep, negative from the end; none by default.
        mean: per band on the 0..255 scale; the model's own, repeated over the bands, where None.
        std: likewise.
        arch: constructor arguments of timm that change the architecture, e.g. dict(depths=(1, 1, 1, 1)).
    """

    sources = ("resnet", "convnext")
    family = "ResNets and ConvNeXts"
    level = "stages"
    layout = "NCHW"
    capabilities = frozenset({"maps"})
    prefix = 0

    def check(self, body: nn.Module) -> None:
        if not isinstance(body, ResNet | ConvNeXt):
            raise InputError(f"'{self.name}' is a {type(body).__name__}; TimmConv takes {self.family}")
        pool = body.global_pool if isinstance(body, ResNet) else body.head.global_pool
        if pool.is_identity():
            raise InputError(f"'{self.name}' has no pooling and so no vector per image; set global_pool in arch")

    def levels(self) -> list[tuple[int, int]]:
        return [(info["num_chs"], info["reduction"]) for info in self._stages()]

    def _stages(self) -> list[dict]:
        """What timm says of the stages: path `module`, width `num_chs`, stride `reduction`."""
        return [info for info in self.body.feature_info if info["module"] not in STEM]

    def _blocks(self, stage: str) -> list[str]:
        """Paths of the blocks of a stage."""
        inside = f"{stage}.blocks" if isinstance(self.body, ConvNeXt) else stage
        return [f"{inside}.{name}" for name, _ in self.body.get_submodule(inside).named_children()]

    @property
    def depth(self) -> int:
        return sum(len(self._blocks(stage["module"])) for stage in self._stages())

    def train(self, mode: bool = True) -> TimmConv:
        """As usual, but batch norms keep the statistics that they came with, also in a base in training mode."""
        super().train(mode)
        for module in self.body.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    # ---- sites ----------------------------------------------------------------------------------------------------
    def sites(self) -> list[Site]:
        seen: Counter[tuple[int, str]] = Counter()
        found = []
        for site in self._sites():
            found.append(replace(site, n=seen[site.layer, site.role]))
            seen[site.layer, site.role] += 1
        return found

    def _sites(self) -> Iterator[Site]:
        """All sites in the order in which the network runs, not yet numbered within a layer."""
        for name, _ in self.body.named_children():
            if name in STEM:
                yield from self._weights(name, -1)
        if isinstance(self.body, ConvNeXt):
            yield self._whole("stem", "stem", -1, self._stages()[0]["num_chs"])
        layer = 0
        for stage in self._stages():
            path, width = stage["module"], stage["num_chs"]
            if isinstance(self.body, ConvNeXt):
                yield from self._weights(f"{path}.downsample", layer, norm="norm")
            for block in self._blocks(path):
                yield from self._weights(block, layer, norm="norm1")
                mlp = getattr(self.body.get_submodule(block), "mlp", None)
                if mlp is not None and isinstance(mlp.fc1, nn.Linear):
                    yield Site(f"{block}.mlp", "mlp", layer, width, width, layout="NHWC")
                yield self._whole(block, "block", layer, width)
                layer += 1
            yield self._whole(path, "stage", layer - 1, width)
        for name in ("norm_pre", "head"):
            if hasattr(self.body, name):
                yield from self._weights(name, -1)

    def _whole(self, path: str, role: str, layer: int, width: int) -> Site:
        """The site of a module that begins with a convolution and gives `width` channels."""
        convs = (m for m in self.body.get_submodule(path).modules() if isinstance(m, nn.Conv2d))
        return Site(path, role, layer, next(convs).in_channels, width, layout="NCHW")

    def _weights(self, root: str, layer: int, norm: str = "norm") -> Iterator[Site]:
        """Convolutions, norms and the linears of MLPs in a module."""
        image = first_conv(self.body)
        for name, module in self.body.get_submodule(root).named_modules():
            path = f"{root}.{name}".rstrip(".")
            parts = path.split(".")
            if isinstance(module, nn.Conv2d):
                role = "patch" if path == image else "down" if "downsample" in parts else "conv"
                yield Site(path, role, layer, module.in_channels, module.out_channels, layout="NCHW")
            elif isinstance(module, nn.Linear) and parts[-2:-1] == ["mlp"]:
                yield Site(path, parts[-1], layer, module.in_features, module.out_features, layout="NHWC")
            elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d | nn.GroupNorm) and module.weight is not None:
                rows = isinstance(module, nn.LayerNorm) and not isinstance(module, LayerNorm2d)
                width = module.weight.numel()
                yield Site(path, norm, layer, width, width, layout="NHWC" if rows else "NCHW")

    def layer_id(self, name: str) -> int:
        first = 1
        for stage in (info["module"] for info in self._stages()):
            blocks = self._blocks(stage)
            if name == stage:
                return first + len(blocks) - 1
            if name.startswith(f"{stage}."):
                own = (i for i, block in enumerate(blocks) if f"{name}.".startswith(f"{block}."))
                return first + next(own, 0)
            first += len(blocks)
        return 0 if name.split(".")[0] in STEM else first

    # ---- running --------------------------------------------------------------------------------------------------
    def forward(self, x: Tensor) -> Features:
        """(B, C, H, W) normalised images to features.

        Raises:
            InputError: another number of bands than the backbone was built for.
        """
        x, body = self.ready(x), self.body
        for module in (body.conv1, body.bn1, body.act1, body.maxpool) if isinstance(body, ResNet) else (body.stem,):
            x = module(x)
        saving = isinstance(body, ResNet) and body.grad_checkpointing
        maps = []
        for i, stage in enumerate(self._stages()):
            module = body.get_submodule(stage["module"])
            # timm's ResNet would call the blocks past their stage, and what is attached to the stage would not run
            x = checkpoint(module, x, use_reentrant=False) if saving else module(x)
            if i in self.out_indices:
                maps.append(x)
        if isinstance(body, ConvNeXt):
            x = body.norm_pre(x)
        last = body.head.norm(x) if isinstance(body, ConvNeXt) and hasattr(body.head, "norm") else x
        native = body.forward_head(x, pre_logits=True)
        return Features(last.flatten(2).mT, tuple(last.shape[-2:]), None, native, maps)

    def pooled_dim(self, kind: str) -> int:
        return self.body.head_hidden_size if kind == "native" else self.levels()[-1][0]
