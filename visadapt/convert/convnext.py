"""Meta's ConvNeXt checkpoints (V1, V2, DINOv3), and the image towers of open_clip that are ConvNeXts of timm."""

from __future__ import annotations

from timm.models.convnext import checkpoint_filter_fn
from torch import Tensor, nn

from .keymap import KeyMap, State

OFFICIAL, TRUNK = "downsample_layers.0.0.weight", "visual.trunk.stem.0.weight"


def matches(state: State) -> bool:
    return OFFICIAL in state or TRUNK in state


def apply(state: State, model: nn.Module) -> tuple[State, list[str]]:
    """Keys as timm's own converter renames them; no tensor is resized.

    The converter reshapes the linears of MLPs to those of the model, which may be another one. It is shown convolutions
    of 1 x 1, and what should be linear is made so afterwards, so that sizes are compared in one place by the caller.
    """
    if TRUNK in state:
        kept = {k: v for k, v in state.items() if k.startswith(("visual.trunk.", "visual.head."))}
    else:
        kept = {k: v for k, v in state.items() if not k.startswith(("projectors.", "norms."))}
    renamed = checkpoint_filter_fn({k: _tall(k, v) for k, v in kept.items()}, model)
    wanted = model.state_dict()
    linear = {k for k, v in renamed.items() if v.ndim == 4 and k in wanted and wanted[k].ndim == 2}
    return {k: v.flatten(1) if k in linear else v for k, v in renamed.items()}, [k for k in state if k not in kept]


def _tall(key: str, value: Tensor) -> Tensor:
    return value[..., None, None] if value.ndim == 2 and "pwconv" in key else value


MAP = KeyMap("convnext", "downsample_layers.0.0.weight, stages.0.0.dwconv.weight", matches, apply)
