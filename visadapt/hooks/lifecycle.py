"""Hooks that call what adapters do around training: starts from data, schedules, the last tidying."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import Hook
from torch.utils.data import DataLoader

from ..checkpoint import unwrap
from ..core.progress import Progress
from ..datasets.sampler import EpochSampler


class Calibrate(Hook):
    """Before the first step of a run, give every adapter the start from data that it asks for; never after a resume."""

    priority = "HIGHEST"

    def before_train(self, runner) -> None:
        task = unwrap(runner.model)
        waiting = [n for n, a in task.adapted.adapters.items() if a.calibration is not None]
        if runner.iter or not waiting:
            return
        training = task.training
        task.eval()
        for name in waiting:
            task.adapted.calibrate(name, (self._loss(task, batch) for batch in self._batches(runner)))
        task.train(training)
        print(f"started from data: {', '.join(waiting)}", flush=True)

    @staticmethod
    def _batches(runner) -> DataLoader:
        """The training batches of the first epoch, without moving the run's own sampler."""
        loader = runner.train_loop.dataloader
        sampler = EpochSampler(loader.dataset, seed=runner.seed or 0)
        return DataLoader(loader.dataset, loader.batch_size, sampler=sampler, collate_fn=loader.collate_fn)

    @staticmethod
    def _loss(task: Any, batch: dict[str, Any]):
        def loss() -> torch.Tensor:
            data = task.data_preprocessor(batch)
            return sum(task(**data, mode="loss").values())

        return loss


class Lifecycle(Hook):
    """Call `on_step`, `on_gradients` and `on_update` of all adapters around each step, and `finalize` at the end."""

    priority = 20  # behind the moving average, before files are written

    def before_train(self, runner) -> None:
        optimizer = runner.optim_wrapper.optimizer
        optimizer.register_step_pre_hook(lambda *_: self._call(runner, "on_gradients"))
        optimizer.register_step_post_hook(lambda *_: self._call(runner, "on_update"))

    def before_train_iter(self, runner, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter % runner.optim_wrapper._accumulative_counts == 0:
            self._call(runner, "on_step")

    def after_train(self, runner) -> None:
        for adapter in unwrap(runner.model).adapted.adapters.values():
            adapter.finalize()

    @staticmethod
    def _call(runner, what: str) -> None:
        every = runner.optim_wrapper._accumulative_counts
        step = runner.iter // every
        rates = runner.optim_wrapper.get_lr()
        progress = Progress(
            step=step,
            total=-(-runner.max_iters // every),
            epoch=runner.epoch,
            epochs=runner.max_epochs,
            generator=torch.Generator().manual_seed((runner.seed or 0) * 1_000_003 + step),
            lr=rates.get("base_lr", rates["lr"])[0],
        )
        for adapter in unwrap(runner.model).adapted.adapters.values():
            getattr(adapter, what)(progress)
