"""How commands print rows and objects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, counted
from ..files import atomic


def check_out(out: str, *inputs: str | None) -> None:
    """Refuse a name for weights that could not be read again, or that would replace what was read.

    Raises:
        InputError: another suffix than .safetensors, or one of the inputs.
    """
    if Path(out).suffix != ".safetensors":
        raise InputError(f"--out '{out}': weights are written as a .safetensors file")
    for given in filter(None, inputs):
        if Path(out).exists() and Path(given).exists() and Path(out).samefile(given):
            raise InputError(f"--out '{out}' would replace the input {given}; give another name")


def is_file_name(out: Path) -> bool:
    """True for a name that says file and not folder, by the suffix of an image or of JSON."""
    from ..datasets.files import IMAGE_SUFFIXES

    return out.suffix.lower() in (*IMAGE_SUFFIXES, ".json", ".jsonl")


def write_json(path: str | None, text: str) -> None:
    """Write a JSON object that was formatted already, where there is a path."""
    if path:
        with atomic(path) as temporary:
            temporary.write_text(text + "\n")


def write_predictions(
    out: Path, count: int, answers: Iterable[tuple[Path, dict[str, Any]]], noun: str = "image"
) -> None:
    """Write `predictions.jsonl` of so many images, or clips, into a folder, whole or not at all, and say so.

    Raises:
        InputError: every answer is an error.
    """
    results, bad, first = out / "predictions.jsonl", 0, ""
    with atomic(results) as temporary, open(temporary, "w") as file:
        for path, answer in answers:
            file.write(json.dumps({"path": str(path), **answer}) + "\n")
            bad += "error" in answer
            first = first or answer.get("error", "")
    if bad == count:
        raise InputError(f"no prediction for {counted(bad, noun)}, {results} says why; the first: {first}")
    marked = f"; {bad} unreadable, marked with 'error'" if bad else ""
    print(f"{counted(count - bad, noun)}, wrote {results}{marked}")


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


def print_table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Rows under their column names, each column as wide as its widest cell, numbers with their ends in line."""
    cells = [list(columns), *([_text(row[c]) for c in columns] for row in rows)]
    columns = list(zip(*cells))
    widths = [max(map(len, column)) for column in columns]
    numbers = [all(re.fullmatch(r"-|[+-]?[\d,.]+", cell) for cell in column[1:]) for column in columns]
    for line in cells:
        placed = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numbers))
        print("  ".join(placed).rstrip())


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)
