"""Folding adapters into base weights, and taking them out again bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import InputError
from .inject import WeightForward, effective
from .kinds import Delta, SiteModule, WeightMap
from .probe import evaluating

if TYPE_CHECKING:
    from .adapted import Adapted

TOLERANCE = 1e-4
"""Largest difference of outputs, relative to max(1, |y|), that the check of a merge lets pass."""

HALF_STEPS = 16
"""The same for outputs in half precision, in units of their last place: the merged weight is rounded to such a unit."""


@dataclass(frozen=True)
class Original:
    """What a merge replaced in one module.

    Attributes:
        weight: the whole weight, or the values that stood at `places`.
        bias: the whole bias, where the weight is whole.
        places: (k,) places in the flattened weight, None where the weight is whole.
    """

    weight: Tensor
    bias: Tensor | None = None
    places: Tensor | None = None

    def whole(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as they were, the module being merged still."""
        if self.places is None:
            return self.weight, self.bias
        weight = module.weight.detach().clone()
        self._put(weight)
        return weight, module.bias

    def _put(self, weight: Tensor) -> None:
        flat = weight.view(-1)
        flat.scatter_(0, self.places.to(flat.device), self.weight.to(flat))

    def restore(self, module: nn.Module) -> None:
        """Put it back."""
        if self.places is not None:
            self._put(module.weight)
            return
        module.weight.copy_(self.weight)
        if self.bias is None:
            module.bias = None
        else:
            module.bias.copy_(self.bias)


class Merger:
    """Folds adapters in and remembers what that replaced: whole weights, or the entries where a delta has only few.

    Adapters of few entries are therefore exchanged in little time: `unmerge()`, `enable(other)`, `merge(other)`.

    Attributes:
        names: adapters that are folded in at the moment.
        originals: what they replaced, by module path.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.originals: dict[str, Original] = {}
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
        try:
            for path, (forward, pieces) in plan.items():
                if not self._fold(path, forward.module, pieces):
                    raise InputError(f"merging {names} makes the weight of {path} non-finite; nothing was changed")
                self._leave(path, forward, pieces)
        except BaseException:
            self.unmerge(adapted)
            raise
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

    def _fold(self, path: str, module: nn.Module, pieces: list[SiteModule]) -> bool:
        """Write the pieces into one module and keep what stood there; False, and nothing written, if not finite."""
        if (sparse := _entries(module, pieces)) is not None:
            places, change = sparse
            flat = module.weight.view(-1)
            old = flat.index_select(0, places)
            new = (old.to(torch.promote_types(old.dtype, torch.float32)) + change).to(old.dtype)
            if not new.isfinite().all():
                return False
            self.originals[path] = Original(old, places=places)
            flat.scatter_(0, places, new)
            return True
        dtype, bias = module.weight.dtype, module.bias
        new_weight, new_bias = (v if v is None else v.to(dtype) for v in effective(*_upcast(module), pieces))
        if not (new_weight.isfinite().all() and (new_bias is None or new_bias.isfinite().all())):
            return False
        self.originals[path] = Original(module.weight.clone(), None if bias is None else bias.clone())
        module.weight.copy_(new_weight)
        if new_bias is not None and bias is None:
            module.bias = nn.Parameter(new_bias, requires_grad=False)
        elif new_bias is not None:
            bias.copy_(new_bias)
        return True

    def _leave(self, path: str, forward: WeightForward, pieces: list[SiteModule]) -> None:
        """Take folded pieces off their module, and the forward object with them if nothing else is at work there."""
        self._forwards[path] = (forward, list(forward.pieces))
        for piece in pieces:
            piece.on = False
        forward.pieces = [p for p in forward.pieces if p not in pieces]
        self._stacks += pieces
        if not any(p.on for p in forward.pieces):
            del forward.module.forward

    @torch.no_grad()
    def unmerge(self, adapted: Adapted) -> None:
        for path, original in self.originals.items():
            module = adapted.backbone.body.get_submodule(path)
            original.restore(module)
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


def _entries(module: nn.Module, pieces: list[SiteModule]) -> tuple[Tensor, Tensor] | None:
    """Places in the flattened weight and what the pieces add there; None where the whole weight has to be formed.

    All pieces must be sparse, and on rows of their own: what adds up at one place is rounded once.
    """
    if not module.weight.is_contiguous():
        return None
    found, width = [], module.weight[0].numel()
    taken = torch.zeros(len(module.weight), dtype=torch.bool)
    for piece in pieces:
        start, stop = piece.site.rows or (0, len(module.weight))
        entries = piece.entries() if isinstance(piece, Delta) else None
        if entries is None or taken[start:stop].any():
            return None
        taken[start:stop] = True
        found.append((entries.index.long() + start * width, piece.scale * entries.values))
    return tuple(torch.cat(parts) for parts in zip(*found))


def _upcast(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in at least float32, so that half-precision bases are rounded once."""
    dtype = torch.promote_types(module.weight.dtype, torch.float32)
    return module.weight.to(dtype), None if module.bias is None else module.bias.to(dtype)
