"""Hooks around the steps of adapters and heads: starts from data, schedules, the last tidying, shared statistics."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.dist import all_reduce_params
from mmengine.hooks import Hook
from torch import Tensor
from torch.utils.data import DataLoader

from ..checkpoint import unwrap
from ..core.progress import Progress
from ..datasets.sampler import EpochSampler
from .files import Checkpoints


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


class MeanBuffers(Hook):
    """Average the floating-point buffers of adapters and heads over the processes of a distributed run.

    Each process keeps the running statistics of batch norms over the batches that it has seen. Before a validation they
    are averaged, as all processes have to measure one model, and before a file is written, as it holds those of the
    main process. They follow one momentum, so that their mean is the running average over the batches of all. Other
    floating-point buffers (moments of gradients that all processes share, starts from data) are equal everywhere and
    stay so bit for bit; integers (counts, indices, ranks) are equal too and have no mean. Left alone are buffers that
    no file holds and those of the frozen backbone: no process changes them on its own.
    """

    priority = 25  # behind the last tidying, before files are written

    def before_val_epoch(self, runner) -> None:
        self._average(runner)

    def after_train_epoch(self, runner) -> None:
        self._average(runner)

    def after_train_iter(self, runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        files = [h for h in runner.hooks if isinstance(h, Checkpoints) and not h.by_epoch]
        if any(self.every_n_train_iters(runner, h.interval) for h in files):
            self._average(runner)

    def after_train(self, runner) -> None:
        self._average(runner)

    @classmethod
    @torch.no_grad()
    def _average(cls, runner) -> None:
        if runner.world_size == 1:
            return
        buffers = cls._buffers(unwrap(runner.model))
        means = [b.double() for b in buffers]  # the sum of equal float32 values is exact, and their mean the same value
        all_reduce_params(means, op="mean")
        for buffer, mean in zip(buffers, means):
            buffer.copy_(mean)

    @staticmethod
    def _buffers(task: Any) -> list[Tensor]:
        """Those that files hold."""
        found = []
        for module in (task.adapted.adapters, *task.heads.values()):
            kept = module.state_dict().keys()
            found += [b for n, b in module.named_buffers() if n in kept and b.is_floating_point()]
        return found
