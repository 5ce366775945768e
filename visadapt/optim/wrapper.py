"""Optimizer steps under autocast on any device, with a stop when the loss is no number any more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from ..errors import InputError


class AutocastOptimWrapper(OptimWrapper):
    """mmengine's wrapper (accumulation, clipping) with mixed precision that also works on a CPU.

    Args:
        optimizer: a torch optimizer.
        dtype: "bfloat16", "float16", or None for full precision.
        stop_after_nan: number of steps in a row without a finite loss after which training stops; their updates are
            left out, so that the weights stay good.
        accumulative_counts: batches per optimizer step.
        clip_grad: arguments of gradient clipping, e.g. dict(max_norm=1.0).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        dtype: str | None = None,
        stop_after_nan: int = 5,
        accumulative_counts: int = 1,
        clip_grad: dict | None = None,
    ) -> None:
        super().__init__(optimizer, accumulative_counts=accumulative_counts, clip_grad=clip_grad)
        if dtype not in (None, "bfloat16", "float16"):
            raise InputError(f"AutocastOptimWrapper: dtype is 'bfloat16', 'float16' or None, got '{dtype}'")
        self.dtype = None if dtype is None else getattr(torch, dtype)
        self.device_type = optimizer.param_groups[0]["params"][0].device.type
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=self.dtype is torch.float16)
        self.stop_after_nan, self.bad_steps = stop_after_nan, 0

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None):
            yield

    def update_params(self, loss: Tensor, step_kwargs: dict | None = None, zero_kwargs: dict | None = None) -> None:
        if self._is_finite(loss):
            self.bad_steps = 0
            super().update_params(loss, step_kwargs, zero_kwargs)
            return
        self._inner_count += 1
        if self.should_update():  # what came before in this accumulation must not run over into the next one
            self.zero_grad()
        self.bad_steps += 1
        if self.bad_steps >= self.stop_after_nan:
            raise InputError(
                f"the loss was {loss.item()} for {self.bad_steps} steps in a row; training stopped and the last "
                "checkpoint is kept. Lower optim_wrapper.optimizer.lr or set optim_wrapper.clip_grad=dict(max_norm=1.0)"
            )

    @staticmethod
    def _is_finite(loss: Tensor) -> bool:
        """The same answer on every process, or their gradients would part."""
        good = loss.detach().isfinite().all().float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(good, dist.ReduceOp.MIN)
        return bool(good)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        self.scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs: Any) -> None:
        if self.clip_grad_kwargs:
            self.scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.scaler.step(self.optimizer, **kwargs)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"loss_scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scaler.load_state_dict(state_dict.pop("loss_scaler", {}) or self.scaler.state_dict())
        super().load_state_dict(state_dict)
