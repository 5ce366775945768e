"""Folding adapters into base weights, and taking them out again bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

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


class Whole:
    """Weight and bias of a module before a merge, None before it is written."""

    def __init__(self) -> None:
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    @torch.no_grad()
    def write(self, module: nn.Module, pieces: list[SiteModule]) -> bool:
        """Fold pieces in; False, and nothing written, where the result is not finite."""
        dtype, bias = module.weight.dtype, module.bias
        new_weight, new_bias = (v if v is None else v.to(dtype) for v in effective(*_upcast(module), pieces))
        if not (_finite(new_weight) and (new_bias is None or _finite(new_bias))):
            return False
        self.weight, self.bias = module.weight.clone(), None if bias is None else bias.clone()
        module.weight.copy_(new_weight)
        if new_bias is not None and bias is None:
            module.bias = nn.Parameter(new_bias, requires_grad=False)
        elif new_bias is not None:
            bias.copy_(new_bias)
        return True

    @torch.no_grad()
    def restore(self, module: nn.Module) -> None:
        if self.weight is None:
            return
        module.weight.copy_(self.weight)
        if self.bias is None:
            module.bias = None
        else:
            module.bias.copy_(self.bias)

    def of(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as they were, the module being merged still."""
        return self.weight, self.bias


class Places:
    """What stood at some places of a weight before a merge: (rows, places in them, values) of every piece."""

    def __init__(self) -> None:
        self.parts: list[tuple[slice, Tensor, Tensor]] = []

    @torch.no_grad()
    def write(self, module: nn.Module, pieces: list[Delta]) -> bool:
        """Fold the entries of pieces in; False, and the rest not written, where one is not finite."""
        for piece in pieces:
            rows, (places, values, _) = slice(*(piece.site.rows or (None,))), piece.entries()
            flat = module.weight[rows].view(-1)
            old = flat.index_select(0, places)
            change = values if piece.scale == 1 else piece.scale * values
            new = (old.to(torch.promote_types(old.dtype, torch.float32)) + change).to(old.dtype)
            if not _finite(new):
                return False
            self.parts.append((rows, places, old))
            flat.scatter_(0, places, new)
        return True

    @torch.no_grad()
    def restore(self, module: nn.Module) -> None:
        self._put(module.weight)

    def of(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as they were, the module being merged still."""
        weight = module.weight.detach().clone()
        self._put(weight)
        return weight, module.bias

    def _put(self, weight: Tensor) -> None:
        for rows, places, values in self.parts:
            weight[rows].view(-1).scatter_(0, places.to(weight.device), values.to(weight))


class Merger:
    """Folds adapters in and remembers what that replaced: whole weights, or the entries where a delta has only few.

    Adapters of few entries are therefore exchanged in little time: `unmerge()`, `enable(other)`, `merge(other)`.

    Attributes:
        names: adapters that are folded in at the moment.
        originals: what they replaced, by module path.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.originals: dict[str, Whole | Places] = {}
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
                self._leave(path, forward, pieces)
                self.originals[path] = Places() if _few(forward.module, pieces) else Whole()
            adapters = (adapted.adapters[n] for n in names)
            with evaluating(*self._stacks), _in_float32(adapters):  # what is drawn in training is not what is merged
                finite = self._each(lambda path: self.originals[path].write(plan[path][0].module, plan[path][1]))
            if bad := [path for path in plan if not finite[path]]:
                raise InputError(f"merging {names} makes the weight of {bad[0]} non-finite; nothing was changed")
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
            raise InputError(
                f"nothing of {', '.join(_told(adapted, n) for n in names)} can be folded into weights, which take in "
                "the kinds delta and weight alone; use the adapter file itself, which needs no merging"
            )
        adapted.check_starts(names)
        for name in names:
            if not adapted.is_enabled(name):
                raise InputError(f"adapter '{name}' is not enabled; merge folds what takes part, enable it first")
        plan = {}
        for path in dict.fromkeys(p.site.path for p in pieces if p.folds):
            module = adapted.backbone.body.get_submodule(path)
            forward: WeightForward = module.forward
            active = forward.ordered()
            chosen = [p for p in active if id(p) in folding]
            left = [p for p in active if id(p) not in folding]
            if chosen and any(isinstance(p, WeightMap) for p in active) and left:
                other = left[0].owner
                raise InputError(
                    f"{path} also carries the enabled adapter '{other}'; merge both together or disable it"
                )
            if drawn := next((p.owner for p in chosen if p.training and p.by_forward() and p.random), None):
                raise InputError(
                    f"adapter '{drawn}' is random in training mode (dropout), and no weight gives what it gives now; "
                    "call eval() before merging"
                )
            if chosen and not module.weight.is_floating_point():
                raise InputError(f"the weight of {path} is stored as {module.weight.dtype}; nothing merges into it")
            if chosen:
                plan[path] = (forward, chosen)
        return plan

    def _leave(self, path: str, forward: WeightForward, pieces: list[SiteModule]) -> None:
        """Take folded pieces off their module, and the forward object with them if nothing else is at work there."""
        self._forwards[path] = (forward, list(forward.pieces))
        for piece in pieces:
            piece.on = False
        forward.pieces = [p for p in forward.pieces if p not in pieces]
        self._stacks += pieces
        if not any(p.on for p in forward.pieces):
            del forward.module.forward

    def unmerge(self, adapted: Adapted) -> None:
        self._each(lambda path: self.originals[path].restore(self._forwards[path][0].module))
        for forward, pieces in self._forwards.values():
            forward.pieces, forward.module.forward = pieces, forward
        for piece in self._stacks:
            piece.on = True
        self.__init__()

    def _each(self, function: Callable[[str], Any]) -> dict[str, Any]:
        """What a function gives for every module path.

        Single entries are written side by side: a thread spends its time on waiting for memory. Whole weights are
        written one after the other, with all threads on each.
        """
        few = [path for path, original in self.originals.items() if isinstance(original, Places)]
        threads = torch.get_num_threads()
        if threads == 1 or not few:
            return {path: function(path) for path in self.originals}
        shares = [few[n::threads] for n in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            done = pool.map(lambda paths: [(path, function(path)) for path in paths], shares)
            found = dict(pair for share in done for pair in share)
        return found | {path: function(path) for path in self.originals if path not in found}

    def _output(self, adapted: Adapted, check: Tensor | None) -> Tensor | None:
        if check is None:
            return None
        with evaluating(adapted):  # dropout draws anew and is no error of the merge
            features = adapted(check)
        return torch.cat([features.native.flatten(), features.tokens.flatten()])


def _told(adapted: Adapted, name: str) -> str:
    """An adapter for a message: its name, its class and what it is made of."""
    kinds = ", ".join(sorted({p.kind for p in adapted.pieces(name)}))
    return f"'{name}' ({type(adapted.adapters[name]).__name__}, {f'kind {kinds}' if kinds else 'no pieces'})"


def _few(module: nn.Module, pieces: list[SiteModule]) -> bool:
    """True if the pieces can be written entry by entry: all are sparse and on rows of their own.

    On shared rows entries may meet, and what adds up at one place is rounded once only if the whole weight is formed.
    """
    if not all(isinstance(p, Delta) and p.entries() is not None for p in pieces):
        return False
    rows = sorted(p.site.rows or (0, len(module.weight)) for p in pieces)
    if any(stop > start for (_, stop), (start, _) in pairwise(rows)):
        return False
    return module.weight.is_contiguous()


@contextmanager
def _in_float32(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Adapters in half precision are in float32 here, as the weights are that they change.

    Adapters are cast as a whole, so that their first parameter tells; looking at all takes as long as a sparse merge.
    """
    cast = [m for m in modules if any(p.element_size() < 4 for p in islice(m.parameters(), 1))]
    values = [v for m in cast for v in (*m.parameters(), *m.buffers())]
    halves = [(v, v.data) for v in values if v.is_floating_point() and v.element_size() < 4]
    try:
        for value, half in halves:
            value.data = half.float()
        yield
    finally:
        for value, half in halves:
            value.data = half


def _finite(values: Tensor) -> bool:
    """No infinity and no NaN; smallest and largest value pass NaN on."""
    if values.numel() == 0:
        return True
    low, high = values.aminmax()
    return math.isfinite(low.item() + high.item())


def _upcast(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in at least float32, so that half-precision bases are rounded once."""
    dtype = torch.promote_types(module.weight.dtype, torch.float32)
    return module.weight.to(dtype), None if module.bias is None else module.bias.to(dtype)
