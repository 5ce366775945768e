"""`visadapt bench speed`: training steps, merged and mixed inference, switching, caching and the runner's own cost.

All figures are ratios within one run. The floor of a training step is the frozen forward and the input-gradient-only
backward of the same backbone.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..core.adapted import Adapted
from ..environment import version
from ..registry import ADAPTERS
from .running import cached_epochs, runner_cost
from .setup import Setup
from .timing import interleaved, ratio, spread

LORA = {"type": "LoRA", "rank": 8, "targets": ["all-linear"]}
SHIRA = {"type": "SHiRA", "rank": 5, "mask": "random", "targets": ["all-linear"]}
"""1 % of the weights of a ViT-B, which is what its paper changes."""


def stepper(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """One training step: forward, backward, AdamW on what trains; where nothing does, the backward of the input."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4) if trainable else None
    images = images if trainable else images.clone().requires_grad_()

    def step() -> None:
        output = model(images)
        output = getattr(output, "native", output)
        output.square().mean().backward()
        images.grad = None
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def adapted_with(setup: Setup, cfg: dict[str, Any]) -> Adapted:
    """A fresh backbone with one trainable adapter whose effect is not zero."""
    adapted = Adapted(setup.backbone())
    adapted.add("main", ADAPTERS.build(cfg))
    adapted.set_trainable("main")
    disturb(adapted.adapters)
    return adapted.train()


@torch.no_grad()
def disturb(module: nn.Module) -> None:
    """Move parameters away from their start, where many are zero."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.01)


def peft_lora(setup: Setup, count: int = 1) -> nn.Module | None:
    """The same LoRA by HF PEFT with `count` adapters, None where PEFT is not installed."""
    if version("peft") is None:
        return None
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=8, target_modules=["qkv", "proj", "fc1", "fc2"])
    model = get_peft_model(setup.backbone().body, config, adapter_name="a0")
    for i in range(1, count):
        model.add_adapter(f"a{i}", config)
    return model.train()


def floor_step(setup: Setup) -> Callable[[], None]:
    """Frozen forward and input-gradient-only backward."""
    return stepper(Adapted(setup.backbone()), setup.images(setup.batch))


def training(setup: Setup, methods: list[str]) -> dict[str, Any]:
    """Step times over the floor."""
    images = setup.images(setup.batch)
    candidates = {"floor": floor_step(setup), "floor again": floor_step(setup)}
    candidates["lora"] = stepper(adapted_with(setup, LORA), images)
    full = Adapted(setup.backbone())
    full.requires_grad_(True)
    candidates["full"] = stepper(full, images)
    if (peft := peft_lora(setup)) is not None:
        candidates["peft"] = stepper(peft, images)
    for name in methods:
        candidates[f"method {name}"] = stepper(adapted_with(setup, {"type": name}), images)
    times = interleaved(candidates, setup.rounds, setup.device)
    found: dict[str, Any] = {
        f"{name}_step_over_floor": ratio(times, name, "floor") for name in ("lora", "peft", "full") if name in times
    }
    found["step_spread"] = spread(times, "floor again", "floor")
    found["floor_seconds"] = median(times["floor"])
    found["methods"] = {n: ratio(times, f"method {n}", "floor") for n in methods}
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


def peak_bytes(setup: Setup, which: str) -> int:
    """Highest memory of two training steps above what the model itself holds, in this process."""
    images = setup.images(setup.batch)
    model = peft_lora(setup) if which == "peft" else adapted_with(setup, LORA)
    step = stepper(model, images)
    if setup.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(), step()
        return torch.cuda.max_memory_allocated() - before
    before = _status("VmRSS")
    step(), step()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    """A memory figure of this process in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def memory(setup: Setup) -> dict[str, float]:
    """Peak memory of a LoRA step against PEFT's, each in a process of its own."""
    if version("peft") is None or not sys.platform.startswith("linux"):
        return {}
    peaks = {}
    for which in ("lora", "peft"):
        command = [sys.executable, "-m", "visadapt.benchmark.speed", which, json.dumps(asdict(setup))]
        peaks[which] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return {"lora_peak_over_peft": peaks["lora"] / peaks["peft"]}


def measure(setup: Setup, methods: list[str]) -> dict[str, Any]:
    """Everything, as one flat object; rows per method under "methods"."""
    found = memory(setup) | training(setup, methods) | inference(setup) | switching(setup) | exchange(setup)
    found |= cached_epochs(setup) | runner_cost(setup)
    machine = torch.cuda.get_device_name() if setup.device == "cuda" else platform.processor() or platform.machine()
    found |= {"machine": machine, "threads": torch.get_num_threads(), "visadapt": __version__}
    return found | {p: version(p) for p in ("torch", "timm", "peft")} | asdict(setup)


if __name__ == "__main__":
    print(peak_bytes(Setup(**json.loads(sys.argv[2])), sys.argv[1]))
