"""VTAB-1k (Zhai et al. 2019): 19 tasks with 1000 training images each, in the layout of the NOAH and SSF archives."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError, hint
from ..registry import DATASETS
from .base import data_root
from .listfile import ListDataset

NATURAL = dict(cifar=100, caltech101=102, dtd=47, oxford_flowers102=102, oxford_iiit_pet=37, svhn=10, sun397=397)
SPECIALIZED = dict(patch_camelyon=2, eurosat=10, resisc45=45, diabetic_retinopathy=5)
STRUCTURED = dict(
    clevr_count=8,
    clevr_dist=6,
    dmlab=6,
    kitti=4,
    dsprites_loc=16,
    dsprites_ori=16,
    smallnorb_azi=18,
    smallnorb_ele=9,
)
TASKS = {**NATURAL, **SPECIALIZED, **STRUCTURED}  # task -> number of classes
SPLITS = ("train800", "val200", "train800val200", "test")


@DATASETS.register_module()
class VTABDataset(ListDataset):
    """One split of one VTAB-1k task, from `<root>/<task>/<split>.txt` with lines `relative/path label`.

    Hyper-parameters are chosen on train800 and val200; the final model is trained on train800val200 and measured on
    test.

    Args:
        task: one of the 19 names in `TASKS`.
        split: train800, val200, train800val200 or test.
        root: folder that holds the task folders, see `data_root`.
        transform: see ClassificationDataset, as are the arguments below.
        strict: raise at the first unreadable image.
        seed: of the augmentation.
        training: what stands in for an unreadable image.

    Raises:
        InputError: an unknown task or split, no such folder or list, or a label the task does not have.
    """

    def __init__(
        self,
        task: str,
        split: str = "train800val200",
        root: str | Path = "vtab-1k",
        transform: list[dict] | None = None,
        strict: bool = False,
        seed: int = 0,
        training: bool = False,
    ):
        if task not in TASKS:
            raise InputError(f"VTAB-1k has no task '{task}'{hint(task, TASKS)}")
        if split not in SPLITS:
            raise InputError(f"VTAB-1k has no split '{split}'{hint(split, SPLITS)}")
        base = data_root(root) / task
        if not base.is_dir():
            raise InputError(f"VTAB-1k: no folder {base}; unpack the task there, see data/README.md")
        classes = [str(i) for i in range(TASKS[task])]
        super().__init__(base / f"{split}.txt", base, classes, transform, 3, strict, seed, training)
