"""Registries whose names are found by reading source files, so that listing them imports nothing.

A class in `visadapt/<package>/<file>.py` that carries `@ADAPTERS.register_module()` is known by its class name as soon
as the file exists: no import in an `__init__`, no table. Asking for it imports its file. Code outside the package
registers the same way once it has been imported.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import InputError, hint, refusals

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """What is known of a registered class without importing it."""

    name: str
    module: str
    doc: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)  # literal class attributes


def _decorated(node: ast.AST, registry: str) -> bool:
    """True if `node` is a class or function under `@<registry>.register_module()`."""
    return isinstance(node, ast.ClassDef | ast.FunctionDef) and any(
        isinstance(d, ast.Call)
        and isinstance(d.func, ast.Attribute)
        and d.func.attr == "register_module"
        and isinstance(d.func.value, ast.Name)
        and d.func.value.id == registry
        for d in node.decorator_list
    )


def _literals(node: ast.AST) -> dict[str, Any]:
    """Class attributes whose value can be read without running anything."""
    found = {}
    for item in getattr(node, "body", ()):
        if isinstance(item, ast.Assign):
            names = [t.id for t in item.targets if isinstance(t, ast.Name)]
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None:
            names = [item.target.id]
        else:
            continue
        value = item.value
        if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "frozenset":
            value = value.args[0] if value.args else ast.Tuple(elts=[], ctx=ast.Load())
        try:
            literal = ast.literal_eval(value)
        except ValueError:
            continue
        found.update(dict.fromkeys(names, literal))
    return found


class Registry:
    """Names of one sort of building block.

    Args:
        variable: the Python name of this object, as it stands in the decorators.
        noun: what an entry is called in messages.
        package: folder below `visadapt/` whose files are read.
    """

    def __init__(self, variable: str, noun: str, package: str):
        self.variable, self.noun, self.package = variable, noun, package
        self._classes: dict[str, Any] = {}

    @cached_property
    def _source_index(self) -> dict[str, Entry]:
        index = {}
        for path in sorted((ROOT / self.package).glob("*.py")):
            source = path.read_text(encoding="utf-8")
            if f"@{self.variable}." not in source:
                continue
            for node in ast.parse(source).body:
                if _decorated(node, self.variable):
                    doc = (ast.get_docstring(node) or "").strip().split("\n")[0]
                    module = f"visadapt.{self.package}.{path.stem}"
                    index[node.name] = Entry(node.name, module, doc, _literals(node))
        return index

    def entries(self) -> list[Entry]:
        """All entries in alphabetical order: those of the package, then what user code registered."""
        extra = [
            Entry(n, c.__module__, (inspect.getdoc(c) or "").split("\n")[0], dict(vars(c)))
            for n, c in self._classes.items()
            if n not in self._source_index
        ]
        return sorted([*self._source_index.values(), *extra], key=lambda e: e.name.lower())

    def names(self) -> list[str]:
        return [e.name for e in self.entries()]

    def register_module(self):
        """Decorator: make a class known under its own name. A second class of the same name is refused."""

        def register(cls):
            known = self._classes.get(cls.__name__)
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise InputError(
                    f"{self.noun} '{cls.__name__}' is registered twice: {known.__module__}, {cls.__module__}"
                )
            self._classes[cls.__name__] = cls
            return cls

        return register

    def get(self, name: Any) -> Any:
        """The class for a name, for a dotted path 'package.module.Class', or the class itself.

        Raises:
            InputError: nothing has that name; near misses are listed.
        """
        if not isinstance(name, str):
            return name
        if name not in self._classes and name in self._source_index:
            importlib.import_module(self._source_index[name].module)
        if name in self._classes:
            return self._classes[name]
        if "." in name:
            module, _, attribute = name.rpartition(".")
            try:
                return getattr(importlib.import_module(module), attribute)
            except (ImportError, AttributeError) as error:
                raise InputError(f"{self.noun} '{name}' cannot be imported: {error}") from error
        raise InputError(f"unknown {self.noun} '{name}'{self._elsewhere(name) or hint(name, self.names())}")

    def _elsewhere(self, name: str) -> str:
        """How to ask for what is no entry but a value of an entry's argument, whatever its case; else "".

        An entry may say which argument that is, and where the table of its values stands: `stands_for = ("argument",
        "module:TABLE")`.
        """
        for entry in self.entries():
            argument, table = entry.attributes.get("stands_for", ("", ""))
            values = pkgutil.resolve_name(table) if table else ()
            for value in set(values) - set(self.names()):
                if value.lower() == name.lower():
                    return f"; write dict(type='{entry.name}', {argument}='{value}')"
        return ""

    def check(self, found: Any) -> Any:
        """A class as it is, unless it belongs to another registry.

        Raises:
            InputError: it does; both nouns are told.
        """
        for other in ALL:
            entry = other._source_index.get(getattr(found, "__name__", ""))
            if other is not self and entry is not None and entry.module == found.__module__:
                raise InputError(f"{found.__name__} is one of the {other.package}, not of the {self.package}")
        return found

    def owns(self, built: Any) -> bool:
        """True if an object is of a registered class, so that its name and arguments are enough to build it again."""
        name = type(built).__name__
        return name in self.names() and self.get(name) is type(built)

    def build(self, cfg: Any, **extra: Any) -> Any:
        """Build an object from `dict(type=..., **kwargs)`; what is already built passes through.

        Args:
            cfg: a mapping with `type`, or an object.
            extra: further keyword arguments, given by the caller and not by the user.

        Raises:
            InputError: no `type`, an unknown type, or an argument the type does not take.
        """
        if not hasattr(cfg, "keys"):
            return cfg
        kwargs = dict(cfg)
        if "type" not in kwargs:
            raise InputError(f"a {self.noun} is given as dict(type=...), got keys {sorted(kwargs)}")
        cls = self.check(self.get(kwargs.pop("type")))
        for problem in [*unknown_arguments(cls, kwargs), *mistyped_arguments(cls, kwargs)]:
            raise InputError(problem)
        missing = [
            n
            for n, p in inspect.signature(cls).parameters.items()
            if p.default is p.empty
            and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            and n not in {**kwargs, **extra}
        ]
        if missing:
            raise InputError(f"{cls.__name__} needs the argument{'s' * (len(missing) > 1)} {', '.join(missing)}")
        with refusals(cls.__name__):
            return cls(**kwargs, **extra)


def unknown_arguments(cls: Any, names) -> list[str]:
    """One message for each name that the constructor of `cls` does not take."""
    parameters = inspect.signature(cls).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return []
    return [f"{cls.__name__} has no argument '{n}'{hint(n, parameters)}" for n in names if n not in parameters]


PLAIN = (bool, int, float, str, list, tuple, dict, type(None))


def mistyped_arguments(cls: Any, kwargs: Mapping[str, Any]) -> list[str]:
    """One message for each plain value that the annotations of a class of this package do not allow."""
    if not cls.__module__.startswith(f"{__package__}."):
        return []
    parameters = inspect.signature(cls).parameters
    try:
        hints = typing.get_type_hints(cls.__init__ if inspect.isclass(cls) else cls)
    except NameError:  # a name that is imported for type checkers alone
        return []
    return [
        f"{cls.__name__} takes {name} as {parameters[name].annotation}, got {value!r}"
        for name, value in kwargs.items()
        if name in hints and not _fits(value, hints[name])
    ]


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a plain value is of an annotated type; other values and other sorts of annotations are not judged."""
    if not isinstance(value, PLAIN):
        return True
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if wanted in (int, float):  # True is an int to Python, an int is as good as a float
        return isinstance(value, wanted | int) and not isinstance(value, bool)
    if wanted in (bool, str, dict, types.NoneType):
        return isinstance(value, wanted)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if inspect.isclass(origin) and (issubclass(list, origin) or issubclass(tuple, origin)):
        return isinstance(value, list | tuple) and (not inner or all(_fits(item, inner[0]) for item in value))
    return True


def arguments_of(built: Any, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """Constructor arguments that rebuild an object which stores them under their own names, as JSON values."""
    names = [n for n in inspect.signature(type(built)).parameters if n not in leave_out]
    values = {n: getattr(built, n) for n in names}
    return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}


ADAPTERS = Registry("ADAPTERS", "adapter", "adapters")
BACKBONES = Registry("BACKBONES", "backbone", "backbones")
NECKS = Registry("NECKS", "neck", "necks")
HEADS = Registry("HEADS", "head", "heads")
TASKS = Registry("TASKS", "task", "tasks")
LOSSES = Registry("LOSSES", "loss", "losses")
DATASETS = Registry("DATASETS", "dataset", "datasets")
TRANSFORMS = Registry("TRANSFORMS", "transform", "transforms")
METRICS = Registry("METRICS", "metric", "metrics")
ALL = (ADAPTERS, BACKBONES, NECKS, HEADS, TASKS, LOSSES, DATASETS, TRANSFORMS, METRICS)
