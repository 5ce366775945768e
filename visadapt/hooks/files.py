"""Hooks that write a run's results: adapter files, metrics and a line or a bar on the screen."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from tqdm import tqdm

from .. import checkpoint
from ..core.io import save_adapter
from ..datasets.masks import RESIZING, SegmentationDataset
from ..datasets.source_target import SourceTarget
from ..errors import InputError
from ..transforms.albu import Albu
from .steps import metric_value

OF_FILES = ("bands", "file_bands", "nodata", "fill", "palette")
"""Attributes that a data set need not have. The first four say how it reads bands, and predictions read them alike."""


def of_files(values: dict[str, Any]) -> dict[str, Any]:
    """Those of the values that are there, as JSON values."""
    return {k: [*v] if isinstance(v, Iterable) else v for k, v in values.items() if v is not None}


def dataset_card(dataset: Any, training: bool = False) -> dict[str, Any]:
    """Class names, bands, colours, transforms and how clips are seen of a data set, for adapter files.

    The stored transforms are those that images go through before a prediction. An evaluation set has them. Those of a
    training set augment, so of them only `unchanging` ones are stored.

    Args:
        dataset: what the model was evaluated on, or else trained on.
        training: it was trained on.
    """
    if isinstance(dataset, SourceTarget):
        dataset = dataset.source
    transform = getattr(dataset, "transform", None)
    views = getattr(dataset, "views_of_clips", None)
    return {
        **({} if views is None else {"views_of_clips": views}),
        **of_files({key: getattr(dataset, key, None) for key in OF_FILES}),
        "classes": list(getattr(dataset, "classes", ())),
        "transforms": [] if transform is None else unchanging(dataset) if training else transform.to_json(),
        "channels": getattr(dataset, "channels", 3),
    }


def unchanging(dataset: Any) -> list[dict[str, Any]]:
    """Transforms of a training set, up to the first that is random: what follows is made for what that one leaves.

    For class maps the first that does more than resize ends them as well. The map of a crop is no map of the image, and
    without the crop the image has the scale that the model knows.
    """
    kept = []
    for entry in dataset.transform.to_json():
        step = Albu([entry], dataset.channels)
        if step.is_random or (isinstance(dataset, SegmentationDataset) and not {*step.names} <= {*RESIZING}):
            break
        kept.append(entry)
    return kept


class AdapterFiles(Hook):
    """Write `adapter_best.safetensors` whenever the monitored metric improves, `adapter_last.safetensors` at the end.

    Args:
        monitor: name of the metric.
        rule: "greater" or "less" is better.
    """

    priority = "HIGH"  # before TrainableEMA puts the raw values back

    def __init__(self, monitor: str = "top1", rule: str = "greater") -> None:
        if rule not in ("greater", "less"):
            raise InputError(f"AdapterFiles: rule is 'greater' or 'less', got '{rule}'")
        self.monitor, self.rule = monitor, rule
        self.best: float | None = None
        self.metrics: dict[str, float] = {}

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        self.metrics = dict(metrics or {})
        value = metric_value(metrics, self.monitor, "AdapterFiles")
        first = self.best is None or math.isnan(self.best)
        if first or (value > self.best if self.rule == "greater" else value < self.best):
            self.best = value
            self._write(runner, "adapter_best.safetensors")

    def after_train(self, runner) -> None:
        self._write(runner, "adapter_last.safetensors")

    def _write(self, runner, name: str) -> None:
        if runner.rank:
            return
        task = checkpoint.unwrap(runner.model)
        loop = runner.val_loop or runner.train_loop
        extra = task.card() | dataset_card(loop.dataloader.dataset, training=runner.val_loop is None)
        extra |= {"metrics": self.metrics, "epoch": runner.epoch, "iter": runner.iter, "seed": runner.seed}
        save_adapter(task.adapted, Path(runner.work_dir) / name, heads=task.heads, extra=extra)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "metrics": self.metrics}

    def load_state_dict(self, state: dict[str, Any], runner) -> None:
        self.best, self.metrics = state["best"], state["metrics"]


class Checkpoints(Hook):
    """Write `epoch_N.pth` or `iter_N.pth` for resuming, and remove older ones.

    A validation at the same step has the file written anew, so that a resumed run knows its best metric.

    Args:
        interval: epochs or iterations between two files.
        by_epoch: what the interval counts; loops over iterations need False.
        keep: how many of the newest files stay.
    """

    priority = "LOWEST"  # behind the hooks whose state it writes

    def __init__(self, interval: int = 1, by_epoch: bool = True, keep: int = 2) -> None:
        if interval < 1 or keep < 1:
            raise InputError(f"Checkpoints: interval and keep must be at least 1, got {interval} and {keep}")
        self.interval, self.by_epoch, self.keep = interval, by_epoch, keep
        self.written: tuple[str, int, int] | None = None

    def after_train_epoch(self, runner) -> None:
        if self.by_epoch and (runner.epoch + 1) % self.interval == 0:
            self._write(runner, f"epoch_{runner.epoch + 1}.pth", runner.epoch + 1, runner.iter)

    def after_train_iter(self, runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None) -> None:
        if not self.by_epoch and (runner.iter + 1) % self.interval == 0:
            self._write(runner, f"iter_{runner.iter + 1}.pth", runner.epoch, runner.iter + 1)

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        if self.written is not None and self.written[2] == runner.iter:
            self._write(runner, *self.written)

    def _write(self, runner, name: str, epoch: int, step: int) -> None:
        if runner.rank:
            return
        self.written = (name, epoch, step)
        folder = Path(runner.work_dir)
        checkpoint.save(runner, folder / name, epoch, step)
        for old in checkpoint.numbered(folder)[: -self.keep]:
            old.unlink()


class MetricsFile(Hook):
    """Append losses, rates and validation metrics to `metrics.jsonl`; a resumed run drops what it will write again.

    Args:
        interval: steps between two training entries.
    """

    priority = "BELOW_NORMAL"

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval
        self.started = time.perf_counter()

    def before_train(self, runner) -> None:
        self.path = Path(runner.work_dir) / "metrics.jsonl"
        kept = []
        if runner.iter and self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= runner.iter]
        if not runner.rank:
            self.path.write_text("".join(f"{line}\n" for line in kept))
        self.started = time.perf_counter()

    def after_train_iter(self, runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None) -> None:
        if (runner.iter + 1) % self.interval and runner.iter + 1 != runner.max_iters:
            return
        entry = {k: v.item() for k, v in (outputs or {}).items()}
        rates = runner.optim_wrapper.get_lr()
        entry["lr"] = rates.get("base_lr", rates["lr"])[0]  # with several groups, the one that theirs are factors of
        self._append(runner, runner.iter + 1, runner.epoch + 1, entry)

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        self._append(runner, runner.iter, runner.epoch, {f"val/{k}": v for k, v in (metrics or {}).items()})

    def _append(self, runner, step: int, epoch: int, entry: dict[str, float]) -> None:
        if runner.rank:
            return
        seconds = round(time.perf_counter() - self.started, 3)
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, "epoch": epoch, **entry, "seconds": seconds}) + "\n")


class Console(Hook):
    """A progress bar on a terminal, and one line per validation everywhere. Names unreadable images at the end."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.unreadable: dict[str, None] = {}
        self.loss: torch.Tensor | None = None

    def before_train(self, runner) -> None:
        if runner.rank == 0 and sys.stderr.isatty():
            self.bar = tqdm(total=runner.max_iters, initial=runner.iter, unit="step", dynamic_ncols=True, leave=False)

    def after_train_iter(
        self, runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        self.unreadable |= dict.fromkeys((data_batch or {}).get("unreadable", ()))
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{outputs['loss'].item():.3f}", refresh=False)
            self.bar.update()
        if outputs:
            self.loss = outputs["loss"].detach()  # read when it is shown: reading waits for the device

    def after_val_iter(self, runner, batch_idx: int, data_batch: dict | None = None, outputs: Any = None) -> None:
        self.unreadable |= dict.fromkeys((data_batch or {}).get("unreadable", ()))

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        shown = "  ".join(f"{k} {v:.4f}" for k, v in (metrics or {}).items())
        loss = "" if self.loss is None else f"loss {self.loss.item():.4f}  "
        self._say(runner, f"epoch {runner.epoch}/{runner.max_epochs}  step {runner.iter}  {loss}{shown}")

    def after_train(self, runner) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.unreadable:
            names = list(self.unreadable)
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            self._say(runner, f"{len(names)} unreadable files were skipped: {', '.join(names[:5])}{more}")

    def _say(self, runner, line: str) -> None:
        if runner.rank == 0:
            tqdm.write(line) if self.bar is not None else print(line, flush=True)
