"""What the manifest of an adapter file must look like. Files come from strangers: nothing in one is taken on trust."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

ENTRY = {"type": str, "arguments": dict}
NEEDED = {
    "format": int,
    "visadapt": str,
    "adapters": {"*": {**ENTRY, "sites": [{"role": str}]}},
    "backbone": {**ENTRY, "fingerprint": str},
    "heads": {"*": {"type": str, "arguments": dict | None}},
    "tensors": {"*": {"shape": list, "dtype": str}},
    "sha256": str,
}
"""Keys that every manifest has, with the types of their values; "*" stands for any number of names."""

OF_TASKS = {"task": {"type": str}, "classes": [str], "channels": int, "transforms": [dict]}
"""Keys that files of training runs have as well."""

OPTIONAL = {"views_of_clips": dict, "num_frames": int}
"""Keys that some of them have."""


def manifest_problem(manifest: Any) -> str:
    """What is wrong with a manifest, or ""."""
    if not isinstance(manifest, dict):
        return "it is no JSON object"
    shape = NEEDED | {key: kind for key, kind in (OF_TASKS | OPTIONAL).items() if key in manifest}
    return next(_misfits(manifest, shape, ""), "") or next(_foreign_types(manifest), "")


def _misfits(value: Any, shape: Any, where: str) -> Iterator[str]:
    """Keys that are missing and values of another type."""
    kind = type(shape) if isinstance(shape, dict | list) else shape
    if not isinstance(value, kind) or isinstance(value, bool):
        yield f"{where} is {_short(value)}"
    elif isinstance(shape, list):
        for i, item in enumerate(value):
            yield from _misfits(item, shape[0], f"{where}.{i}")
    elif isinstance(shape, dict):
        for name, inner in shape.items():
            for key in value if name == "*" else [name]:
                place = f"{where}.{key}".removeprefix(".")
                if key in value:
                    yield from _misfits(value[key], inner, place)
                else:
                    yield f"{place} is missing"


def _foreign_types(value: Any) -> Iterator[str]:
    """Types that are no plain names: a dotted path would be imported and called."""
    if isinstance(value, dict):
        name = value.get("type")
        if name is not None and not (isinstance(name, str) and name.isidentifier()):
            yield f"type {_short(name)} is no registered name"
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _foreign_types(item)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
