"""Folding adapters into base weights, and taking them out again bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import InputError
from .inject import WeightForward, effective
from .kinds import SiteModule, WeightMap
from .probe import evaluating

if TYPE_CHECKING:
    from .adapted import Adapted

TOLERANCE = 1e-4
"""Largest difference of outputs, relative to max(1, |y|), that the check of a merge lets pass."""

HALF_STEPS = 16
"""The same for outputs in half precision, in units of their last place: the merged weight is rounded to such a unit."""


class Merger:
    """Remembers what a merge replaced.

    Attributes:
        names: adapters that are folded in at the moment.
        originals: (weight, bias) of the base by module path, for what a merge replaced.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.originals: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._forwards: dict[str, tuple[WeightForward, list[SiteModule]]] = {}
        self._stacks: list[SiteModule] = []

    @torch.no_grad()
    def merge(self, adapted: Adapted, names: list[str], check: Tensor | None) -> int:
        if self.names:
            raise InputError(f"{self.names} are merged already; unmerge first")
        if adapted.ctx.ids is not None:
            raise InputError("a mixed batch is being routed; end routing with route(None) before merging")
        plan = self._plan(adapted, names)
        before = self._output(adapted, check)
        new = {}
        for path, (forward, pieces) in plan.items():
            dtype = forward.module.weight.dtype
            weight, bias = (v if v is None else v.to(dtype) for v in effective(*_upcast(forward.module), pieces))
            if not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
                raise InputError(f"merging {names} makes the weight of {path} non-finite; nothing was changed")
            new[path] = (weight, bias)
        for path, (forward, pieces) in plan.items():
            self._write(path, forward, pieces, *new[path])
        self.names = list(names)
        if check is not None:
            after = self._output(adapted, check)
            error = ((after - before).abs() / before.abs().clamp(min=1)).max().item()
            allowed = max(TOLERANCE, HALF_STEPS * torch.finfo(before.dtype).eps)
            if not error <= allowed:
                self.unmerge(adapted)
                raise InputError(f"merged outputs differ by {error:.1e} (allowed {allowed:.0e}); the merge was undone")
        return len(plan) + sum(len(adapted.base_values.parameters(n, adapted.backbone.body)) for n in names)

    def _plan(self, adapted: Adapted, names: list[str]) -> dict[str, tuple[WeightForward, list[SiteModule]]]:
        """Forward objects by path with the pieces to fold; refuses what would give another result."""
        pieces = [p for n in names for p in adapted.pieces(n)]
        folding = {id(p) for p in pieces if p.folds}
        in_place = any(adapted.adapters[n].trains_base for n in names)
        if not folding and not in_place:
            kinds = sorted({p.kind for p in pieces})
            what = f"kinds {kinds}" if kinds else "no pieces"
            raise InputError(f"adapters {names} have {what}; only delta and weight adapters can be merged")
        for name in names:
            if not adapted.is_enabled(name):
                raise InputError(f"adapter '{name}' is not enabled; merge folds what takes part, enable it first")
        plan = {}
        for path, module in adapted.backbone.body.named_modules():
            forward = module.__dict__.get("forward")
            if not isinstance(forward, WeightForward):
                continue
            active = forward.ordered()
            chosen = [p for p in active if id(p) in folding]
            left = [p for p in active if id(p) not in folding]
            if chosen and any(isinstance(p, WeightMap) for p in active) and left:
                other = left[0].owner
                raise InputError(
                    f"{path} also carries the enabled adapter '{other}'; merge both together or disable it"
                )
            if chosen:
                plan[path] = (forward, chosen)
        return plan

    def _write(self, path: str, forward: WeightForward, pieces: list[SiteModule], weight: Tensor, bias: Tensor | None):
        module = forward.module
        self.originals[path] = (module.weight.clone(), None if module.bias is None else module.bias.clone())
        module.weight.copy_(weight)
        if bias is not None and module.bias is None:
            module.bias = nn.Parameter(bias, requires_grad=False)
        elif bias is not None:
            module.bias.copy_(bias)
        self._forwards[path] = (forward, list(forward.pieces))
        for piece in pieces:
            piece.on = False
        forward.pieces = [p for p in forward.pieces if p not in pieces]
        self._stacks += pieces
        if not any(p.on for p in forward.pieces):
            del module.forward

    @torch.no_grad()
    def unmerge(self, adapted: Adapted) -> None:
        for path, (weight, bias) in self.originals.items():
            module = adapted.backbone.body.get_submodule(path)
            module.weight.copy_(weight)
            if bias is None:
                module.bias = None
            else:
                module.bias.copy_(bias)
            forward, pieces = self._forwards[path]
            forward.pieces, module.forward = pieces, forward
        for piece in self._stacks:
            piece.on = True
        self.__init__()

    def _output(self, adapted: Adapted, check: Tensor | None) -> Tensor | None:
        if check is None:
            return None
        with evaluating(adapted):  # dropout draws anew and is no error of the merge
            features = adapted(check)
        return torch.cat([features.native.flatten(), features.tokens.flatten()])


def _upcast(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in at least float32, so that half-precision bases are rounded once."""
    dtype = torch.promote_types(module.weight.dtype, torch.float32)
    return module.weight.to(dtype), None if module.bias is None else module.bias.to(dtype)
