"""Stored results: one JSON line per finished run."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import InputError

RESULTS = Path("benchmark_results")
STORED = {
    "config",
    "overrides",
    "seed",
    "method",
    "task",
    "metric",
    "value",
    "train_images",
    "test_images",
}
STORED |= {"trainable_params", "stored_bytes", "seconds", "config_hash", "version"}
"""Keys of a stored line that are read again."""


def config_hash(cfg: Any) -> str:
    """Identity of a run's settings, whatever its folder is called."""
    settings = {k: v for k, v in cfg.to_dict().items() if k not in ("work_dir", "resume", "load_from", "log_level")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_lines(path: Path, keys: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stored lines that have all of `keys`, each with its place as "file:line"; none where there is no such file.

    Raises:
        InputError: a line is no result, or the file cannot be read.
    """
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise InputError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    for n, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise InputError(f"{path}:{n}: no JSON object; mend or remove the line") from error
        if not isinstance(line, dict):
            raise InputError(f"{path}:{n}: no JSON object; mend or remove the line")
        if missing := sorted(set(keys) - set(line)):
            raise InputError(f"{path}:{n}: no {', '.join(missing)}; mend or remove the line")
        yield f"{path}:{n}", line


class Store:
    """A file of result lines; those of a suite are written by one sweep at a time.

    Args:
        path: a file of JSON lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other sweeps on this machine away.

        Raises:
            InputError: another one is at work.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(f"another sweep writes {self.path}; wait for it, or stop it") from error
            yield

    def finished(self) -> set[str]:
        """Identities of the cells that this version has run.

        Raises:
            InputError: a line is no result.
        """
        return {line["config_hash"] for line in self._lines() if line["version"] == __version__}

    def other_versions(self) -> int:
        """How many results other versions have left."""
        return sum(line["version"] != __version__ for line in self._lines())

    def _lines(self) -> Iterator[dict[str, Any]]:
        return (line for _, line in read_lines(self.path, ("config_hash", "version")))

    def append(self, line: dict[str, Any]) -> None:
        """Add a line, whole or not at all; a file without its last line end gets it first.

        Raises:
            OSError: the disk takes no more; the file is as it was.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            text = (b"" if file.read(1) in (b"", b"\n") else b"\n") + json.dumps(line).encode() + b"\n"
            try:
                if file.write(text) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise


def read_results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All stored lines of the training runs.

    Raises:
        InputError: a line is no result.
    """
    return [line for _, line in read_lines(folder / "training.jsonl", STORED)]


def measured(runner: Any) -> dict[str, Any]:
    """What a line says of a run that has ended and has the hook AdapterFiles."""
    from ..checkpoint import unwrap
    from ..hooks.files import AdapterFiles

    hook, task = next(h for h in runner.hooks if isinstance(h, AdapterFiles)), unwrap(runner.model)
    return {
        **{"metric": hook.monitor, "value": hook.metrics[hook.monitor], "metrics": hook.metrics},
        "train_images": len(runner.train_dataloader.dataset),
        "test_images": len(runner.val_dataloader.dataset),
        "trainable_params": task.adapted.trainable_report(task.heads).trainable,
        "stored_bytes": (Path(runner.work_dir) / "adapter_last.safetensors").stat().st_size,
    }


def train_and_store(config_path: str, overrides: list[str], seeds: Iterable[int], work_dir: Path) -> None:
    """Train a config once per seed and append a line each; what is stored already is not run again.

    The value is that of the last epoch: the test set chooses nothing.
    """
    from .. import config
    from ..checkpoint import unwrap
    from ..commands.train import train

    for seed in seeds:
        words = [*overrides, f"randomness.seed={seed}"]
        cfg = config.load(config_path, words)
        if cfg.get("val_dataloader") is None or not any("AdapterFiles" in str(h) for h in cfg.get("custom_hooks", ())):
            raise InputError(f"{config_path}: a stored result needs val_dataloader and the hook AdapterFiles")
        key = config_hash(cfg)
        if any(r["config_hash"] == key and r["version"] == __version__ for r in read_results()):
            print(f"{config_path} with seed {seed} is stored already")
            continue
        start = time.perf_counter()
        folder = work_dir / f"{Path(config_path).stem}_{key}"
        runner = train(cfg, str(folder), overwrite=True)
        task = unwrap(runner.model)
        line = {
            "config": config_path,
            "overrides": overrides,
            "seed": seed,
            "method": ", ".join(type(a).__name__ for a in task.adapted.adapters.values()) or "linear probe",
            "backbone": f"{task.adapted.backbone.name}, {task.adapted.backbone.weights}",
            "task": Path(config_path).stem.rsplit("_", 1)[-1] + (f" {' '.join(overrides)}" if overrides else ""),
            **measured(runner),
            "seconds": round(time.perf_counter() - start, 1),
            "config_hash": key,
            "version": __version__,
        }
        Store(RESULTS / "training.jsonl").append(line)
