"""From a config to a runner: processes, defaults, and checkpoints that resume exactly."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.dist import barrier
from mmengine.runner import BaseLoop, Runner

from . import checkpoint
from .checkpoint import unwrap
from .checks import check_data, check_monitors, check_names, names_of
from .errors import InputError, refusals
from .hooks.cache import CacheFeatures
from .hooks.files import Console, MetricsFile
from .hooks.lifecycle import Calibrate, Lifecycle, MeanBuffers
from .hooks.steps import StepSeed
from .memory import keep_freed

__all__ = ["build_runner", "close", "is_main_process", "unwrap"]


class AdaptRunner(Runner):
    """mmengine's runner that resumes exactly."""

    def dump_config(self) -> None:
        """The resolved config is written by the train command, before anything is built."""

    def _log_env(self, env_cfg: dict) -> None:
        """Left out: formatting the config for a log that nobody sees takes a second; see environment.json."""

    def build_train_loop(self, loop: Any) -> Any:
        with refusals("train_dataloader, train_cfg"):
            built = super().build_train_loop(loop)
        loader = built.dataloader
        if not len(loader):
            raise InputError(
                f"train_dataloader: {len(loader.dataset)} samples fill no batch of {loader.batch_size}; lower "
                "batch_size, or leave out drop_last"
            )
        check_data(unwrap(self.model), loader.dataset, "train_dataloader")
        return built

    def build_val_loop(self, loop: Any) -> Any:
        with refusals("val_dataloader, val_cfg"):
            built = super().build_val_loop(loop)
        dataset = built.dataloader.dataset
        check_data(unwrap(self.model), dataset, "val_dataloader")
        if isinstance(self._train_loop, BaseLoop):
            trained_on = names_of(self._train_loop.dataloader.dataset)
            check_names(trained_on, "train_dataloader", names_of(dataset), "val_dataloader", fewer_classes=True)
            check_monitors(self.hooks, built.evaluator)
        return built

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        with refusals("optim_wrapper"):
            return super().build_optim_wrapper(optim_wrapper)

    def build_param_scheduler(self, scheduler: Any) -> Any:
        with refusals("param_scheduler"):
            return super().build_param_scheduler(scheduler)

    def train(self) -> Any:
        keep_freed()
        return super().train()

    def load_or_resume(self) -> None:
        """Resume from the folder's newest checkpoint (`resume=True`) or from the one in `load_from`."""
        if self._has_loaded or not self._resume:
            return
        written = [Path(self._load_from)] if self._load_from else checkpoint.numbered(Path(self.work_dir))
        if not written:
            print(f"no checkpoint in {self.work_dir} yet: training starts from the beginning", flush=True)
        else:
            try:
                checkpoint.restore(self, written[-1])
            except (KeyError, AttributeError, TypeError) as error:  # whole, but not what this version writes
                said = f"{type(error).__name__}: {error}"
                raise InputError(
                    f"{written[-1]} does not hold what a checkpoint of this version holds ({said})"
                ) from error
            print(f"resumed from {written[-1]} at epoch {self.epoch}, step {self.iter}", flush=True)
        self._has_loaded = True


def is_main_process() -> bool:
    """True in the process that writes files, also before the process group exists."""
    return int(os.environ.get("RANK", 0)) == 0


def _join_processes(cfg: Config) -> None:
    """Set up the process group under torchrun; mmengine's own set-up needs a GPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    cuda = torch.cuda.is_available()
    cfg.launcher = "pytorch"
    if not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo")
    wrapper = {"type": "MMDistributedDataParallel", "broadcast_buffers": False}
    wrapper["find_unused_parameters"] = cfg.pop("find_unused_parameters", False)
    cfg.setdefault("model_wrapper_cfg", wrapper)
    if not cuda:
        cfg.model_wrapper_cfg["device_ids"] = None


def build_runner(cfg: Config) -> AdaptRunner:
    """The runner for a checked config.

    Raises:
        InputError: what the parts refuse, e.g. a missing data folder.
    """
    _join_processes(cfg)
    hooks: list[Any] = [StepSeed(), Calibrate(), Lifecycle(), MeanBuffers(), MetricsFile(), Console()]
    hooks += cfg.get("custom_hooks", ())
    if cfg.pop("cache_features", False):
        hooks.append(CacheFeatures())
    cfg.pop("custom_hooks", None)
    cfg.log_level = "WARNING"  # the screen belongs to the Console hook, figures to metrics.jsonl
    loops = [("train_dataloader", "train_cfg"), ("val_dataloader", "val_cfg"), ("test_dataloader", "test_cfg")]
    for loader, loop in loops:
        if cfg.get(loader) is not None and cfg.get(loop) is None:
            raise InputError(f"the config has {loader} and no {loop}")
    with refusals("the config"):
        runner = AdaptRunner.from_cfg(cfg)
    runner.register_custom_hooks(hooks)
    return runner


def close(failed: bool = False) -> None:
    """Leave the process group; without this a finished run can abort at exit.

    Args:
        failed: do not wait for the other processes, which may be waiting for this one's share of a step.
    """
    if dist.is_available() and dist.is_initialized():
        if not failed:
            barrier()
        dist.destroy_process_group()
