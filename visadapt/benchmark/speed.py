"""`visadapt bench speed`: training steps, merged and mixed inference, switching, caching and the runner's own cost.

All figures are ratios within one run. The floor of a training step is the frozen forward and the input-gradient-only
backward of the same backbone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..core.adapted import Adapted
from ..environment import version
from ..registry import ADAPTERS
from .methods import adapted_with, alone, disturb, measure_methods, peak_bytes, stepper, twin
from .running import cached_epochs, runner_cost
from .setup import Setup
from .timing import interleaved, ratio, spread

LORA = {"type": "LoRA", "rank": 8, "targets": ["all-linear"]}
SHIRA = {"type": "SHiRA", "rank": 5, "mask": "random", "targets": ["all-linear"]}
"""1 % of the weights of a ViT-B, which is what its paper changes."""


def peft_lora(setup: Setup, count: int = 1) -> nn.Module | None:
    """The same LoRA by HF PEFT with `count` adapters, None where PEFT is not installed."""
    if (model := twin(setup, "LoRA", "a0")) is not None:
        for i in range(1, count):
            model.add_adapter(f"a{i}", model.peft_config["a0"])
    return model


def floor_step(setup: Setup) -> Callable[[], None]:
    """Frozen forward and input-gradient-only backward."""
    return stepper(Adapted(setup.backbone()), setup.images(setup.batch))


def training(setup: Setup) -> dict[str, Any]:
    """Step times over the floor."""
    images = setup.images(setup.batch)
    candidates = {"floor": floor_step(setup), "floor again": floor_step(setup)}
    candidates["lora"] = stepper(adapted_with(setup, LORA), images)
    full = Adapted(setup.backbone())
    full.requires_grad_(True)
    candidates["full"] = stepper(full, images)
    if (peft := peft_lora(setup)) is not None:
        candidates["peft"] = stepper(peft, images)
    times = interleaved(candidates, setup.rounds, setup.device)
    found: dict[str, Any] = {
        f"{name}_step_over_floor": ratio(times, name, "floor") for name in ("lora", "peft", "full") if name in times
    }
    found["step_spread"] = spread(times, "floor again", "floor")
    found["floor_seconds"] = median(times["floor"])
    return found


@torch.inference_mode()
def inference(setup: Setup) -> dict[str, float]:
    """Merged and mixed batches over the bare backbone."""
    images = setup.images(setup.mixed)
    base = Adapted(setup.backbone()).eval()
    again = Adapted(setup.backbone()).eval()
    merged = adapted_with(setup, LORA).eval()
    merged.merge()
    mixed = adapted_with(setup, LORA).eval()
    for i in range(1, setup.mixed):
        mixed.add(f"a{i}", ADAPTERS.build(LORA))
        for piece in mixed.pieces(f"a{i}"):
            piece.b.data.normal_(std=0.01)
    mixed.route(list(range(setup.mixed)))
    candidates = {"base": lambda: base(images), "again": lambda: again(images)}
    candidates |= {"merged": lambda: merged(images), "mixed": lambda: mixed(images)}
    if (peft := peft_lora(setup, setup.mixed)) is not None:
        peft.eval()
        names = [f"a{i}" for i in range(setup.mixed)]
        candidates["peft_mixed"] = lambda: peft(images, adapter_names=names)
    times = interleaved(candidates, setup.rounds, setup.device)
    found = {f"{n}_over_base": ratio(times, n, "base") for n in ("merged", "mixed", "peft_mixed") if n in times}
    return found | {"inference_spread": spread(times, "again", "base")}


def switching(setup: Setup) -> dict[str, float]:
    """Milliseconds to change between two resident adapters."""
    adapted = adapted_with(setup, LORA)
    adapted.add("other", ADAPTERS.build(LORA))
    candidates = {"ours": lambda: (adapted.enable("other"), adapted.enable("main"))}
    if (peft := peft_lora(setup, 2)) is not None:
        candidates["peft"] = lambda: (peft.set_adapter("a1"), peft.set_adapter("a0"))
    times = interleaved(candidates, 2 * setup.rounds, setup.device)
    names = {"ours": "switch_ms", "peft": "peft_switch_ms"}
    return {names[n]: 500 * median(t) for n, t in times.items()}


def exchange(setup: Setup) -> dict[str, float]:
    """Time to fuse an adapter into the weights of a ViT-B and to take it out again: sparse updates against LoRA.

    Two adapters of each sort take turns, and the base comes back bit for bit every time.
    """
    adapted = Adapted(replace(setup, model="vit_base_patch16_224").backbone())
    names = {"lora": ["lora0", "lora1"], "shira": ["shira0", "shira1"]}
    for seed in (0, 1):
        adapted.add(names["lora"][seed], ADAPTERS.build(LORA), enable=False)
        adapted.add(names["shira"][seed], ADAPTERS.build({**SHIRA, "seed": seed}), enable=False)
    disturb(adapted.adapters)

    def turn(which: str) -> None:
        for name in names[which]:
            adapted.enable(name)
            adapted.merge(name)
            adapted.unmerge()

    # What LoRA leaves behind, a copy of all weights, is freed in the call after it: that one is not counted.
    candidates = {"lora": partial(turn, "lora"), "between": partial(turn, "shira"), "shira": partial(turn, "shira")}
    times = interleaved(candidates, setup.rounds, setup.device)
    return {"shira_switch_over_lora_fuse": ratio(times, "shira", "lora")}


def memory(setup: Setup) -> dict[str, float]:
    """Peak memory of a LoRA step against PEFT's, each in a process of its own."""
    if version("peft") is None or not sys.platform.startswith("linux"):
        return {}
    ours, peft = (alone(peak_bytes, setup, "LoRA", how) for how in ("ours", "peft"))
    return {"lora_peak_over_peft": ours / peft}


def measure(setup: Setup, methods: list[str]) -> dict[str, Any]:
    """Everything, as one flat object; a row per method, itself flat, under "methods"."""
    found = memory(setup) | training(setup) | inference(setup) | switching(setup) | exchange(setup)
    found |= cached_epochs(setup) | runner_cost(setup)
    found |= {"machine": setup.machine(), "threads": torch.get_num_threads(), "visadapt": __version__}
    found["methods"] = measure_methods(replace(setup, rounds=max(3, setup.rounds // 3)), methods)
    return found | {p: version(p) for p in ("torch", "timm", "peft")} | asdict(setup)
