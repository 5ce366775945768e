"""How commands print rows and objects."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError


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
