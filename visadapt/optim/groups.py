"""Parameter groups: only what trains, with layer-wise learning rates and no decay where it harms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..core.adapted import Adapted
from ..errors import InputError, hint

OPTIONS = ("layer_decay", "head_lr_mult", "decay_vectors", "no_decay", "loraplus_lr_ratio")
NORM_LAYERS = (nn.LayerNorm, nn.GroupNorm, _BatchNorm, _InstanceNorm)

CHOICES = {"fused", "foreach", "capturable", "differentiable"}
"""Arguments of torch's optimizers that choose how a step is computed."""

Pair = tuple[nn.Parameter, nn.Parameter, float]
"""A (r, i), B (o, r) and s of an update s B A."""


class TrainableGroups:
    """mmengine's optimizer constructor for adapted models.

    Optimizers that have an attribute `own` (see `AdamWBase`) get groups of that sort: "pairs" of the factors of every
    piece that names them (`Delta.pair`), as params [A1, B1, A2, B2, ...] and pairs [s1, s2, ...]; or "matrices", the
    weights of the backbone that train in place and have two or more dimensions. Torch's Adam and AdamW are fused where
    that is faster and nothing else is asked for, see `fused_on_cpu`.

    Args:
        optim_wrapper_cfg: the config of the wrapper with its `optimizer`.
        paramwise_cfg: `layer_decay` d in (0, 1] gives block i of n the learning rate lr * d ** (n - i), the stem
            lr * d ** (n + 1), and what lies beyond the blocks or is shared by sites lr; `head_lr_mult` multiplies the
            heads' rate; `decay_vectors=False` (default True) leaves biases, norms and scales without weight decay;
            `no_decay` is a list of name patterns such as "*query_embed*": what they match, and norm layers then, have
            no weight decay;
            `loraplus_lr_ratio` multiplies the rate of the factor B of every pair (LoRA+, Hayou et al., 2024,
            arXiv 2402.12354, which has 16 with a smaller lr than LoRA's).

    Raises:
        InputError: an unknown option or a value out of range; when called, no learning rate, nothing that trains,
            a ratio without pairs, or pairs whose factors share a tensor or differ in rate where they train together.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        self.wrapper, self.options = dict(optim_wrapper_cfg), dict(paramwise_cfg or {})
        for name in self.options:
            if name not in OPTIONS:
                raise InputError(f"optim_wrapper.paramwise_cfg has no option '{name}'{hint(name, OPTIONS)}")
        self.decay, self.head_mult = self.options.get("layer_decay", 1.0), self.options.get("head_lr_mult", 1.0)
        if not 0 < self.decay <= 1:
            raise InputError(f"optim_wrapper.paramwise_cfg.layer_decay must be in (0, 1], got {self.decay}")
        self.no_decay = self.options.get("no_decay")
        if isinstance(self.no_decay, str):
            raise InputError(f"optim_wrapper.paramwise_cfg.no_decay is a list, e.g. ['{self.no_decay}']")
        self.ratio = self.options.get("loraplus_lr_ratio", 1.0)
        for name, value in (("head_lr_mult", self.head_mult), ("loraplus_lr_ratio", self.ratio)):
            if not value > 0:
                raise InputError(f"optim_wrapper.paramwise_cfg.{name} must be above 0, got {value}")

    def __call__(self, model: nn.Module) -> OptimWrapper:
        model = getattr(model, "module", model)
        optimizer = dict(self.wrapper["optimizer"])
        if "lr" not in optimizer:
            raise InputError("optim_wrapper.optimizer has no lr; give it one, e.g. lr=1e-3")
        kind = optimizer.get("type")
        kind = OPTIMIZERS.get(kind) if isinstance(kind, str) else kind
        groups = self.groups(model, optimizer["lr"], getattr(kind, "own", ""))
        if not groups:
            raise InputError("nothing trains: the model has no trainable parameter, give it a head or an adapter")
        fast = fused_on_cpu(kind, [p for g in groups for p in g["params"]])
        built = OPTIMIZERS.build({**({} if CHOICES & optimizer.keys() else fast), **optimizer, "params": groups})
        return OPTIM_WRAPPERS.build({**self.wrapper, "optimizer": built})

    def groups(self, model: nn.Module, lr: float, own: str = "") -> list[dict]:
        """Torch parameter groups, one per (learning rate, decay) of the parameters of a sort; those of `own` first."""
        settings = self._settings(model)
        found: dict[tuple[float, bool, str], dict] = {}

        def group(factor: float, decays: bool, sort: str) -> dict:
            start = {"params": [], "lr": lr * factor} | ({} if decays else {"weight_decay": 0.0})
            start |= {"pairs": {"pairs": []}, "matrices": {"matrices": True}}.get(sort, {})
            return found.setdefault((factor, decays, sort), start)

        taken: set[int] = set()
        for a, b, scale in _pairs(model) if own == "pairs" else ():
            if settings(a) != settings(b):
                raise InputError(
                    "the optimizer updates the factors of a pair together, with one learning rate; leave out "
                    "loraplus_lr_ratio and other factors on single parameters"
                )
            if taken & {id(a), id(b)}:
                raise InputError("the optimizer updates pairs of factors, and a tensor is in several of the model's")
            taken |= {id(a), id(b)}
            pairs = group(*settings(a), "pairs")
            pairs["params"] += [a, b]
            pairs["pairs"].append(scale)
        matrices = _matrices(model) if own == "matrices" else set()
        for parameter in model.parameters():
            if parameter.requires_grad and id(parameter) not in taken:
                sort = "matrices" if id(parameter) in matrices else ""
                group(*settings(parameter), sort)["params"].append(parameter)
        return list(found.values())

    def _settings(self, model: nn.Module) -> Callable[[nn.Parameter], tuple[float, bool]]:
        """The function that gives a parameter's factor on the learning rate, and whether it decays."""
        heights, multipliers = _heights(model), _multipliers(model)
        faster = {id(b) for _, b, _ in _pairs(model)} if self.ratio != 1 else set()
        if self.ratio != 1 and not faster:
            raise InputError(
                "optim_wrapper.paramwise_cfg.loraplus_lr_ratio is for the factor B of pairs and no pair trains; "
                "use an adapter that has them, e.g. LoRA"
            )

        spared = _spared(model, self.no_decay or ()) if self.no_decay is not None else set()

        def settings(parameter: nn.Parameter) -> tuple[float, bool]:
            height = heights.get(id(parameter))
            factor = self.head_mult if height is None else self.decay**height
            factor *= multipliers.get(id(parameter), 1.0) * (self.ratio if id(parameter) in faster else 1.0)
            decays = parameter.ndim > 1 or self.options.get("decay_vectors", True)
            return factor, decays and id(parameter) not in spared

        return settings


def fused_on_cpu(kind: type[torch.optim.Optimizer], parameters: Iterable[Tensor]) -> dict[str, bool]:
    """Arguments that make an Adam or AdamW take its step in one pass, for parameters on a CPU.

    Adapters are hundreds of small tensors, and there torch goes through them one by one, with a dozen operations each;
    on other devices it groups them by itself. A fused step reads gradients as they lie in memory, so that all
    parameters must be dense: autograd gives those gradients of the same layout.
    """
    if kind not in (torch.optim.Adam, torch.optim.AdamW):
        return {}
    good = all(p.is_cpu and p.stride() == torch.empty_like(p, device="meta").stride() for p in parameters)
    return {"fused": True} if good else {}


def _spared(model: nn.Module, patterns: Sequence[str]) -> set[int]:
    """Parameters of norm layers and those whose names match a pattern, by id.

    Raises:
        InputError: a pattern matches nothing that trains.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = {id(p) for m in model.modules() if isinstance(m, NORM_LAYERS) for p in m.parameters(recurse=False)}
    for pattern in patterns:
        matched = [id(p) for n, p in trained.items() if fnmatchcase(n, pattern)]
        if not matched:
            raise InputError(f"optim_wrapper.paramwise_cfg.no_decay: '{pattern}' matches no parameter that trains")
        found.update(matched)
    return found


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


def _pairs(model: nn.Module) -> list[Pair]:
    """The factors that train as a pair, with the scale of their product."""
    found = []
    pieces = [p for m in model.modules() if isinstance(m, Adapted) for p in m.pieces()]
    for piece in (p for p in pieces if getattr(p, "pair", None)):
        a, b = (getattr(piece, name) for name in piece.pair)
        if a.requires_grad and b.requires_grad:
            found.append((a, b, piece.factors()[2] * piece.scale))
    return found


def _matrices(model: nn.Module) -> set[int]:
    """Weights of the backbone that train in place, by id; a single row (class token, positions) is no matrix."""
    bodies = [m.backbone.body for m in model.modules() if isinstance(m, Adapted)]
    trained = [p for body in bodies for p in body.parameters() if p.requires_grad and p.ndim > 1]
    return {id(p) for p in trained if min(p.flatten(1).shape) > 1}
