"""Floating point operations of a step: matrix products, convolutions and attention, as torch counts them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACK = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _forward(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _backward(grad, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def flops(step: Callable[[], None]) -> int:
    """Operations of one call; torch leaves out its attention for CPUs, which is added here."""
    counter = FlopCounterMode(display=False, custom_mapping={ATTENTION: _forward, ATTENTION_BACK: _backward})
    with counter:
        step()
    return counter.get_total_flops()
