"""A bridge to the tuners of Hugging Face's PEFT.

For every site PEFT gets a layer of its own to wrap, of the site's shape and without a weight: the weight, or the slice
of a fused weight, is handed in at each call and taken away again. So the backbone keeps its modules and keys, files
hold PEFT's tensors only, and an adapter works on whatever base it is attached to.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.inject import RowsOf, effective, run_with
from ..core.kinds import WeightMap
from ..core.progress import Progress
from ..core.sites import WEIGHTS, Site
from ..errors import InputError
from ..registry import ADAPTERS
from ._common.low_rank import require_rank
from ._common.peft_ranks import RankSchedule
from ._common.peft_rules import RANKS, TUNERS, Tuner, check_options, kind_of, tuner_name

NAME = "default"
"""What PEFT calls the one adapter of its layers."""


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise InputError("PEFT needs the package peft: pip install 'visadapt[peft]'") from error
    return peft


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever PEFT raises about user input, which has no common class, into an InputError of one line."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{what}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _rows(module: nn.Module, rows: tuple[int, int] | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a site in float32, detached."""
    cut = slice(*rows) if rows else slice(None)
    return tuple(None if t is None else t.detach()[cut].float() for t in (module.weight, module.bias))


def _twin(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer like `module` with copies of weight and bias; copies, for some tuners write into what they wrap."""
    has_bias = bias is not None
    if isinstance(module, nn.Linear):
        twin = nn.Linear(weight.shape[1], weight.shape[0], bias=has_bias, device="meta")
    elif isinstance(module, nn.Conv2d):
        twin = nn.Conv2d(
            *(module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding),
            *(module.dilation, module.groups, has_bias, module.padding_mode, "meta"),
        )
    else:
        twin = nn.LayerNorm(module.normalized_shape, module.eps, bias=has_bias, device="meta")
    twin.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if has_bias:
        twin.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return twin


class _Live(Tensor):
    """A weight whose `data` is itself: some layers of PEFT read it so, and no gradient would reach what is below."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # results are plain tensors

    @property
    def data(self) -> Tensor:
        return self


def _hide(parent: nn.Module, name: str) -> None:
    """Keep a submodule as a plain attribute: it is called as before, and belongs to no state dict of the parent."""
    parent.__dict__[name] = parent._modules.pop(name)


def _settle(layer: nn.Module, keep: tuple[str, ...]) -> None:
    """Take the base out of a layer of PEFT and make everything in it that does not train a buffer."""
    base = layer.base_layer
    _hide(layer, "base_layer")
    base._parameters.clear()
    base.weight = base.bias = None
    for module in layer.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not parameter.requires_grad:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach())
    for name in keep:
        getattr(layer, name)._non_persistent_buffers_set.clear()


def _take_common(layers: Sequence[nn.Module]) -> nn.ModuleDict:
    """The modules that several layers of PEFT hold together, taken out of them."""
    parts = [(layer, name, part) for layer in layers for name, part in layer.named_children()]
    times = Counter(id(part) for _, _, part in parts)
    common = nn.ModuleDict()
    for layer, name, part in parts:
        if times[id(part)] > 1:
            common[name] = part
            _hide(layer, name)
    return common


def _unit_inputs(base: nn.Module, weight: Tensor) -> tuple[Tensor, tuple]:
    """Inputs, one per column of the weight and a last one of zeros, and where in the output their answers stand."""
    count = weight[0].numel()
    units = torch.eye(count + 1, count, dtype=weight.dtype, device=weight.device)
    if isinstance(base, nn.Linear):
        return units[None], (0,)
    index = [-(-p // s) for p, s in zip(base.padding, base.stride)]  # the first window without padding
    start = [i * s - p for i, s, p in zip(index, base.stride, base.padding)]
    x = F.pad(units.view(-1, *weight.shape[1:]), (start[1], 0, start[0], 0))
    return x, (..., *index)


class PEFTSite(WeightMap):
    """One layer of PEFT around the base weight of a site.

    Every supported layer is an affine map of its input for fixed parameters, so its weight and bias can be read off its
    answers to the columns of an identity matrix and to zero, whatever the method. That is `map`, for merging and for
    pieces behind this one; running uses the layer itself.

    Args:
        site: where it sits.
        layer: the layer of PEFT, without a base weight.
        random: it draws random numbers in training.
        adds_bias: it gives a bias to a base without one.
    """

    def __init__(self, site: Site, layer: nn.Module, random: bool, adds_bias: bool) -> None:
        super().__init__(site)
        self.layer = layer
        self.random, self.adds_bias = random, adds_bias

    def start_below(self) -> None:
        """Work on the base less what the layer adds now (PiSSA, OLoRA), so that together they are the base."""
        self.register_buffer("start_a", self.layer.lora_A[NAME].weight.detach().clone())
        self.register_buffer("start_b", self.layer.lora_B[NAME].weight.detach().clone())
        self.rebases = True

    def by_forward(self) -> bool:
        return True

    def run(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """Output of the layer around weight w and bias b."""
        if "start_a" in self._buffers:
            w = w - self.layer.scaling[NAME] * (self.start_b @ self.start_a).to(w.dtype)
        base = self.layer.base_layer
        w, b = w[:], None if b is None else b[:]  # a Parameter would become one of the layer's own
        base.weight, base.bias = w.as_subclass(_Live) if w.requires_grad else w, b
        try:
            if not isinstance(base, nn.Linear):
                return self.layer(x)
            y = self.layer(x.reshape(x.shape[0], -1, x.shape[-1]))  # some layers take (B, N, C) only
            return y.reshape(*x.shape[:-1], y.shape[-1])
        finally:
            base.weight = base.bias = None

    def map(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        base = self.layer.base_layer
        if isinstance(base, nn.LayerNorm):
            trained = self.layer.ln_tuning_layers[NAME]
            return trained.weight, trained.bias
        x, where = _unit_inputs(base, w)
        training = self.layer.training
        self.layer.eval()
        try:
            with torch.autocast(x.device.type, enabled=False):
                y = self.run(x, w, b)[where]
        finally:
            self.layer.train(training)
        return (y[:-1] - y[-1]).mT.reshape(w.shape), y[-1] if b is not None or self.adds_bias else None

    def forward(self, x: Tensor, base: RowsOf) -> Tensor:
        module = base.forward.module
        start, stop = self.site.rows or (0, module.weight.shape[0])
        before = [p for p in base.pieces if p.site.rows is None or (p.site.rows[0] < stop and start < p.site.rows[1])]
        for piece in before:
            if self.training and piece.by_forward() and getattr(piece, "random", True):
                raise InputError(
                    f"{self.site.path}: adapter '{piece.owner}' is random in training (dropout) and '{self.owner}' "
                    "works on its weight; set its dropout to 0, or add it after"
                )
        weight, bias = effective(module.weight, module.bias, before)
        return self.run(x, weight[start:stop], None if bias is None else bias[start:stop])

    @torch.no_grad()
    def is_identity(self, module: nn.Module, w: Tensor, b: Tensor | None) -> bool:
        """Whether the layer answers a random input as the base does.

        Raises:
            ArithmeticError: the answer is not finite.
        """
        size = (w.shape[-1],)
        if isinstance(module, nn.Conv2d):
            size = (module.in_channels, *(2 * k for k in module.kernel_size))
        x = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).to(w)
        self.layer.eval()
        ours, theirs = self.run(x, w, b), run_with(module, x, w, b)
        self.layer.train()
        if not ours.isfinite().all():
            raise ArithmeticError("the output is not finite")
        return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@ADAPTERS.register_module()
class PEFT(Adapter):
    """A tuner of Hugging Face's PEFT, by name and options, at sites of the backbone.

    Tensors that a tuner shares between layers (VeRA, RandLoRA, VBLoRA, ...) are shared between the sites and saved
    once. Options that are patterns over names (`rank_pattern`) see site keys such as "trunk_03_q". The ranks of AdaLoRA
    fall as training goes on, by its schedule over the whole run.

    Args:
        tuner: name of the tuner in any case: HRA, VeRA, OFT, IA3, LNTuning, DoRA, ...
        options: arguments of the tuner's configuration class in PEFT, as JSON values.
        targets: roles of linears, for some tuners of convolutions, for LNTuning of norms.
        layers: block indices.

    Attributes:
        identity_at_init: measured when it is built; UniLoRA and VBLoRA have no such start.

    Raises:
        InputError: PEFT is not installed; a tuner, option or place that it does not have; or one that was measured to
            break, with the reason.
    """

    kinds = ("weight",)
    targets = ("q", "v")
    roles = WEIGHTS
    paper = "PEFT (Mangrulkar et al., 2022), https://github.com/huggingface/peft; every tuner has its own paper there"
    extra = "peft"
    stands_for = ("tuner", "visadapt.adapters._common.peft_rules:TUNERS")
    mergeable = True
    identity_at_init = True

    def __init__(
        self,
        tuner: str,
        options: Mapping[str, Any] | None = None,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.tuner, self.options = tuner_name(tuner), dict(options or {})
        try:
            json.dumps(self.options)
        except TypeError as error:
            raise InputError(f"PEFT '{self.tuner}': options must be JSON values ({error})") from error
        config = self.config([])
        self.random = self.rule.noisy or any(v for k, v in vars(config).items() if k.endswith("dropout"))
        self.adds_bias = self.rule.adds_bias or vars(config).get("lora_bias", False)
        self.ranks = RankSchedule(config) if self.tuner == "AdaLoRA" else None
        self._layers: dict[str, nn.Module] = {}

    @property
    def rule(self) -> Tuner:
        return TUNERS[self.tuner]

    def config(self, sites: Sequence[Site]) -> Any:
        """PEFT's configuration of this tuner for these sites."""
        peft = _peft()
        cls = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[self.rule.type]]
        fields = [f.name for f in dataclasses.fields(cls)]
        options = {**self.rule.defaults, **self.options}
        check_options(self.tuner, options, fields)
        places = {"target_modules": [s.key for s in sites]}
        if "feedforward_modules" in fields:  # IA3 scales the input of the second MLP linear, elsewhere the output
            places["feedforward_modules"] = [s.key for s in sites if s.role == "fc2"]
        if "total_step" in fields:  # PEFT wants a number before the length of the run is known
            places["total_step"] = sys.maxsize
        with _explained(f"PEFT '{self.tuner}' refuses its options"):
            return cls(**places, **options)

    def build(self, backbone) -> None:
        super().build(backbone)
        if self.ranks is not None:
            self.ranks.start(self.pieces)

    def losses(self) -> dict[str, Tensor]:
        loss = None if self.ranks is None else self.ranks.loss(self.pieces)
        return {} if loss is None else {"orthogonality": loss}

    def on_step(self, progress: Progress) -> None:
        if self.ranks is not None:
            self.ranks.check(progress)

    def on_update(self, progress: Progress) -> None:
        if self.ranks is not None:
            self.ranks.update(self.pieces, progress)

    def finalize(self) -> None:
        if self.ranks is not None:
            self.ranks.mask(self.pieces)

    def _check(self, site: Site, module: nn.Module) -> None:
        who, kind = f"PEFT '{self.tuner}': {site.path}", kind_of(module)
        if kind not in self.rule.modules:
            raise InputError(f"{who} is a {type(module).__name__}; it works on {' and '.join(self.rule.modules)}")
        if kind != "Conv2d":
            return
        square = all(
            not isinstance(v, str) and len(set(v)) == 1 for v in (module.kernel_size, module.stride, module.padding)
        )
        if not square or module.groups > 1 or module.dilation != (1, 1) or module.padding_mode != "zeros":
            raise InputError(
                f"{who} has groups, dilation, a special padding or a kernel that is not square; most tuners get those "
                "wrong and the bridge takes none of them"
            )
        if self.tuner == "OFT" and module.kernel_size != (1, 1):
            raise InputError(
                f"{who} has a kernel of {module.kernel_size}; PEFT rotates overlapping patches and adds them up, so "
                "that a fresh adapter changes the output; OFT works on kernels of 1"
            )

    def shared(self, sites: list[Site], backbone) -> nn.ModuleDict:
        modules = [backbone.body.get_submodule(site.path) for site in sites]
        for site, module in zip(sites, modules):
            self._check(site, module)
        holder = nn.ModuleDict({s.key: _twin(m, *_rows(m, s.rows)) for s, m in zip(sites, modules)})
        sizes = sorted({f"{s.dim_out} x {s.dim_in}" for s in sites})
        config = self.config(sites)
        with _explained(f"PEFT '{self.tuner}' refuses sites of {', '.join(sizes)}"):
            _peft().get_peft_model(holder, config)
        if not any(p.requires_grad for p in holder.parameters()):
            raise InputError(f"PEFT '{self.tuner}': with the options {self.options} nothing of it trains")
        self._layers = dict(holder.items())
        return _take_common(list(self._layers.values()))

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> PEFTSite:
        layer, module = self._layers.pop(site.key), backbone.body.get_submodule(site.path)
        weight, bias = _rows(module, site.rows)
        if (rank := self.options.get(RANKS.get(self.tuner))) is not None:
            require_rank(f"PEFT '{self.tuner}'", rank, site, tuple(weight.flatten(1).shape))
        moved = not torch.equal(layer.base_layer.weight, weight)
        _settle(layer, self.rule.keep)
        piece = PEFTSite(site, layer, self.random, self.adds_bias)
        if moved and not hasattr(layer, "lora_A"):
            raise InputError(f"PEFT '{self.tuner}': these options rewrite base weights; the base has to stay as it is")
        if moved:
            piece.start_below()
        with _explained(f"PEFT '{self.tuner}' with the options {self.options} fails at {site.path}"):
            if not piece.is_identity(module, weight, bias):
                self.identity_at_init = False
        return piece
