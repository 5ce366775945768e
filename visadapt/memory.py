"""What the C library does with memory that a training step has freed."""

from __future__ import annotations

import ctypes
import os

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of mallopt in glibc's malloc.h


def keep_freed() -> bool:
    """Have glibc keep freed memory for the next step, from now on in this process.

    By itself it returns large blocks and the end of its heap to the system, which then clears tens of thousands of
    pages in every training step on a CPU. Peaks stay as they are; what a peak took is kept until the process ends.

    Returns:
        Whether it does now: other C libraries are left as they are, and so are thresholds that the user has set by
        environment variables.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # the last of Windows, which has no library of the process itself
        return False
    # In this order: the second alone would also stop glibc from mapping fewer blocks than it does at its start.
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, -1))
