"""The value in masks of pixels that belong to no class."""

from __future__ import annotations

IGNORED = 255
"""Left out of losses and metrics, and what stands where a scene has no data."""
