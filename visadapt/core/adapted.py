"""A backbone with adapters: what tasks hold in place of the backbone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import InputError, hint
from .adapter import Adapter
from .calibrate import measured
from .inject import attach, detach
from .io import LoadReport, load_adapter, save_adapter
from .kinds import SiteModule
from .merging import Merger
from .report import TrainableReport, trainable_report
from .swap import BaseValues

if TYPE_CHECKING:
    from ..backbones.base import Backbone, Features


class Adapted(nn.Module):
    """A frozen backbone and any number of named adapters.

    The backbone stays in eval mode under `train()` unless `base_mode="train"` (recipes with stochastic depth).
    At one site, weight maps act in the order of `add`, then deltas, then token modules.

    Args:
        backbone: frozen here, once; enabling and disabling adapters never touches `requires_grad`.
        base_mode: "eval" or "train".
    """

    def __init__(self, backbone: Backbone, base_mode: str = "eval") -> None:
        super().__init__()
        if base_mode not in ("eval", "train"):
            raise InputError(f"base_mode is 'eval' or 'train', got '{base_mode}'")
        self.backbone = backbone.requires_grad_(False)
        self.base_mode = base_mode
        self.adapters = nn.ModuleDict()
        self.ctx = backbone.ctx
        self.merger = Merger()
        self.base_values = BaseValues()
        if any(isinstance(m, nn.TransformerEncoderLayer | nn.MultiheadAttention) for m in backbone.modules()):
            torch.backends.mha.set_fastpath_enabled(
                False
            )  # the fused path reads raw weights and skips what is attached
        self.train(self.training)

    # ---- adapters -------------------------------------------------------------------------------------------------
    def add(self, name: str, adapter: Adapter, enable: bool = True) -> Adapter:
        """Build an adapter for the backbone and attach it.

        Raises:
            InputError: a bad or taken name, a missing capability, or targets that match nothing.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise InputError(f"adapter name '{name}' may have letters, digits, '_' and '-' only")
        if name in self.adapters:
            raise InputError(f"adapter '{name}' exists already; remove it first or take another name")
        if self.merger.names:
            raise InputError(f"adapter '{name}' cannot be added while {self.merger.names} are merged; unmerge first")
        if enable and self.ctx.ids is not None:
            raise InputError(
                f"a mixed batch is being routed; add '{name}' with enable=False, or end it with route(None)"
            )
        if enable and adapter.trains_base and self.base_values.active:
            raise InputError(
                f"adapters '{self.base_values.active}' and '{name}' both replace base values; disable the first, "
                "or add with enable=False"
            )
        adapter.build(self.backbone)
        reference = next(self.backbone.parameters())
        adapter.to(reference.device)
        attached = []
        try:
            for piece in self._pieces_of(name, adapter):
                piece.owner = name
                if piece.site is not None:
                    attach(piece, self.backbone, self.ctx)
                    attached.append(piece)
            if enable:
                self._check_rebases([*(p for p in self.pieces() if p.on), *adapter.pieces.values()])
        except InputError:
            for piece in attached:
                detach(piece, self.backbone)
            raise
        self.adapters[name] = adapter
        if adapter.trains_base:
            self.base_values.register(name, adapter.base_parameters(self.backbone), self.backbone.body)
        self.train(self.training)
        if enable:
            for piece in self.pieces(name):
                piece.on = True
            if adapter.trains_base:
                self.base_values.activate([name], self.backbone.body)
        return adapter

    def remove(self, name: str) -> None:
        """Detach an adapter and forget it; the backbone is as it was before.

        Raises:
            InputError: an unknown name, other adapters are merged, or images are being routed to it.
        """
        self.known([name])
        if name in (self.ctx.ids or ()):
            raise InputError(f"images are being routed to adapter '{name}'; end that with route(None) first")
        if name in self.merger.names:
            self.unmerge()
        elif self.merger.names:
            raise InputError(f"adapter '{name}' cannot be removed while {self.merger.names} are merged; unmerge first")
        for piece in self.pieces(name):
            if piece.site is not None:
                detach(piece, self.backbone)
        self.base_values.forget(name, self.backbone.body)
        del self.adapters[name]

    def _pieces_of(self, name: str, adapter: Adapter) -> Iterator[SiteModule]:
        yield from adapter.sides()
        yield from adapter.pieces.values()

    def pieces(self, *names: str) -> list[SiteModule]:
        """All pieces of the named adapters, of every adapter where no name is given."""
        chosen = names or tuple(self.adapters)
        return [p for n in chosen for p in self._pieces_of(n, self.adapters[n])]

    def known(self, names: Iterable[str]) -> None:
        """Refuse names that are not attached."""
        for name in names:
            if name not in self.adapters:
                raise InputError(f"no adapter '{name}'{hint(name, self.adapters) or '; none is attached'}")

    # ---- switching ------------------------------------------------------------------------------------------------
    def is_enabled(self, name: str) -> bool:
        return self.base_values.active == name or any(p.on for p in self.pieces(name)) or name in self.merger.names

    def enable(self, *names: str, scale: float | None = None) -> None:
        """Let exactly these adapters take part, with `scale` as factor on what they change (1 where None).

        Raises:
            InputError: an unknown name, a merged adapter, a mixed batch, a scale on a kind that has none, or two
                adapters that replace base values; nothing is switched then.
        """
        self.known(names)
        if self.merger.names:
            raise InputError(f"{self.merger.names} are merged into the backbone; unmerge before switching adapters")
        if self.ctx.ids is not None:
            raise InputError("a mixed batch is being routed; end routing with route(None) before switching adapters")
        factor = 1.0 if scale is None else float(scale)
        for piece in self.pieces(*names) if names else ():
            if factor != 1 and piece.kind in ("attention", "prompt"):
                raise InputError(f"adapter '{piece.owner}' has pieces of kind {piece.kind}; they cannot be scaled")
        for name in (n for n in names if factor != 1 and self.adapters[n].trains_base):
            raise InputError(f"adapter '{name}' replaces base values; they cannot be scaled")
        self._check_rebases(self.pieces(*names) if names else [])
        self.base_values.activate([n for n in names if self.adapters[n].trains_base], self.backbone.body)
        for piece in self.pieces():
            piece.on = piece.owner in names
            if piece.on:
                piece.scale = factor

    @staticmethod
    def _check_rebases(pieces: Iterable[SiteModule]) -> None:
        """Refuse two pieces that both stand for a part of the same base rows."""
        seen: dict[str, list[SiteModule]] = {}
        for piece in (p for p in pieces if p.rebases):
            start, stop = piece.site.rows or (0, math.inf)
            for other in seen.setdefault(piece.site.path, []):
                first, last = other.site.rows or (0, math.inf)
                if start < last and first < stop:
                    raise InputError(
                        f"adapters '{other.owner}' and '{piece.owner}' both start from the base weight of "
                        f"{piece.site.path} and stand for a part of it; use, save and load one at a time, or give them "
                        "other targets"
                    )
            seen[piece.site.path].append(piece)

    def disabled(self) -> AbstractContextManager[None]:
        """The bare base inside the block; the same adapters as before behind it."""
        return self.only()

    @contextmanager
    def only(self, *names: str) -> Iterator[None]:
        """Exactly these adapters inside the block, without routing; everything as before behind it."""
        before = [n for n in self.adapters if self.is_enabled(n)]
        states = [(p, p.on, p.scale) for p in self.pieces()]
        ids, self.ctx.ids = self.ctx.ids, None
        try:
            self.enable(*names)
            yield
        finally:
            self.base_values.activate([n for n in before if self.adapters[n].trains_base], self.backbone.body)
            for piece, on, scale in states:
                piece.on, piece.scale = on, scale
            self.ctx.ids = ids

    def route(self, ids: Sequence[str | int | None] | None) -> None:
        """Give every image of the coming batches its own weight adapter.

        Args:
            ids: per image an adapter name or its number in order of `add`; -1 or None is the bare base. `ids=None`
                ends routing.

        Raises:
            InputError: an unknown name or number, or an adapter that is more than weights.
        """
        if ids is None:
            self.ctx.ids = None
            return
        if self.merger.names:
            raise InputError(f"{self.merger.names} are merged into the backbone; unmerge before routing")
        names = list(self.adapters)
        resolved: list[str | None] = []
        for position, given in enumerate(ids):
            if given is None or given == -1:
                resolved.append(None)
            elif isinstance(given, str):
                self.known([given])
                resolved.append(given)
            elif 0 <= int(given) < len(names):
                resolved.append(names[int(given)])
            else:
                raise InputError(
                    f"image {position}: no adapter number {given}; there are {len(names)}: {', '.join(names)}"
                )
        for name in {r for r in resolved if r is not None}:
            kinds = sorted({p.kind for p in self.pieces(name)} - {"delta", "weight"})
            if kinds or self.adapters[name].trains_base:
                what = f"kinds {kinds}" if kinds else "trained base values"
                raise InputError(
                    f"adapter '{name}' has {what}; only delta and weight adapters can be mixed in one batch"
                )
        if self.base_values.active:
            raise InputError(f"adapter '{self.base_values.active}' has replaced base values; disable it before routing")
        loose = [n for n in names if any(p.on and p.kind not in ("delta", "weight") for p in self.pieces(n))]
        if loose:
            raise InputError(f"adapter '{loose[0]}' is enabled for all images; disable it before routing")
        self.ctx.ids = resolved

    # ---- training -------------------------------------------------------------------------------------------------
    def set_trainable(self, *names: str, heads: Iterable[nn.Module] = ()) -> None:
        """Exactly these adapters (and heads) get gradients. The only place that sets `requires_grad`."""
        self.known(names)
        self.requires_grad_(False)
        for name in names:
            self.adapters[name].requires_grad_(True)
            for parameter in self.base_values.parameters(name, self.backbone.body):
                parameter.requires_grad_(True)
        for head in heads:
            head.requires_grad_(True)

    def calibrate(self, name: str, losses: Iterable[Callable[[], Tensor]]) -> None:
        """Give an adapter the start from data that it asks for; nothing happens where it asks for none.

        Args:
            name: the adapter.
            losses: one function per batch that runs the model and gives its scalar loss; the first
                `calibration_batches` of them are used.

        Raises:
            InputError: an unknown name, or no batches.
        """
        self.known([name])
        adapter = self.adapters[name]
        if adapter.calibration is not None:
            sites = [p.site for p in adapter.pieces.values()]
            batches = islice(losses, adapter.calibration_batches)
            adapter.calibrate(measured(self, sites, batches, adapter.calibration))

    def check_starts(self, names: Iterable[str]) -> None:
        """Refuse enabled adapters whose start comes from data and has not come."""
        for name in names:
            adapter = self.adapters[name]
            if adapter.calibration is None or adapter.started or not self.is_enabled(name):
                continue
            if not adapter.has_start():
                raise InputError(
                    f"adapter '{name}' takes its start from data and has none yet; call "
                    f"adapted.calibrate('{name}', losses) first, which training from a config does"
                )
            adapter.started = True

    def losses(self) -> dict[str, Tensor]:
        """Regularisers of the enabled adapters, as "loss_<adapter>_<name>"."""
        enabled = [n for n in self.adapters if self.is_enabled(n)]
        return {f"loss_{n}_{k}": v for n in enabled for k, v in self.adapters[n].losses().items()}

    def queries(self) -> Tensor | None:
        """Object queries (n, d) of the enabled adapter that offers some to a head that predicts masks, or None.

        Raises:
            InputError: two adapters offer some.
        """
        offered = {n: q for n in self.adapters if self.is_enabled(n) and (q := self.adapters[n].queries()) is not None}
        if len(offered) > 1:
            raise InputError(f"adapters {list(offered)} all offer queries to the head; enable one of them")
        return next(iter(offered.values()), None)

    def trainable_report(self, heads: dict[str, nn.Module] | None = None) -> TrainableReport:
        """What trains, by adapter and head, against the size of the base."""
        return trainable_report(self, heads or {})

    def train(self, mode: bool = True) -> Adapted:
        super().train(mode)
        if self.base_mode == "eval":
            self.backbone.eval()
        return self

    # ---- merging --------------------------------------------------------------------------------------------------
    def merge(self, *names: str, check: Tensor | None = None) -> int:
        """Fold adapters into the base weights; what cannot fold stays attached.

        Args:
            names: adapters to fold, all enabled ones where none is given.
            check: images; outputs before and after are compared at 1e-4, in half precision at 16 units in the last
                place.

        Returns:
            The number of modules whose weights changed.

        Raises:
            InputError: nothing folds (with the kinds that are there), a weight becomes non-finite, or the check fails.
        """
        self.known(names)
        chosen = list(names) or [n for n in self.adapters if self.is_enabled(n)]
        return self.merger.merge(self, chosen, check)

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit, and the adapters to work again."""
        self.merger.unmerge(self)

    # ---- files ----------------------------------------------------------------------------------------------------
    def save(
        self, path: str, *names: str, heads: dict[str, nn.Module] | None = None, extra: dict | None = None
    ) -> None:
        """Write adapters (all where none is named) and heads to one file; see `core.io.save_adapter`."""
        save_adapter(self, path, *names, heads=heads, extra=extra)

    def load(self, path: str, heads: dict[str, nn.Module] | None = None, check_base: bool = True) -> LoadReport:
        """Read an adapter file, attaching what is not attached yet; see `core.io.load_adapter`."""
        return load_adapter(self, path, heads=heads, check_base=check_base)

    # ---- running --------------------------------------------------------------------------------------------------
    def forward(self, x: Tensor, views: int = 1) -> Features:
        """(B, C, H, W) normalised images to features; arguments and errors as those of `begin`.

        The features are those of all images, then, with two views, of all images again: (views * B, ...).
        """
        return self.backbone(self.begin(x, views))

    def begin(self, x: Tensor, views: int = 1) -> Tensor:
        """Start a pass: checks, context and side networks.

        Args:
            x: (B, C, H, W), normalised.
            views: how many times each of them passes, 1 or 2, for adapters that are random in training.

        Returns:
            The images, padded and repeated, for the backbone.

        Raises:
            InputError: routing ids or task numbers for another number of images, more than two views, adapters of
                another precision than the backbone without autocast, or training without the start that data give.
        """
        if self.training and torch.is_grad_enabled():
            self.check_starts(self.adapters)
        if views not in (1, 2):
            raise InputError(f"views is 1 or 2, got {views}")
        self._check_precision(x.device.type)
        if (tasks := self.ctx.tasks) is not None and not isinstance(tasks, Tensor):
            raise InputError(f"ctx.tasks is a {type(tasks).__name__}; it must be a tensor of int64, or None")
        if tasks is not None and (tasks.shape != x.shape[:1] or tasks.dtype != torch.int64):
            given = f"{list(tasks.shape)} of {str(tasks.dtype).removeprefix('torch.')}"
            raise InputError(f"ctx.tasks is {given}; {x.shape[0]} images need {x.shape[0]} numbers of int64, or None")
        if views > 1:
            x = x.repeat(views, 1, 1, 1)
        if self.ctx.ids is not None and len(self.ctx.ids) != x.shape[0]:
            raise InputError(f"route() was given {len(self.ctx.ids)} ids and the batch has {x.shape[0]} images")
        x = self.backbone.pad(x)
        self.ctx.begin(x, self.backbone.grid(x), self.backbone.prefix, views)
        for side in (s for a in self.adapters.values() for s in a.sides() if s.on):
            for key, value in side(self.ctx).items():
                self.ctx.values[f"{side.owner}.{key}"] = value
        return x

    def _check_precision(self, device: str) -> None:
        """Adapters are made in float32; with a base in half precision only autocast brings both together."""
        dtype = next(self.backbone.parameters()).dtype
        if dtype not in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(device):
            return
        for piece in (p for p in self.pieces() if p.on):
            if any(p.dtype != dtype for p in piece.parameters()):
                half = str(dtype).removeprefix("torch.")
                raise InputError(
                    f"the backbone is in {half} and adapter '{piece.owner}' is not; run it under "
                    f"torch.autocast('{device}', {dtype}), merge the adapter, or convert both"
                )
