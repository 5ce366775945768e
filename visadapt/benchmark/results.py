"""Stored results: one JSON line per finished run, and the table made of them."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .. import __version__
from ..errors import InputError
from ..files import atomic

RESULTS = Path("benchmark_results")
ZOO = Path("model_zoo.md")
STORED = {
    "config",
    "overrides",
    "seed",
    "method",
    "task",
    "metric",
    "value",
    "train_images",
    "test_images",
    "trainable_params",
}
STORED |= {"trainable_params", "stored_bytes", "seconds", "config_hash", "version"}
"""Keys of a stored line that are read again."""


def config_hash(cfg: Any) -> str:
    """Identity of a run's settings, whatever its folder is called."""
    settings = {k: v for k, v in cfg.to_dict().items() if k not in ("work_dir", "resume", "load_from", "log_level")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All stored lines of the training runs.

    Raises:
        InputError: a line is no result.
    """
    path = folder / "training.jsonl"
    results = []
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else (), 1):
        try:
            results.append(json.loads(line))
            missing = STORED - set(results[-1])
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}:{n}: no JSON object; mend or remove the line") from error
        if missing:
            raise InputError(f"{path}:{n}: no {', '.join(sorted(missing))}; mend or remove the line")
    return results


def train_and_store(config_path: str, overrides: list[str], seeds: Iterable[int], work_dir: Path) -> None:
    """Train a config once per seed and append a line each; what is stored already is not run again.

    The value is that of the last epoch: the test set chooses nothing.
    """
    from .. import config
    from ..checkpoint import unwrap
    from ..commands.train import train

    for seed in seeds:
        words = [*overrides, f"randomness.seed={seed}"]
        cfg = config.load(config_path, words)
        if cfg.get("val_dataloader") is None or not any("AdapterFiles" in str(h) for h in cfg.get("custom_hooks", ())):
            raise InputError(f"{config_path}: a stored result needs val_dataloader and the hook AdapterFiles")
        key = config_hash(cfg)
        if any(r["config_hash"] == key and r["version"] == __version__ for r in read_results()):
            print(f"{config_path} with seed {seed} is stored already")
            continue
        start = time.perf_counter()
        folder = work_dir / f"{Path(config_path).stem}_{key}"
        runner = train(cfg, str(folder), overwrite=True)
        task = unwrap(runner.model)
        hook = next(h for h in runner.hooks if type(h).__name__ == "AdapterFiles")
        line = {
            "config": config_path,
            "overrides": overrides,
            "seed": seed,
            "method": ", ".join(type(a).__name__ for a in task.adapted.adapters.values()) or "linear probe",
            "backbone": f"{task.adapted.backbone.name}, {task.adapted.backbone.weights}",
            "task": Path(config_path).stem.rsplit("_", 1)[-1] + (f" {' '.join(overrides)}" if overrides else ""),
            "metric": hook.monitor,
            "value": hook.metrics[hook.monitor],
            "metrics": hook.metrics,
            "train_images": len(runner.train_dataloader.dataset),
            "test_images": len(runner.val_dataloader.dataset),
            "trainable_params": task.adapted.trainable_report(task.heads).trainable,
            "stored_bytes": (folder / "adapter_last.safetensors").stat().st_size,
            "seconds": round(time.perf_counter() - start, 1),
            "config_hash": key,
            "version": __version__,
        }
        RESULTS.mkdir(exist_ok=True)
        with open(RESULTS / "training.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def _method(path: str, adapters: str) -> str:
    """Adapters, and the name of the config where it says more, e.g. of an optimizer."""
    name = Path(path).stem.split("_")[0]
    return adapters if name.replace("-", "") == adapters.replace(" ", "").lower() else f"{adapters} ({name})"


def _epochs(path: str, overrides: list[str]) -> str:
    """Length of a run, by the name of its config or what replaces it."""
    named = re.findall(r"_(\d+)e_", Path(path).stem)
    given = [word.partition("=")[2] for word in overrides if word.startswith("train_cfg.max_epochs=")]
    return (given or named or ["-"])[-1]


def zoo_rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs of one setting under different seeds as one row each."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for result in results:
        key = (result["task"], result["config"], tuple(result["overrides"]), result["version"])
        groups.setdefault(key, []).append(result)
    rows = []
    for (task, path, overrides, _), found in sorted(groups.items()):
        values = [100 * r["value"] for r in found]
        seeds = sorted(r["seed"] for r in found)
        first = found[0]
        rows.append(
            {
                "task": f"{task} ({first['train_images']} train, {first['test_images']} test)",
                "method": _method(path, first["method"]),
                "metric": first["metric"],
                "%": f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else ""),
                "seeds": " ".join(map(str, seeds)),
                "epochs": _epochs(path, overrides),
                "trainable": f"{first['trainable_params']:,}",
                "file": f"{first['stored_bytes'] / 1e6:.2f} MB",
                "minutes": f"{mean(r['seconds'] for r in found) / 60:.1f}",
                "command": " ".join(["visadapt bench train", path, *overrides, "--seeds", *map(str, seeds)]),
            }
        )
    return rows


def write_zoo(path: Path = ZOO) -> Path:
    """Write model_zoo.md from the stored results.

    Raises:
        InputError: there are none.
    """
    rows = zoo_rows(read_results())
    if not rows:
        raise InputError(f"no results in {RESULTS}/ here; run visadapt bench train first, or change to their folder")
    columns = ["task", "method", "metric", "%", "seeds", "epochs", "trainable", "file", "minutes"]
    lines = [
        "# Model zoo",
        "",
        "Generated by `visadapt bench report` from `benchmark_results/`; do not edit. Metrics are those of the last",
        "epoch on the held-out images, mean and standard deviation over seeds. The backbone is `dinov2_vits14_focus`,",
        "a DINOv2 ViT-S/14 that was **fine-tuned for saliency** before it came to us, not the original DINOv2: figures",
        "do not compare with papers. Minutes are wall time of a run with its evaluations on two busy CPU cores.",
        "`moving-crop` is synthetic: a window moves over real pictures. Guessing gives 20 %, and what cannot see the",
        "order of frames 60 % at most; `shuffled=True` is that control.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row[c] for c in columns) + " |" for row in rows),
        "",
        "Commands:",
        "",
        "```",
        *(row["command"] for row in rows),
        "```",
        "",
    ]
    with atomic(path) as temporary:
        temporary.write_text("\n".join(lines))
    return path
