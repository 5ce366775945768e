"""`visadapt bench scene`: memory and time of mapping a large scene."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from .methods import alone, status

BANDS = 4
CLASSES = [f"class {i}" for i in range(10)]
MODELS = {"vit-s": {}, "vit": dict(depth=4), "tiny": dict(depth=4, embed_dim=64, num_heads=2), "conv": None}
"""A whole ViT-S, four blocks of one, four blocks of width 64, or two convolutions."""


class Convolutions(nn.Module):
    """Two small convolutions: a model that costs next to nothing, so that the rest shows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(BANDS, 16, 7, 4, 3), nn.GELU(), nn.Conv2d(16, len(CLASSES), 1))

    def forward(self, tiles: Tensor) -> Tensor:
        """(B, C, t, t) to (B, K, t, t)."""
        return nn.functional.interpolate(self.body(tiles.float() / 255), tiles.shape[2:], mode="bilinear")


def scorer(model: str) -> Callable[[Tensor], Tensor]:
    """Values to scores: a transformer with a linear head, or `Convolutions`."""
    torch.manual_seed(0)
    arch = MODELS[model]
    if arch is None:
        return Convolutions().eval()
    from ..tasks.segment import Segmenter

    backbone = dict(type="TimmViT", name="vit_small_patch16_224", in_chans=BANDS, arch=arch, out_indices=[3])
    task = Segmenter(backbone, dict(type="LinearSegHead", num_classes=len(CLASSES))).eval()
    return lambda tiles: task.scores(task.data_preprocessor.normalize(tiles))


def make_scene(path: Path, size: int, step: int = 512) -> None:
    """Random blobs of size x size pixels in four 8-bit bands, written by bands of rows."""
    import rasterio

    draw = np.random.default_rng(0)
    where = dict(crs="EPSG:32633", transform=rasterio.transform.from_origin(5e5, 5e6, 0.5, 0.5))
    layout = dict(tiled=True, blockxsize=256, blockysize=256, compress="deflate")
    with rasterio.open(
        path, "w", driver="GTiff", width=size, height=size, count=BANDS, dtype="uint8", **where, **layout
    ) as scene:
        for top in range(0, size, step):
            rows = min(step, size - top)
            coarse = draw.integers(1, 256, (BANDS, -(-rows // 32), -(-size // 32)), dtype=np.uint8)
            blobs = coarse.repeat(32, 1).repeat(32, 2)[:, :rows, :size]
            scene.write(blobs, window=rasterio.windows.Window(0, top, size, rows))


def mapped(size: int, model: str, tile: int, threads: int) -> dict[str, Any]:
    """Figures of one scene, in this process."""
    from ..predict.scene import predict_scene

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "scene.tif", Path(folder) / "mask.tif"
        make_scene(source, size)
        score = scorer(model)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status("VmRSS")
        start = time.perf_counter()
        report = predict_scene(source, out, score, CLASSES, channels=BANDS, tile=tile, progress=False)
        wall = time.perf_counter() - start
        peak = max(0, status("VmHWM") - before)  # the kernel counts pages in batches
    found = {"size": size, "model": model, "tile": tile, "batch": report.batch, "tiles": report.tiles}
    found |= {"threads": threads, "peak_mib": peak / 2**20, "seconds": wall}
    return found | {"model_share": report.model_seconds / wall}


def measure_scene(size: int = 5000, model: str = "vit", tile: int = 512) -> dict[str, Any]:
    """Map a generated scene of size x size x 4 in a process of its own.

    Args:
        size: side in pixels.
        model: one of `MODELS`.
        tile: side of a tile.

    Returns:
        size, model, tile, batch, tiles, threads; peak_mib, the highest memory beyond that of the process with its
        model, activations included; seconds; model_share, the share of them inside the model.

    Raises:
        InputError: an unknown model, or a system without the memory figures of Linux.
    """
    if model not in MODELS:
        raise InputError(f"unknown model '{model}'; it is one of: {', '.join(MODELS)}")
    if not Path("/proc/self/clear_refs").exists():
        raise InputError("bench scene reads the memory figures of Linux; there are none here")
    return alone(mapped, size, model, tile, torch.get_num_threads())
