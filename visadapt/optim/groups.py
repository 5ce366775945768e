"""Parameter groups: only what trains, with layer-wise learning rates and no decay where it harms."""

from __future__ import annotations

from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn

from ..core.adapted import Adapted
from ..errors import InputError, hint

OPTIONS = ("layer_decay", "head_lr_mult", "decay_vectors")


class TrainableGroups:
    """mmengine's optimizer constructor for adapted models.

    Args:
        optim_wrapper_cfg: the config of the wrapper with its `optimizer`.
        paramwise_cfg: `layer_decay` d gives parameters at depth k of n the learning rate lr * d ** (n - k);
            `head_lr_mult` multiplies the heads' rate; `decay_vectors=False` (default True) leaves biases, norms and
            scales without weight decay.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        self.wrapper, self.options = dict(optim_wrapper_cfg), dict(paramwise_cfg or {})
        for name in self.options:
            if name not in OPTIONS:
                raise InputError(f"optim_wrapper.paramwise_cfg has no option '{name}'{hint(name, OPTIONS)}")

    def __call__(self, model: nn.Module) -> OptimWrapper:
        model = getattr(model, "module", model)
        optimizer = dict(self.wrapper.pop("optimizer"))
        groups = self.groups(model, optimizer["lr"], optimizer.get("weight_decay"))
        if not groups:
            raise InputError("nothing trains: the model has no trainable parameter, give it a head or an adapter")
        built = OPTIMIZERS.build({**optimizer, "params": groups})
        return OPTIM_WRAPPERS.build({**self.wrapper, "optimizer": built})

    def groups(self, model: nn.Module, lr: float, weight_decay: float | None) -> list[dict]:
        """Torch parameter groups, one per (learning rate, decay)."""
        decay, head_mult = self.options.get("layer_decay", 1.0), self.options.get("head_lr_mult", 1.0)
        depths = _depths(model)
        deepest = max(depths.values(), default=0)
        found: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for parameter in model.parameters():
            if not parameter.requires_grad:
                continue
            if id(parameter) in depths:
                factor = decay ** (deepest - depths[id(parameter)])
            else:
                factor = head_mult
            decays = parameter.ndim > 1 or self.options.get("decay_vectors", True)
            found.setdefault((factor, decays), []).append(parameter)
        groups = []
        for (factor, decays), parameters in found.items():
            group = {"params": parameters, "lr": lr * factor}
            if weight_decay is not None:
                group["weight_decay"] = weight_decay if decays else 0.0
            groups.append(group)
        return groups


def _depths(model: nn.Module) -> dict[int, int]:
    """Depth by id of every adapter parameter and base parameter; heads are not in it."""
    depths: dict[int, int] = {}
    for adapted in (m for m in model.modules() if isinstance(m, Adapted)):
        backbone = adapted.backbone
        for name, parameter in backbone.body.named_parameters():
            depths[id(parameter)] = backbone.layer_id(name)
        for adapter in adapted.adapters.values():
            for parameter in adapter.common.parameters():
                depths[id(parameter)] = backbone.depth + 1
            for piece in adapter.pieces.values():
                depths |= {id(p): backbone.layer_id(piece.site.path) for p in piece.parameters()}
    return depths
