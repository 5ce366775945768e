"""Floating point operations of a step: matrix products, convolutions and attention, as torch counts them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..core.products import ONEDNN

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACK = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _forward(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _backward(grad, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def _linear(x, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(out_shape) * x[-1]


def flops(step: Callable[[], None]) -> int:
    """Operations of one call; torch leaves out its attention and its linears for CPUs, which are added here."""
    known = {ATTENTION: _forward, ATTENTION_BACK: _backward} | ({} if ONEDNN is None else {ONEDNN: _linear})
    counter = FlopCounterMode(display=False, custom_mapping=known)
    with counter:
        step()
    return counter.get_total_flops()
