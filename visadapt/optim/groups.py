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
        paramwise_cfg: `layer_decay` d in (0, 1] gives block i of n the learning rate lr * d ** (n - i), the stem
            lr * d ** (n + 1), and what lies beyond the blocks or is shared by sites lr; `head_lr_mult` multiplies the
            heads' rate; `decay_vectors=False` (default True) leaves biases, norms and scales without weight decay.

    Raises:
        InputError: an unknown option or a value out of range; when called, no learning rate or nothing that trains.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        self.wrapper, self.options = dict(optim_wrapper_cfg), dict(paramwise_cfg or {})
        for name in self.options:
            if name not in OPTIONS:
                raise InputError(f"optim_wrapper.paramwise_cfg has no option '{name}'{hint(name, OPTIONS)}")
        self.decay, self.head_mult = self.options.get("layer_decay", 1.0), self.options.get("head_lr_mult", 1.0)
        if not 0 < self.decay <= 1:
            raise InputError(f"optim_wrapper.paramwise_cfg.layer_decay must be in (0, 1], got {self.decay}")
        if not self.head_mult > 0:
            raise InputError(f"optim_wrapper.paramwise_cfg.head_lr_mult must be above 0, got {self.head_mult}")

    def __call__(self, model: nn.Module) -> OptimWrapper:
        model = getattr(model, "module", model)
        optimizer = dict(self.wrapper["optimizer"])
        if "lr" not in optimizer:
            raise InputError("optim_wrapper.optimizer has no lr; give it one, e.g. lr=1e-3")
        groups = self.groups(model, optimizer["lr"])
        if not groups:
            raise InputError("nothing trains: the model has no trainable parameter, give it a head or an adapter")
        built = OPTIMIZERS.build({**optimizer, "params": groups})
        return OPTIM_WRAPPERS.build({**self.wrapper, "optimizer": built})

    def groups(self, model: nn.Module, lr: float) -> list[dict]:
        """Torch parameter groups, one per (learning rate, decay)."""
        heights, multipliers = _heights(model), _multipliers(model)
        found: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for parameter in model.parameters():
            if not parameter.requires_grad:
                continue
            if id(parameter) in heights:
                factor = self.decay ** heights[id(parameter)]
            else:
                factor = self.head_mult
            factor *= multipliers.get(id(parameter), 1.0)
            decays = parameter.ndim > 1 or self.options.get("decay_vectors", True)
            found.setdefault((factor, decays), []).append(parameter)
        groups = []
        for (factor, decays), parameters in found.items():
            groups.append({"params": parameters, "lr": lr * factor} | ({} if decays else {"weight_decay": 0.0}))
        return groups


def _multipliers(model: nn.Module) -> dict[int, float]:
    """What adapters ask for their own parameters, by id."""
    adapters = [a for m in model.modules() if isinstance(m, Adapted) for a in m.adapters.values()]
    return {id(p): a.lr_mult(n) for a in adapters for n, p in a.named_parameters()}


def _heights(model: nn.Module) -> dict[int, int]:
    """Layers between every adapter or base parameter and the head, by id; heads are not in it."""
    heights: dict[int, int] = {}
    for adapted in (m for m in model.modules() if isinstance(m, Adapted)):
        backbone = adapted.backbone
        top = backbone.depth + 1
        for name, parameter in backbone.body.named_parameters():
            heights[id(parameter)] = top - backbone.layer_id(name)
        for adapter in adapted.adapters.values():
            for piece in adapter.pieces.values():
                heights |= {id(p): top - backbone.layer_id(piece.site.path) for p in piece.parameters()}
            heights |= {id(p): 0 for p in adapter.common.parameters()}
    return heights
