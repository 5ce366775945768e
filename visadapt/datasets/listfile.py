"""Images named with their labels in a text file or a table."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError, hint
from ..registry import DATASETS
from .base import ClassificationDataset, data_root, find_list, read_lines
from .files import read_text

DIGITS = 6
"""Of class indices without class names; a longer one is a slip, and names up to it would fill the memory."""


def resolve_labels(
    labels: Sequence[str], places: Sequence[str], classes: Sequence[str] | None
) -> tuple[list[int], tuple[str, ...]]:
    """Class indices and class names.

    Args:
        labels: as written: all class names, or all class indices; what can be read as both is taken as names.
        places: where each label stands, for messages.
        classes: class names in order; None takes the names that occur, sorted, or the numbers up to the highest.

    Raises:
        InputError: a label is no class.
    """
    numbers = all(re.fullmatch("-?[0-9]+", label) for label in labels)
    for label, place in zip(labels, places) if classes is None and numbers else ():
        if len(label) > DIGITS:
            raise InputError(
                f"{place}: label '{label:.20}' has more than {DIGITS} digits; mend it, or give classes=[...]"
            )
    if classes is None:
        classes = [str(i) for i in range(max(map(int, labels)) + 1)] if numbers else sorted(set(labels))
    names = {str(name): i for i, name in enumerate(classes)}
    if numbers and not all(label in names for label in labels):
        names = {str(i): i for i in range(len(names))}
    for label, place in zip(labels, places):
        if label not in names:
            raise InputError(f"{place}: label '{label}' is none of the {len(names)} classes{hint(label, names)}")
    return [names[label] for label in labels], tuple(map(str, classes))


@DATASETS.register_module()
class ListDataset(ClassificationDataset):
    """Images from a text file with lines `path label`.

    Args:
        list_file: the lines; the label, after the last blank, is a class index or a class name.
        root: folder that the paths are relative to, see `data_root`; None takes the folder of the list.
        classes: class names in order. Without them each list makes its own from what occurs in it, so give them where a
            list may lack a class.
        transform: see ClassificationDataset, as are the arguments below.
        channels: bands of every image.
        strict: raise at the first unreadable image.
        seed: of the augmentation.
        training: what stands in for an unreadable image.

    Raises:
        InputError: no such list, a line without label, a label that is no class, or images that do not exist.
    """

    def __init__(
        self,
        list_file: str | Path,
        root: str | Path | None = None,
        classes: Sequence[str] | None = None,
        transform: list[dict] | None = None,
        channels: int = 3,
        strict: bool = False,
        seed: int = 0,
        training: bool = False,
    ):
        folder = None if root is None else data_root(root)
        source = find_list(list_file, folder or Path())
        base = folder or source.parent
        lines = read_lines(source)
        rows = [line.rsplit(maxsplit=1) for _, line in lines]
        places = [f"{source}:{n}" for n, _ in lines]
        for row, place in zip(rows, places):
            if len(row) < 2:
                raise InputError(f"{place}: '{row[0]}' has no label; a line is 'path label'")
        labels, names = resolve_labels([label for _, label in rows], places, classes)
        super().__init__([base / path for path, _ in rows], labels, names, transform, channels, strict, seed, training)


@DATASETS.register_module()
class CSVDataset(ClassificationDataset):
    """Images from a table with the columns `path` and `label`; other columns are left alone.

    Args:
        csv_file: comma-separated, with a header line; labels are class indices or class names.
        root: folder that the paths are relative to, see `data_root`; None takes the folder of the table.
        classes: class names in order. Without them each table makes its own from what occurs in it, so give them where
            a table may lack a class.
        transform: see ClassificationDataset, as are the arguments below.
        channels: bands of every image.
        strict: raise at the first unreadable image.
        seed: of the augmentation.
        training: what stands in for an unreadable image.

    Raises:
        InputError: no such table or column, a label that is no class, or images that do not exist.
    """

    def __init__(
        self,
        csv_file: str | Path,
        root: str | Path | None = None,
        classes: Sequence[str] | None = None,
        transform: list[dict] | None = None,
        channels: int = 3,
        strict: bool = False,
        seed: int = 0,
        training: bool = False,
    ):
        folder = None if root is None else data_root(root)
        source = find_list(csv_file, folder or Path())
        base = folder or source.parent
        reader = csv.DictReader(io.StringIO(read_text(source), newline=""), skipinitialspace=True)
        try:
            columns = reader.fieldnames or []
            rows = [(f"{source}:{reader.line_num}", row) for row in reader]
        except csv.Error as error:
            raise InputError(f"{source}:{reader.line_num + 1}: {error}; give a comma-separated table") from error
        for name in ("path", "label"):
            if name not in columns:
                raise InputError(f"{source}: no column '{name}'{hint(name, columns)}")
        if not rows:
            raise InputError(f"{source} has no rows below its header")
        for place, row in rows:
            if not row["path"] or not row["label"]:
                raise InputError(f"{place}: path or label is empty")
        labels, names = resolve_labels([row["label"].strip() for _, row in rows], [place for place, _ in rows], classes)
        paths = [base / row["path"].strip() for _, row in rows]
        super().__init__(paths, labels, names, transform, channels, strict, seed, training)
