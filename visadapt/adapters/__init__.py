"""One method per file."""

from pathlib import Path

VIT_B = Path(__file__).with_name("vit_b.json")
"""Trainable parameters on a ViT-B with each method's defaults, written by `visadapt bench parameters`."""
