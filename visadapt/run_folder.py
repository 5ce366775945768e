"""The folder of a training run: what a run writes there, and when an earlier one gives way to it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook

from . import config
from .environment import environment
from .errors import InputError
from .files import atomic

FILES = (
    *("config.py", "environment.json", "metrics.jsonl", "curves.png", "report.json", "confusion.png"),
    *("predictions.png", "predictions.html", "adapter_*.safetensors", "epoch_*.pth", "iter_*.pth"),
)
"""What a run leaves, beside mmengine's folders of logs, which are named by their time."""

KEPT = ("optim_wrapper.optimizer", "optim_wrapper.paramwise_cfg", "param_scheduler", "train_cfg.by_epoch")
"""Settings whose state a checkpoint holds."""


def claim(folder: Path, resume: bool, overwrite: bool) -> None:
    """Make the folder of a run; an earlier run in it is neither mixed with the new one nor lost by accident.

    Raises:
        InputError: the folder cannot be written; it holds a run, and neither resume nor overwrite was asked for; or it
            holds a config that is no run's.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as probe:
            probe.write(bytes(1 << 16))
    except OSError as error:
        raise InputError(f"run folder {folder} cannot be written: {(error.strerror or str(error)).lower()}") from error
    if (folder / "metrics.jsonl").exists():
        if not resume and not overwrite:
            raise InputError(f"{folder} holds an earlier run; --resume goes on with it, --overwrite replaces it")
    elif (folder / "config.py").exists():
        raise InputError(f"{folder} holds a config.py and no run; a run would replace it, take another --work-dir")


def keep_schedule(cfg: Config, folder: Path) -> None:
    """Refuse to go on with another optimizer or schedule: their settings come from the checkpoint, changes do nothing.

    Args:
        cfg: of the run that goes on.
        folder: of the checkpoint; one without a config says nothing.

    Raises:
        InputError: a setting differs.
    """
    if not (folder / "config.py").exists():
        return
    before, now = config.load(folder / "config.py").to_dict(), cfg.to_dict()
    for key in KEPT:
        parts = [tree.get(key.partition(".")[0]) for tree in (before, now)]
        if name := key.partition(".")[2]:
            parts = [(part or {}).get(name) for part in parts]
        if said := _difference(*parts, key):
            raise InputError(f"{said}; a resumed run keeps it as in {folder / 'config.py'}: set it back or start anew")


def _difference(before: Any, now: Any, where: str) -> str:
    """The first place where two settings differ, or ""."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = (dict(enumerate(part)) for part in (before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return next(filter(None, (_difference(before.get(k), now.get(k), f"{where}.{k}") for k in keys)), "")
    return "" if before == now else f"{where} was {before!r} and is {now!r}"


def clear(folder: Path, keep: str) -> None:
    """Delete what an earlier run left, and nothing else; `keep` is the log folder of the run that begins."""
    for path in (p for pattern in FILES for p in folder.glob(pattern)):
        path.unlink()
    for path in folder.iterdir():
        if re.fullmatch(r"\d{8}_\d{6}", path.name) and path.is_dir() and path.name != keep:
            shutil.rmtree(path)


class RunFolder(Hook):
    """Write the resolved config and the environment when training begins, which is after all that can be refused.

    Args:
        cfg: the resolved config as it was read.
        overwrite: replace what an earlier run left.
    """

    priority = "HIGHEST"

    def __init__(self, cfg: Config, overwrite: bool) -> None:
        self.cfg, self.overwrite = cfg, overwrite

    def before_train(self, runner) -> None:
        folder = Path(runner.work_dir)
        if self.overwrite:
            clear(folder, runner.timestamp)
        config.dump(self.cfg, folder / "config.py")
        with atomic(folder / "environment.json") as temporary:
            temporary.write_text(json.dumps(environment(), indent=1))
