"""Helpers for tests of adapters and backbones: tiny networks, noise, tolerances, parity kits."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .backbones.base import Backbone
from .core.adapted import Adapted
from .core.progress import Progress
from .registry import BACKBONES, ROOT

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest difference, relative to max(1, |y|), of two ways to compute the same thing, by the dtype of the result."""

KITS = "VISADAPT_PARITY"
"""Environment variable with the folder of parity kits; `../shared/parity` beside the repository where it is unset."""


# ---- tiny networks ------------------------------------------------------------------------------------------------
@torch.no_grad()
def noise(parameters: nn.Module | Iterable[Tensor], std: float = 0.1, seed: int = 0) -> None:
    """Add normal random numbers to all parameters.

    A constant would not do: the next LayerNorm removes what is the same in all channels.
    """
    generator = torch.Generator().manual_seed(seed)
    for value in parameters.parameters() if isinstance(parameters, nn.Module) else parameters:
        value.add_(std * torch.randn(value.shape, generator=generator, dtype=value.dtype))


def tiny_backbone(config: dict[str, Any], seed: int = 0) -> Backbone:
    """A backbone in eval mode with random values everywhere: norms, biases and LayerScale too.

    Batch norms have the statistics of random images, as a trained network has those of its data; without them values
    would grow from layer to layer.

    Args:
        config: `dict(type="TimmViT", name=..., arch=dict(depth=2, ...))`.
        seed: of all values; the global random state is left alone.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        backbone = BACKBONES.build(config)
    noise(backbone, seed=seed)
    side, generator = 2 * backbone.patch, torch.Generator().manual_seed(seed)
    settle(backbone.eval(), lambda: backbone(torch.randn(4, backbone.in_chans, side, side, generator=generator)))
    return backbone


@torch.no_grad()
def settle(parts: nn.Module, run: Callable[[], Any]) -> None:
    """Set the statistics of all batch norms in `parts` to those of what `run` sends through them."""
    norms = [module for module in parts.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.training, norm.momentum = True, 1.0
    if norms:
        run()
    for norm in norms:
        norm.training, norm.momentum = False, 0.1


def trained(adapted: Adapted, name: str) -> dict[str, nn.Parameter]:
    """All parameters that adapter `name` trains, its own and those of the base, by a name for messages."""
    in_place = adapted.adapters[name].base_parameters(adapted.backbone)
    found = {f"base {key}": adapted.backbone.body.get_parameter(key) for key in in_place}
    return dict(adapted.adapters[name].named_parameters()) | found


def progress(step: int, total: int = 10) -> Progress:
    """A step of a run of one epoch."""
    return Progress(step, total, 0, 1, torch.Generator().manual_seed(step))


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to max(1, |expected|); NaN where a value is NaN."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    return ((actual - expected).abs() / expected.abs().clamp(min=1)).max().item() if expected.numel() else 0.0


def assert_close(actual: Tensor, expected: Tensor, what: str = "output", tolerance: float | None = None) -> None:
    """Raise AssertionError where two results differ by more than the tolerance of their dtype."""
    allowed = TOLERANCES[expected.dtype] if tolerance is None else tolerance
    error = difference(actual, expected)
    assert error <= allowed, f"{what} differs by {error:.1e}, allowed {allowed:.0e}"


# ---- parity kits --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Kit:
    """One recorded run of an official implementation.

    Attributes:
        path: the JSON file; the tensors lie beside it.
        info: what the JSON says.
    """

    path: Path
    info: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def builder(self) -> str:
        """Name of the official building block that was run."""
        return self.info["kit"]

    @property
    def args(self) -> dict[str, Any]:
        """Sizes and options of the official class."""
        return self.info["args"]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.path.with_suffix(".safetensors"))

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors named `<prefix>/...`, by the rest of their names."""
        return {k.removeprefix(f"{prefix}/"): v for k, v in self.tensors.items() if k.startswith(f"{prefix}/")}

    def parameters(self) -> dict[str, Tensor]:
        """The official state dict: as recorded, or made anew by the rule that the JSON gives in words."""
        if "param_shapes" not in self.info:
            return self.group("param")
        assert not self.info["fill_override"], f"{self.name}: exceptions of the rule are not known here"
        found = {name: self._filled(name, shape) for name, shape in self.info["param_shapes"].items()}
        for name, total in self.info["param_sums"].items():
            assert math.isclose(found[name].double().sum().item(), total, rel_tol=1e-6, abs_tol=1e-6), name
        return found

    def _filled(self, name: str, shape: list[int]) -> Tensor:
        random = np.random.RandomState((zlib.crc32(name.encode()) ^ self.info["fill_seed"]) & 0xFFFFFFFF)
        value, leaf = random.standard_normal(shape), name.rpartition(".")[2]
        if leaf == "running_var":
            value = 0.5 + 0.5 * np.abs(value)
        elif leaf == "running_mean":
            value = 0.2 * value
        elif len(shape) >= 2:
            value = self.info["gain"] * value / math.sqrt(math.prod(shape[1:]))
        else:
            value = 1 + 0.2 * value if leaf == "weight" else 0.1 * value
        return torch.from_numpy(np.asarray(value, np.float32))

    def compare(self, outputs: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
        """Check results against every recorded output and gradient.

        Args:
            outputs: by the kit's names; each of its outputs must be there.
            gradients: by official parameter names, "in/<name>" for inputs; each recorded one must be there.

        Raises:
            AssertionError: one is missing or differs.
        """
        problems = list(self._problems(outputs, self.group("out"), "output", scaled=False))
        problems += self._problems(gradients, self.group("grad"), "gradient", scaled=True)
        assert not problems, f"{self.name}: " + "; ".join(problems)

    def _problems(self, found: dict[str, Tensor], wanted: dict[str, Tensor], what: str, scaled: bool) -> Iterator[str]:
        for name, reference in wanted.items():
            if name not in found:
                yield f"{what} {name} is missing"
                continue
            actual = found[name].detach().to(reference.dtype)
            if actual.shape != reference.shape:
                yield f"{what} {name} is {tuple(actual.shape)}, official {tuple(reference.shape)}"
                continue
            largest = reference.abs().max().item() if reference.numel() else 0.0
            atol = self.info["atol"] * (max(1.0, largest) if scaled else 1.0)
            rtol = self.info.get("rtol") or 0.0
            if not torch.allclose(actual, reference, rtol=rtol, atol=atol):
                error = (actual - reference).abs().max()
                yield f"{what} {name} differs by {error:.1e} (atol {atol:.0e}, rtol {rtol:.0e})"


def shared_kits() -> Path:
    """The folder of parity kits outside the repository, which need not exist."""
    return Path(os.environ.get(KITS) or ROOT.parent.parent / "shared" / "parity")


def find_kits(*folders: Path) -> list[Kit]:
    """Kits by name; of two with the same name the one in the later folder counts."""
    paths = {path.stem: path for folder in folders for path in sorted(Path(folder).glob("*.json"))}
    return [Kit(path, json.loads(path.read_text(encoding="utf-8"))) for _, path in sorted(paths.items())]
