"""`visadapt bench clips`: do workers that decode videos keep a training step fed?"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
from torch.utils.data import DataLoader

from .. import __version__
from ..datasets.clips import ClipDataset, collate_clips
from ..datasets.video_files import choose
from .methods import adapted_with, stepper
from .setup import Setup
from .timing import interleaved

VIDEOS, SECONDS, RATE, HEIGHT, WIDTH = 16, 10, 30, 240, 320
FRAMES, WORKERS, ROUNDS = 8, 2, 5


def measure_clips(setup: Setup, method: str = "ZeroI2V") -> dict[str, Any]:
    """Clips per second from a loader of training clips, and of a training step, in turns.

    The videos are made here: mp4 of 10 seconds, 320 x 240 at 30 frames per second. A clip is 8 frames from all over its
    video, cut and resized to the side of `setup`; the step is that of the method on one clip at a time.
    """
    with TemporaryDirectory() as folder:
        paths = [_video(Path(folder) / f"{n}.mp4", n) for n in range(VIDEOS)]
        crop = [dict(type="RandomResizedCrop", size=(setup.size, setup.size))]
        data = ClipDataset(paths, [0] * VIDEOS, ["any"], crop, num_frames=FRAMES, training=True)
        loader = DataLoader(data, 1, num_workers=WORKERS, collate_fn=collate_clips, persistent_workers=True)
        step = stepper(adapted_with(setup, {"type": method}), setup.images(FRAMES))
        times = interleaved({"loading": partial(list, loader), "training": step}, ROUNDS, setup.device)
    loading, training = median(times["loading"]) / VIDEOS, median(times["training"])
    return {
        **{"visadapt": __version__, "machine": setup.machine(), "device": setup.device},
        **{"model": setup.model, "size": setup.size, "method": method, "decoder": choose("auto"), "workers": WORKERS},
        **{"clips_per_second_loaded": 1 / loading, "clips_per_second_trained": 1 / training},
        "loading_over_training": loading / training,
    }


def _video(path: Path, seed: int) -> Path:
    """A picture that drifts, which costs as much to decode as a filmed one does."""
    random = np.random.default_rng(seed)
    picture = cv2.resize(random.integers(0, 255, (60, 80, 3), dtype=np.uint8), (2 * WIDTH, 2 * HEIGHT))
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), RATE, (WIDTH, HEIGHT))
    for n in range(SECONDS * RATE):
        writer.write(picture[n % HEIGHT :][:HEIGHT, n % WIDTH :][:, :WIDTH])
    writer.release()
    return path
