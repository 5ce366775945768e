"""The configs of published settings say what the papers and their code say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from visadapt import config
from visadapt.transforms.albu import Albu

CONFIGS = Path(__file__).parent.parent / "configs"
OFFICIAL = sorted(CONFIGS.glob("*/*-l16_*.py"))
P, V, U, R = "potsdam", "vaihingen", "urban", "rural"
EARTH = {
    f"{P}2{V}-da": (64, [0, 1, 2], 0.3),
    f"{V}2{P}-da": (32, [21, 22, 23], 0.2),
    f"{R}2{U}-da": (16, [21, 22, 23], 0.3),
    f"{U}2{R}-da": (32, [18, 19, 20, 21, 22, 23], 0.2),
    f"{P}2{V}-dg": (24, [18, 19, 20, 21, 22, 23], 0.3),
    f"{V}2{P}-dg": (64, [0, 1, 2, 3, 4, 5], 0.3),
    f"{R}2{U}-dg": (64, [0, 1, 2, 3, 4, 5], 0.3),
    f"{U}2{R}-dg": (64, [21, 22, 23], 0.3),
    "loveda-ss": (16, [0, 1, 2], 0.2),
    f"{P}-ss": (32, [21, 22, 23], 0.2),
}
CLOUD = {"hrc-whu": 40, "gf1": 80, "gf2": 40, "cloudsen12-l1c": 40, "cloudsen12-l2a": 40, "l8-biome": 40}


def test_every_setting_is_there():
    assert len(OFFICIAL) == len(EARTH) + len(CLOUD) + 1


@pytest.mark.parametrize("setting", EARTH)
def test_earth_adapter(setting):
    (path,) = (CONFIGS / "earth_adapter").glob(f"*k_{setting}-512.py")
    cfg = config.load(path)
    main = cfg.model.adapters.main
    assert (main.width, list(main.fft_layers), main.cutoff) == EARTH[setting]
    assert cfg.train_cfg.max_iters == cfg.param_scheduler.end == (40_000 if setting.endswith("ss") else 20_000)
    assert cfg.train_cfg.val_interval == 2000
    adaptation = setting.endswith("da")
    assert cfg.model.type.rpartition(".")[2] == ("SelfTraining" if adaptation else "Segmenter")
    assert cfg.train_dataloader.batch_size == (2 if adaptation else 4)


@pytest.mark.parametrize("setting", CLOUD)
def test_cloud_adapter(setting):
    (path,) = (CONFIGS / "cloud_adapter").glob(f"*-l16_*k_{setting}-*.py")
    cfg = config.load(path)
    assert cfg.train_cfg.max_iters == 1000 * CLOUD[setting] and cfg.train_cfg.val_interval == 4000
    assert cfg.train_dataloader.batch_size == 4 and cfg.randomness.seed == 42
    assert cfg.model.head.num_classes == (4 if setting.startswith(("cloudsen", "l8")) else 2)


@pytest.mark.parametrize("path", OFFICIAL, ids=lambda p: p.stem)
def test_what_all_share(path):
    """Optimizer, image size and transforms; images of other sizes leave training at the size of the setting."""
    cfg = config.load(path)
    size = int(path.stem.rsplit("-", 1)[1])
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.lr, optimizer.weight_decay, cfg.param_scheduler.power) == (1e-4, 0.05, 0.9)
    assert cfg.optim_wrapper.get("clip_grad") is None and cfg.optim_wrapper.get("dtype") is None
    backbone = cfg.model.backbone
    assert backbone.arch.to_dict() == dict(patch_size=16, img_size=size) and backbone.out_indices == [7, 11, 15, 23]
    dataset = cfg.train_dataloader.dataset
    for part in [dataset[k] for k in ("source", "target") if k in dataset] or [dataset]:
        transform = Albu(part.to_dict()["transform"])
        sides = (250, 250) if "-gf" in path.stem else (700, 600)  # as Gaofen's crops are
        image = np.random.default_rng(0).integers(0, 256, (*sides, 3), dtype=np.uint8)
        image, mask = transform(image, 1, np.zeros(sides, np.uint8))
        assert image.shape[:2] == mask.shape == (size, size)
