"""Reading configs strictly: every mistake is found before anything is built, and all of them are told at once."""

from __future__ import annotations

import ast
import inspect
import os
import pkgutil
import pprint
import re
import traceback
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mmengine import registry as engine
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, LogProcessor, Runner, TestLoop, ValLoop
from mmengine.visualization import Visualizer
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from .errors import InputError, hint
from .files import atomic
from .optim import allora, galore, lora_pro, sst  # noqa: F401  for their names beside those of torch
from .registry import ADAPTERS, BACKBONES, DATASETS, HEADS, LOSSES, METRICS, NECKS, TASKS, Registry, mistyped_arguments

OWN_KEYS = {"model_wrapper_cfg", "find_unused_parameters", "cache_features"}
"""Top-level keys that are no arguments of mmengine's Runner."""

COMMAND_LINE = {"resume": "--resume", "load_from": "--resume FILE", "launcher": "tools/dist_train.sh"}
"""Arguments of the Runner that are set on the command line, by what sets them."""

TOP_KEYS = set(inspect.signature(Runner).parameters) - {"cfg", "log_level"} | OWN_KEYS

COUNTS = ("max_epochs", "max_iters", "val_interval")
"""Entries of train_cfg that must be 1 or more."""

TOGETHER = (
    ("train_dataloader", "train_cfg", "optim_wrapper"),
    ("val_dataloader", "val_cfg", "val_evaluator"),
    ("test_dataloader", "test_cfg", "test_evaluator"),
)
"""The runner takes all keys of a row or none."""

REGISTRIES = {
    "model": TASKS,
    "model*.backbone": BACKBONES,
    "model*.adapters.*": ADAPTERS,
    "model*.neck": NECKS,
    "model*.head": HEADS,
    "model*.loss": LOSSES,
    "*_dataloader*.dataset": DATASETS,
    "*_dataloader*.parts.[0-9]": DATASETS,
    "*_dataloader.sampler": engine.DATA_SAMPLERS,
    "*_dataloader.batch_sampler": engine.DATA_SAMPLERS,
    "*_dataloader.collate_fn": engine.FUNCTIONS,
    "*_evaluator": METRICS,
    "*_evaluator.[0-9]*": METRICS,
    "optim_wrapper": engine.OPTIM_WRAPPERS,
    "optim_wrapper.optimizer": engine.OPTIMIZERS,
    "param_scheduler*": engine.PARAM_SCHEDULERS,
    "default_hooks.*": engine.HOOKS,
    "custom_hooks.*": engine.HOOKS,
    "*_cfg": engine.LOOPS,
    "visualizer": engine.VISUALIZERS,
    "visualizer.vis_backends.*": engine.VISBACKENDS,
    "log_processor": engine.LOG_PROCESSORS,
}
"""Where a short name is looked up; the first pattern that fits a dict's place counts. Elsewhere its owner does it."""

IMPLICIT = {
    "*_dataloader": DataLoader,
    "optim_wrapper.clip_grad": clip_grad_norm_,
    "val_cfg": ValLoop,
    "test_cfg": TestLoop,
    "randomness": Runner.set_randomness,
    "log_processor": LogProcessor,
    "visualizer": Visualizer,
    "model_wrapper_cfg": MMDistributedDataParallel,
}
"""What takes the entries of a dict without `type`."""

EXTRA = {
    "*_dataloader": {"dataset", "sampler", "batch_sampler", "collate_fn", "num_batch_per_epoch"},
    "train_cfg": {"by_epoch"},
    "optim_wrapper": {"constructor", "paramwise_cfg"},
    "param_scheduler*": {"convert_to_iter_based"},
    "*_hooks.*": {"priority"},
}
"""Entries that the builder takes out before the constructor sees the rest."""

OF_BASE = ", which a base file gives and update() keeps; assign the dict anew, or merge() it with _delete_=True"
"""About an argument that a type does not take and the config file does not write."""


def load(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Config:
    """Read a config, apply overrides, check everything.

    Types in the result are dotted names, so that a dumped config reads like the first one.

    Args:
        path: a Python file.
        overrides: "a.b.c=value" for keys that exist, or arguments of the type that is built there; list entries are
            addressed by their index. Values are Python literals, anything else is a string; numbers, flags, lists and
            dicts stay what they are.

    Raises:
        InputError: no config, or any number of problems, in one line.
    """
    path = Path(path)
    tree = _read(path)
    problems = [p for text in overrides if (p := _override(tree, text)) is not None]
    problems += _check(tree, _written(path, overrides))
    if problems:
        raise InputError(f"{path}: {'; '.join(problems)}")
    return Config(tree, filename=str(path))


def dump(cfg: Config, path: str | os.PathLike) -> None:
    """Write a loaded config as a Python file that `load` reads to the same values in the same order."""
    values = {key: pprint.pformat(value, width=110, sort_dicts=False) for key, value in cfg.to_dict().items()}
    with atomic(path) as temporary:
        temporary.write_text("".join(f"{key} = {value}\n" for key, value in values.items()), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    """Top-level keys of a config file; names that the file uses itself (`size = 224`) are left out."""
    if not path.exists():
        raise InputError(f"no config file {path}{hint(path.name, (p.name for p in path.parent.glob('*.py')))}")
    if path.is_dir() or path.suffix != ".py":
        raise InputError(f"{path} is no config; a config is a Python file (.py)")
    try:
        tree = Config.fromfile(path, lazy_import=True).to_dict()
        used = {n.id for n in ast.walk(ast.parse(path.read_bytes())) if isinstance(n, ast.Name) and _is_read(n)}
    except (Exception, SystemExit) as error:  # a config is code and can fail in any way
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f" (line {lines[-1]})" if lines else ""
        called = type(error) is RuntimeError and not error.args  # how mmengine's lazy imports refuse a call
        holds_text = isinstance(error, UnicodeError | SyntaxError)  # their repr holds much of the file
        message = f"{type(error).__name__}: {error}" if holds_text else repr(error)
        message = "what is imported cannot be called, write dict(type=...)" if called else message
        if base := re.match(r"(.+\.py) not found! It means", str(error)):  # how mmengine misses a base file
            base = Path(os.path.normpath(base[1]))
            message = f"its base file {base} not found{hint(base.name, (p.name for p in base.parent.glob('*.py')))}"
        raise InputError(f"{path} cannot be read as a config{place}: {message}") from error
    if not TOP_KEYS & set(tree):
        raise InputError(f"{path} is no config: it defines neither model nor any other key of a config")
    return {key: value for key, value in tree.items() if key in TOP_KEYS or key not in used}


def _is_read(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Load)


def _written(path: Path, overrides: Sequence[str]) -> set[Any]:
    """Keys that a config file and overrides write out; the others of a config are from its base files."""
    nodes = [*ast.walk(ast.parse(path.read_bytes()))]
    words = re.findall(r"\w+", " ".join(overrides))
    keys = {n.arg for n in nodes if isinstance(n, ast.keyword)} | {
        n.value for n in nodes if isinstance(n, ast.Constant)
    }
    return keys | set(words)


def _check(tree: dict[str, Any], written: set[Any]) -> Iterator[str]:
    """Everything that is wrong with a config; short names of our registries become dotted ones on the way."""
    yield from (f"unknown top-level key '{key}'{hint(key, TOP_KEYS)}" for key in tree if key not in TOP_KEYS)
    yield from (
        f"{key} does nothing in a config; use {option}" for key, option in COMMAND_LINE.items() if tree.get(key)
    )
    model = tree.get("model")
    if not isinstance(model, dict) or "type" not in model:
        yield "a config needs model=dict(type=...)"
    counts = tree["train_cfg"] if isinstance(tree.get("train_cfg"), dict) else {}
    for key, number in ((k, counts[k]) for k in COUNTS if k in counts):
        if type(number) is not int or number < 1:
            yield f"train_cfg.{key} must be a whole number of at least 1, got {number!r}"
    wrapper = tree.get("optim_wrapper")
    name = wrapper.get("constructor") if isinstance(wrapper, dict) else None
    if name is not None and engine.OPTIM_WRAPPER_CONSTRUCTORS.get(str(name)) is None:
        yield f"optim_wrapper: unknown constructor '{name}'{hint(name, engine.OPTIM_WRAPPER_CONSTRUCTORS.module_dict)}"
    for row in TOGETHER:
        missing = [key for key in row if tree.get(key) is None]
        if missing and len(missing) < len(row):
            yield f"{', '.join(row)} belong together, {' and '.join(missing)} is missing"
    for key, value in tree.items():
        if key in TOP_KEYS:
            yield from _walk(value, key, written)


def _walk(value: Any, where: str, written: set[Any]) -> Iterator[str]:
    if isinstance(value, dict):
        try:
            target = _target(value, where)
        except InputError as error:
            yield f"{where}: {error}"
            target = None
        if target is not None and (accepted := _accepted(target, where)) is not None:
            for name in (n for n in value if n != "type" and n not in accepted):
                advice = hint(name, accepted) if name in written else OF_BASE
                yield f"{where}: {target.__name__} has no argument '{name}'{advice}"
        if target is not None:
            given = {n: v for n, v in value.items() if n != "type"}
            yield from (f"{where}: {problem}" for problem in mistyped_arguments(target, given))
        for key, item in value.items():
            yield from _walk(item, f"{where}.{key}", written)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _walk(item, f"{where}.{i}", written)
    elif not isinstance(value, str | int | float | None):
        yield f"{where}: a config holds plain values, not a {type(value).__name__}"


def _first(table: dict[str, Any], where: str) -> Any:
    return next((entry for pattern, entry in table.items() if fnmatchcase(where, pattern)), None)


def _target(value: dict[str, Any], where: str) -> Any:
    """The class or function that will take the entries of a dict; None where that is its owner's affair.

    Raises:
        InputError: its `type` cannot be found.
    """
    if "type" not in value:
        if where == "train_cfg":
            return EpochBasedTrainLoop if value.get("by_epoch") else IterBasedTrainLoop
        return _first(IMPLICIT, where)
    name, registry = value["type"], _first(REGISTRIES, where)
    if not isinstance(name, str):
        raise InputError(f"type is a class or its name, got {name!r}")
    if "." in name:
        try:
            found = pkgutil.resolve_name(name)
        except Exception as error:  # the module is imported here and can fail in any way
            raise InputError(f"type '{name}' cannot be imported: {error}") from error
        return registry.check(found) if isinstance(registry, Registry) else found
    if registry is None:
        return None
    found = registry.get(name)
    if found is None:
        raise InputError(f"unknown {registry.name} '{name}'{hint(name, registry.module_dict)}")
    value["type"] = f"{found.__module__}.{found.__qualname__}"
    return found


def _accepted(target: Any, where: str) -> set[str] | None:
    """Argument names that a class or function takes, None where it takes any."""
    if inspect.isclass(target) and target.__init__ is object.__init__ and target.__new__ is object.__new__:
        return set()
    # mmengine's schedulers hand on *args and **kwargs: what counts is the first constructor that does not
    chain = [c.__init__ for c in target.__mro__ if "__init__" in vars(c)] if inspect.isclass(target) else [target]
    for function in chain:
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError:
            return None
        kinds = {p.kind for p in parameters}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return {p.name for p in parameters} - {"self"} | (_first(EXTRA, where) or set())
        if inspect.Parameter.VAR_POSITIONAL not in kinds:
            return None
    return None


def _override(tree: dict[str, Any], text: str) -> str | None:
    """Apply one override; what is wrong with it, or None."""
    path, equals, raw = text.partition("=")
    if not equals or not path:
        return f"override '{text}': write it as a.b.c=value"
    node: Any = tree
    *parents, last = path.split(".")
    for depth, part in enumerate(parents):
        key = _key(node, part)
        if key is None:
            return _no_key(path, node, ".".join(parents[:depth]), part, set())
        node = node[key]
    where = ".".join(parents)
    key = _key(node, last)
    if key is None:
        offered = _arguments(node, where)
        if last not in offered:
            return _no_key(path, node, where, last, offered)
        key = last
    present = node.get(key) if isinstance(node, dict) else node[key]
    try:
        node[key] = _value(raw, present)
    except InputError as error:
        return f"override '{path}': {error}"
    return None


def _key(node: Any, part: str) -> str | int | None:
    """The key of a dict or the index of a list that a part of a path means, None where there is none."""
    if isinstance(node, dict):
        return part if part in node else None
    if isinstance(node, list) and part.removeprefix("-").isdigit() and -len(node) <= int(part) < len(node):
        return int(part)
    return None


def _no_key(path: str, node: Any, where: str, part: str, offered: set[str]) -> str:
    place = f"under '{where}'" if where else "at the top level"
    if isinstance(node, dict):
        return f"override '{path}': no key '{part}' {place}{hint(part, {*node, *offered})}"
    if isinstance(node, list):
        return f"override '{path}': no entry {part} {place}, a list of {len(node)}; entries are counted from 0"
    return f"override '{path}': no key '{part}' {place}, which is {node!r}"


def _arguments(node: Any, where: str) -> set[str]:
    """Keys that a dict may have and need not."""
    if not where:
        return TOP_KEYS
    if not isinstance(node, dict):
        return set()
    try:
        target = _target(node, where)
    except InputError:  # reported by the check that follows
        return set()
    return (_accepted(target, where) or set()) if target is not None else set()


def _value(raw: str, present: Any) -> Any:
    """The value that the text of an override stands for, of the type of the present one.

    Raises:
        InputError: it has another type.
    """
    try:
        value = ast.literal_eval(raw)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        if raw.lstrip()[:1] in ("[", "(", "{"):
            raise InputError(f"{raw} is no Python value; strings inside need quotes") from error
        value = raw
    if isinstance(present, str):
        return value if value is None or isinstance(value, str) else raw
    if isinstance(present, float) and type(value) is int:
        return float(value)
    if isinstance(present, list | tuple) and isinstance(value, list | tuple):
        return type(present)(value)
    if present is not None and type(value) is not type(present):
        raise InputError(f"it is the {type(present).__name__} {present!r} and cannot become {raw}")
    return value
