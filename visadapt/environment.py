"""What a run was made with."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import Any

PACKAGES = (
    *("visadapt", "torch", "torchvision", "timm", "onedl-mmengine", "albumentations", "opencv-python", "numpy"),
    *("safetensors", "einops", "torchmetrics", "scikit-learn"),
)


def version(package: str) -> str | None:
    """Installed version of a distribution, None where it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Versions, machine and threads, as JSON values."""
    import torch

    from . import __version__

    cuda = torch.cuda.is_available()
    return {
        "visadapt": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {p: version(p) for p in PACKAGES if p != "visadapt"},
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if cuda else None,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "command": sys.argv,
    }
