"""`visadapt bench speed --method`: step time and peak memory of single methods, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.adapted import Adapted
from ..core.inject import WeightForward, add_rows, effective, run_with
from ..core.kinds import Delta
from ..core.progress import Progress
from ..core.sites import LINEARS
from ..environment import version
from ..errors import InputError
from ..registry import ADAPTERS
from .attention import attention_ratio
from .flops import flops
from .setup import Setup, adamw
from .timing import interleaved, ratio

LINEAR_NAMES = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
"""All linears of a timm ViT's blocks; PEFT would take the patch embedding for a plain \"proj\"."""

TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "LayerNormTuning": ("LNTuningConfig", dict(target_modules=r"(blocks\.\d+\.norm[12]|norm)")),
    "LoRA": ("LoraConfig", dict(r=8, lora_alpha=8, target_modules=LINEAR_NAMES)),
    "RandLoRA": ("RandLoraConfig", dict(r=6, target_modules=LINEAR_NAMES)),
    "SHiRA": ("ShiraConfig", dict(r=5, target_modules=LINEAR_NAMES)),
}
"""Methods that HF PEFT has too, with its config class and the arguments that make it the same size."""


def stepper(
    model: nn.Module,
    images: Tensor,
    objective: Callable[[nn.Module, Tensor], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Callable[[], None]:
    """One training step: forward, backward, optimizer on what trains, and what adapters do around it.

    Where nothing trains it is the forward pass and the backward pass of the input.

    Args:
        model: a backbone, an adapted one, or a task around it.
        images: of the step.
        objective: what model and images give that is minimised; `loss` where None.
        optimizer: of what trains; AdamW where None.
    """
    objective = objective or loss
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or (adamw(model, lr=1e-4) if trainable else None)
    images = images if trainable else images.clone().requires_grad_()
    adapters = [a for m in model.modules() if isinstance(m, Adapted) for a in m.adapters.values()]
    count = 0

    def step() -> None:
        nonlocal count
        generator = torch.Generator().manual_seed(count)
        progress = Progress(step=count, total=1_000_000, epoch=0, epochs=100, generator=generator, lr=1e-4)
        for adapter in adapters:
            adapter.on_step(progress)
        objective(model, images).backward()
        images.grad = None
        if optimizer is None:
            return
        for adapter in adapters:
            adapter.on_gradients(progress)
        optimizer.step()
        for adapter in adapters:
            adapter.on_update(progress)
        optimizer.zero_grad()
        count += 1

    return step


def loss(model: nn.Module, images: Tensor) -> Tensor:
    """A scalar that every output and every regulariser enters."""
    output = model(images)
    output = getattr(output, "native", output)
    return output.square().mean() + sum(model.losses().values() if isinstance(model, Adapted) else ())


def adapted_with(setup: Setup, cfg: dict[str, Any]) -> Adapted:
    """A fresh backbone with one trainable adapter whose effect is not zero."""
    adapted = Adapted(setup.backbone())
    adapter = adapted.add("main", ADAPTERS.build(cfg))
    adapted.set_trainable("main")
    adapted.ctx.num_frames = getattr(adapter, "num_frames", 1)  # of methods for clips, whose frames the images then are
    if adapter.calibration is not None:
        adapted.calibrate("main", [partial(loss, adapted, setup.images(1))])
    disturb(adapted.adapters)
    return adapted.train()


@torch.no_grad()
def disturb(module: nn.Module) -> None:
    """Move parameters away from their start, where many are zero."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.01)


class Textbook:
    """What a module with weight adapters computes, the way that papers write it.

    Low-rank updates run beside the frozen layer, other weights are formed, and autograd keeps what it wants; methods
    that are published with recomputation are recomputed.
    """

    def __init__(self, forward: WeightForward) -> None:
        self.forward = forward

    def __call__(self, x: Tensor) -> Tensor:
        module, pieces = self.forward.module, self.forward.ordered()
        if any(p.by_forward() for p in pieces):
            return self.forward.apply(x, pieces)
        beside = [p for p in pieces if isinstance(module, nn.Linear) and _has_factors(p)]
        rest = [p for p in pieces if p not in beside]
        dense = partial(self._dense, pieces=rest)
        if any(p.recompute for p in rest):
            y = checkpoint(dense, x, use_reentrant=False, preserve_rng_state=False)
        else:
            y = dense(x)
        for piece in beside:
            a, b, scale = piece.factors()
            y = add_rows(y, F.linear(F.linear(x, a), b) * scale, piece.site.rows)
        return y

    def _dense(self, x: Tensor, pieces: list) -> Tensor:
        module = self.forward.module
        weight, bias = effective(module.weight, module.bias, pieces)
        return F.linear(x, weight, bias) if isinstance(module, nn.Linear) else run_with(module, x, weight, bias)


def _has_factors(piece: nn.Module) -> bool:
    return isinstance(piece, Delta) and piece.factors() is not None


def textbook(adapted: Adapted) -> Adapted | None:
    """The same adapters, computed plainly; None where no weight is adapted."""
    found = [m for m in adapted.backbone.modules() if isinstance(m.__dict__.get("forward"), WeightForward)]
    for module in found:
        module.forward = Textbook(module.forward)
    return adapted if found else None


def config(name: str) -> dict[str, Any]:
    """A method with its defaults; weight methods on all linears, so that they can be compared."""
    method = ADAPTERS.get(name)
    weights = bool(method.kinds) and set(method.kinds) <= {"delta", "weight"} and set(LINEARS) <= set(method.roles)
    return {"type": name, **({"targets": ["all-linear"]} if weights else {})}


def twin(setup: Setup, name: str, adapter: str = "default") -> nn.Module | None:
    """The method by HF PEFT under the name `adapter`, None where PEFT is not installed or has no such method."""
    if version("peft") is None or name not in TWINS:
        return None
    import peft

    kind, arguments = TWINS[name]
    return peft.get_peft_model(setup.backbone().body, getattr(peft, kind)(**arguments), adapter).train()


def model(setup: Setup, name: str, how: str) -> nn.Module | None:
    """What is measured: a method by us ("ours"), by PEFT or plainly, or nothing attached ("floor")."""
    if how == "floor":
        return Adapted(setup.backbone())
    if how == "peft":
        return twin(setup, name)
    adapted = adapted_with(setup, config(name))
    return adapted if how == "ours" else textbook(adapted)


def peak_bytes(setup: Setup, name: str, how: str) -> int | None:
    """Highest memory of two training steps above what the model itself holds, in this process.

    On a CPU what a start from data has used and freed may count to the model, so that the figure is too low then.
    """
    measured, images = model(setup, name, how), setup.images(setup.batch)
    if measured is None:
        return None
    step = stepper(measured, images)
    if setup.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(), step()
        return torch.cuda.max_memory_allocated() - before
    before = status("VmRSS")
    step(), step()
    return status("VmHWM") - before


def status(key: str) -> int:
    """A memory figure of this process in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def step_ratios(setup: Setup, name: str) -> dict[str, float]:
    """Step time over the floor, over the floor with the method's own operations at the floor's rate, and over the
    references that exist.
    """
    images, candidates = setup.images(setup.batch), {}
    for how in ("floor", "ours", "peft", "textbook"):
        if (measured := model(setup, name, how)) is not None:
            candidates[how] = stepper(measured, images)
    times = interleaved(candidates, setup.rounds, setup.device)
    over_floor = ratio(times, "ours", "floor")
    own = flops(candidates["ours"]) / flops(candidates["floor"])
    found = {"step_over_floor": over_floor, "step_over_flops": over_floor / own}
    return found | {f"step_over_{how}": ratio(times, "ours", how) for how in ("peft", "textbook") if how in times}


def own_ratios(setup: Setup, name: str) -> dict[str, float]:
    """What only some methods have: attention with another core over the one that it rewrites, and, of those that fold
    in part, merged inference over that of the bare backbone.
    """
    adapted = adapted_with(setup, config(name))
    found = attention_ratio(setup, adapted)
    if {p.folds for p in adapted.pieces()} != {True, False}:
        return found
    adapted.eval().merge()
    images, base = setup.images(setup.batch), Adapted(setup.backbone()).eval()
    with torch.inference_mode():
        candidates = {"base": partial(base, images), "merged": partial(adapted, images)}
        times = interleaved(candidates, 3 * setup.rounds, setup.device)
    return found | {"merged_over_base": ratio(times, "merged", "base")}


def alone(function: Callable, *arguments: Any) -> Any:
    """What the function gives in a process of its own, whose memory nothing else has touched."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def measure_method(setup: Setup, name: str, floor: int | None) -> dict[str, Any]:
    """One row: ratios of step time and peak memory, below 1 where we need less."""
    row = alone(step_ratios, setup, name) | alone(own_ratios, setup, name)
    if floor is None:
        return row
    peak = alone(peak_bytes, setup, name, "ours")
    row["peak_over_floor"] = peak / floor
    for how in (h for h in ("peft", "textbook") if f"step_over_{h}" in row):
        row[f"peak_over_{how}"] = peak / alone(peak_bytes, setup, name, how)
    return row


def measure_methods(setup: Setup, names: list[str]) -> dict[str, dict[str, Any]]:
    """Rows by method; of one that cannot be measured, why."""
    counts_memory = setup.device == "cuda" or sys.platform.startswith("linux")
    floor = alone(peak_bytes, setup, "", "floor") if names and counts_memory else None
    rows = {}
    for name in names:
        try:
            rows[name] = measure_method(setup, name, floor)
        except Exception as error:  # one method's trouble must not cost the figures of the others
            rows[name] = {
                "not_measured": f"{'' if isinstance(error, InputError) else type(error).__name__ + ': '}{error}"
            }
        shown = (f"{key} {value if isinstance(value, str) else f'{value:.2f}'}" for key, value in rows[name].items())
        print(f"{name}: {', '.join(shown)}", file=sys.stderr, flush=True)
    return rows
