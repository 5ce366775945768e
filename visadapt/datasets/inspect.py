"""What a data set holds: sizes, band statistics, labels, files that cannot be read, and images that occur twice."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from ..ignored import IGNORED
from .base import ImageDataset
from .clips import ClipDataset
from .files import UnreadableImage
from .masks import Pixels, SegmentationDataset


@dataclass
class Bands:
    """Running minimum, maximum, mean and standard deviation per band, over all pixels that have data."""

    count: int = 0
    low: Tensor | None = None
    high: Tensor | None = None
    total: Tensor | None = None
    squares: Tensor | None = None

    def add(self, pixels: Tensor) -> None:
        """Take in some pixels (C, N)."""
        if not pixels.shape[1]:
            return
        pixels = pixels.double()
        found = pixels.amin(1), pixels.amax(1), pixels.sum(1), pixels.square().sum(1)
        if self.low is not None:
            low, high, total, squares = found
            found = self.low.minimum(low), self.high.maximum(high), self.total + total, self.squares + squares
        self.low, self.high, self.total, self.squares = found
        self.count += pixels.shape[1]

    def rows(self, names: Any) -> list[dict[str, Any]]:
        """One row per band; `names` may be None."""
        if self.low is None:
            return []
        mean = self.total / self.count
        std = (self.squares / self.count - mean.square()).clamp(min=0).sqrt()
        columns = zip(*(v.tolist() for v in (self.low, self.high, mean, std)))
        named = names or [str(i) for i in range(len(mean))]
        return [
            {"band": n, **dict(zip(("min", "max", "mean", "std"), (float(f"{v:.6g}") for v in row)))}
            for n, row in zip(named, columns)
        ]


FAR, RATIO = 3, 5
"""Data whose mean is so many standard deviations off, or whose deviation is so many times larger or smaller."""


def misfit(rows: Sequence[Mapping[str, Any]], mean: Sequence[float], std: Sequence[float]) -> list[str]:
    """Where the statistics that a backbone normalises by are far from those of the data: one line, or none.

    Args:
        rows: of the data, from `Bands.rows`.
        mean: per band, of the backbone.
        std: likewise.
    """
    if rows and len(rows) != len(mean):
        return [f"the data have {len(rows)} bands and the backbone takes {len(mean)}; set in_chans={len(rows)}"]
    for row, m, s in zip(rows, mean, std):
        if row["min"] == row["max"]:
            return [f"band {row['band']} is {row['min']:.4g} everywhere, which has no std; leave the band out"]
        if abs(row["mean"] - m) > FAR * s or not s / RATIO <= row["std"] <= s * RATIO:
            return [
                f"band {row['band']} has mean {row['mean']:.4g} and std {row['std']:.4g}, the backbone normalises by "
                f"{m:.4g} and {s:.4g}; give it the mean and std above"
            ]
    return []


@dataclass
class Findings:
    """What was found in one data set.

    Attributes:
        samples: how many it has.
        sizes: how many image files have each (height, width).
        bands: statistics.
        counts: of images or pixels per class; the last one is of ignored pixels.
        unit: "images", "clips" or "pixels".
        frames: how many each clip has; empty for images.
        needed: frames that a clip must have so that none is repeated.
        unreadable: files that are missing or damaged, with the reason.
        wrong: labels or sizes that do not fit, in words.
        files: paths of the images by the checksum of their content.
    """

    samples: int
    sizes: Counter = field(default_factory=Counter)
    bands: Bands = field(default_factory=Bands)
    counts: Tensor | None = None
    unit: str = "images"
    frames: list[int] = field(default_factory=list)
    needed: int = 0
    unreadable: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    files: dict[str, list[str]] = field(default_factory=dict)

    def lengths(self) -> dict[str, int]:
        """Frames of the shortest, the median and the longest clip, and how many are too short; nothing of images."""
        if not self.frames:
            return {}
        ordered = sorted(self.frames)
        found = {"min": ordered[0], "median": ordered[len(ordered) // 2], "max": ordered[-1], "needed": self.needed}
        return found | {"shorter": sum(n < self.needed for n in ordered)}


def inspect(dataset: ImageDataset, progress: bool = False) -> Findings:
    """Read every sample of a data set once, without its transforms.

    Args:
        dataset: images with labels or masks.
        progress: show a bar.
    """
    found = Findings(len(dataset), unit=f"{dataset.unit}s", needed=getattr(dataset, "needed", 0))
    found.counts, seen = torch.zeros(len(dataset.classes) + 1, dtype=torch.int64), set()
    for index in tqdm(range(len(dataset)), unit="sample", disable=not progress, leave=False):
        try:
            content = dataset.read(index)
        except UnreadableImage as error:
            found.unreadable.append(str(error))
            continue
        except InputError as error:
            found.wrong.append(str(error))
            continue
        pixels = _count(found, dataset, index, content)
        if isinstance(dataset, ClipDataset):
            found.frames.append(dataset.length(index))
        if dataset.paths[index] not in seen:
            seen.add(dataset.paths[index])
            found.sizes[tuple(pixels.size)] += 1
        values = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels.image, -1, 0)))
        found.bands.add(values.flatten(1) if pixels.empty is None else values[:, ~torch.from_numpy(pixels.empty)])
    for path in dict.fromkeys(dataset.paths):  # windows of one image share its file
        if Path(path).exists():
            found.files.setdefault(checksum(Path(path)), []).append(path)
    return found


def _count(found: Findings, dataset: ImageDataset, index: int, content: Any) -> Pixels:
    """Count what a sample is labelled with, and give its pixels."""
    if isinstance(dataset, SegmentationDataset):
        pixels, mask = content
        found.unit, ignored = "pixels", len(dataset.classes)
        labels = torch.from_numpy(np.where(mask == IGNORED, ignored, mask).astype(np.int64))
        found.counts += torch.bincount(labels.flatten(), minlength=ignored + 1)
        return pixels
    label = dataset.labels[index]
    found.counts[label if isinstance(label, int) else [n for n, value in enumerate(label) if value]] += 1
    return Pixels(content, content.shape[-3:-1])


def checksum(path: Path) -> str:
    """sha256 of a file, or of all files in a folder in the order of their names."""
    total = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with open(file, "rb") as content:
            while block := content.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def twice(findings: Mapping[str, Findings]) -> Iterator[tuple[str, str, str, str]]:
    """Images whose files are equal byte by byte, as (split, path, other split, other path)."""
    places = [(sum_, split, path) for split, f in findings.items() for sum_, paths in f.files.items() for path in paths]
    first: dict[str, tuple[str, str]] = {}
    for checksum, split, path in places:
        if checksum not in first:
            first[checksum] = split, path
        elif first[checksum] != (split, path):
            yield *first[checksum], split, path
