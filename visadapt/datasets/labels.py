"""From what mask files hold, numbers or colours, to class indices."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..ignored import IGNORED

SHOWN = 8
UNKNOWN = -1


class Labels:
    """Turns masks as they are stored into class indices, and refuses what stands for no class.

    Without `label_map` and `colors` a mask holds class indices. The number 255 is ignored unless `label_map` gives it a
    class.

    Args:
        classes: class names in order.
        label_map: class index, or 255 for ignored, of every number that masks hold.
        colors: of each class, (r, g, b) or "#rrggbb"; masks then hold colours.
        ignore: further numbers, or colours, whose pixels are ignored.
        reduce_zero: 0 is ignored and every other number is one above its class index.

    Attributes:
        colors: (r, g, b) of each class, or None.

    Raises:
        InputError: more classes than 8 bits tell apart, arguments that exclude each other, colours or indices that
            cannot be.
    """

    def __init__(
        self,
        classes: Sequence[str],
        label_map: Mapping[Any, int] | None = None,
        colors: Sequence[Any] | None = None,
        ignore: Sequence[Any] = (),
        reduce_zero: bool = False,
    ):
        if not 1 <= len(classes) <= IGNORED:
            raise InputError(f"masks tell apart 1 to {IGNORED} classes, got {len(classes)}")
        given = [n for n, on in (("label_map", label_map), ("colors", colors), ("reduce_zero", reduce_zero)) if on]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} exclude each other; give one of them")
        self.classes = tuple(classes)
        self.colors = None if colors is None else tuple(map(rgb, colors))
        if self.colors is not None:
            table = _color_table(self.colors, self.classes)
            ignored = [_packed(np.array(rgb(color))).item() for color in ignore]
        else:
            first = int(reduce_zero)
            table = _checked(label_map, self.classes) if label_map else {i + first: i for i in range(len(classes))}
            table = {IGNORED: IGNORED} | table
            ignored = [_whole(number, "ignore") for number in ignore] + [0] * reduce_zero
        self._table = dict(sorted((table | dict.fromkeys(ignored, IGNORED)).items()))
        self._keys = np.array(list(self._table))
        self._indices = np.array(list(self._table.values()), np.int16)
        self._of_byte = self._find(np.arange(256))

    def _find(self, keys: np.ndarray) -> np.ndarray:
        at = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._indices[at], np.int16(UNKNOWN))

    def __call__(self, raw: np.ndarray, path: str | Path) -> np.ndarray:
        """Class indices.

        Args:
            raw: (H, W) whole numbers, or (H, W, 3) with `colors`.
            path: of the mask, for messages.

        Returns:
            (H, W) uint8, 255 where pixels are ignored.

        Raises:
            InputError: a number or a colour stands for no class.
        """
        keys = raw if self.colors is None else _packed(raw)
        # a search for each of 256 values and a table are five times as fast as a search for each pixel
        found = self._of_byte[keys] if keys.dtype == np.uint8 else self._find(keys)
        if (found == UNKNOWN).any():
            values, counts = np.unique(keys[found == UNKNOWN], return_counts=True)
            unknown = [f"{self._name(v)} ({n} pixels)" for v, n in zip(values.tolist(), counts.tolist())]
            meaning = dict(enumerate(self.classes)) | {IGNORED: "ignored"}
            known = [f"{self._name(key)} {meaning[index]}" for key, index in self._table.items()]
            raise InputError(
                f"mask {path} holds {_some(unknown)}, which stands for no class; known are {_some(known)}; mend the "
                "mask, or add what may be left out to ignore=[...]"
            )
        return found.astype(np.uint8)

    def _name(self, key: int) -> str:
        return str(key) if self.colors is None else f"#{key:06x}"


def rgb(color: Any) -> tuple[int, int, int]:
    """A colour from (r, g, b) or "#rrggbb".

    Raises:
        InputError: it is neither.
    """
    if isinstance(color, str) and re.fullmatch("#[0-9a-fA-F]{6}", color):
        return tuple(bytes.fromhex(color[1:]))
    if isinstance(color, list | tuple) and len(color) == 3 and all(type(c) is int and 0 <= c < 256 for c in color):
        return tuple(color)
    raise InputError(f"a color is (r, g, b) of 0 to 255, or '#rrggbb', got {color!r}")


def _packed(colors: np.ndarray) -> np.ndarray:
    """(..., 3) to one number per colour, 0xrrggbb."""
    r, g, b = np.moveaxis(colors.astype(np.int32), -1, 0)
    return r << 16 | g << 8 | b


def _color_table(colors: Sequence[tuple[int, int, int]], classes: Sequence[str]) -> dict[int, int]:
    if len(colors) != len(classes):
        raise InputError(f"{len(colors)} colors but {len(classes)} classes; each class has one")
    for i, color in enumerate(colors):
        if color in colors[:i]:
            raise InputError(f"classes '{classes[colors.index(color)]}' and '{classes[i]}' have the same color {color}")
    return {_packed(np.array(color)).item(): i for i, color in enumerate(colors)}


def _checked(label_map: Mapping[Any, int], classes: Sequence[str]) -> dict[int, int]:
    for number, index in label_map.items():
        if index != IGNORED and not 0 <= index < len(classes):
            raise InputError(
                f"label_map turns {number} into {index}, but there are {len(classes)} classes (0 to "
                f"{len(classes) - 1}, or {IGNORED} for ignored)"
            )
    return {_whole(number, "label_map"): index for number, index in label_map.items()}


def _whole(number: Any, where: str) -> int:
    """JSON turns keys into text, so '-1' is a number here."""
    try:
        return int(number)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: masks hold whole numbers, got {number!r}; for colours give colors") from error


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f", … ({len(names)} in all)" if len(names) > SHOWN else "")
