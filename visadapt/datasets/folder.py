"""One folder per class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError, hint
from ..registry import DATASETS
from .base import ClassificationDataset, data_root, find_list, read_lines
from .files import IMAGE_SUFFIXES


def is_image(path: Path) -> bool:
    """True for a file, or a link to a missing one, with the suffix of an image; not for folders and pipes."""
    return path.suffix.lower() in IMAGE_SUFFIXES and (path.is_file() or (path.is_symlink() and not path.exists()))


def folders_below(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and those below it at any depth, with the names of their files.

    Links are followed, but not to a folder that they lie in.

    Raises:
        InputError: a folder cannot be read; what is in it would be left out without a word.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"folder {error.filename} cannot be read: {error.strerror.lower()}") from error

    for base, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        here = Path(base)
        yield here, names
        links = [name for name in folders if (here / name).is_symlink()]
        if links:
            way = [p.resolve() for p in (here, *here.parents) if p.is_relative_to(folder)]
            around = {name for name in links if any(p.is_relative_to((here / name).resolve()) for p in way)}
            folders[:] = [name for name in folders if name not in around]


def images_below(folder: Path) -> list[Path]:
    """Image files below a folder at any depth, in a fixed order.

    Raises:
        InputError: a folder cannot be read.
    """
    return sorted(p for here, names in folders_below(folder) for p in map(here.joinpath, names) if is_image(p))


def class_of(line: str, classes: tuple[str, ...], where: str) -> int:
    """The class index of a listed path `<class>/<image>`."""
    name = Path(line).parts[0]
    if name not in classes:
        raise InputError(f"{where}: no class folder '{name}' for '{line}'{hint(name, classes)}")
    return classes.index(name)


@DATASETS.register_module()
class FolderDataset(ClassificationDataset):
    """Images in `<root>/<class>/`; the class names in alphabetical order give the class index.

    Args:
        root: folder of class folders, see `data_root`.
        list_file: lines `<class>/<image>`, relative to `root`: a split. None takes all images.
        transform: see ClassificationDataset, as are the arguments below.
        channels: bands of every image.
        strict: raise at the first unreadable image.
        seed: of the augmentation.
        training: what stands in for an unreadable image.

    Raises:
        InputError: no such folder, no class folders, an empty one, or a list that names what is not there.
    """

    def __init__(
        self,
        root: str | Path,
        list_file: str | Path | None = None,
        transform: list[dict] | None = None,
        channels: int = 3,
        strict: bool = False,
        seed: int = 0,
        training: bool = False,
    ):
        base = data_root(root)
        classes = tuple(sorted(p.name for p in base.iterdir() if p.is_dir() and not p.name.startswith(".")))
        if not classes:
            raise InputError(f"{type(self).__name__}: {base} has no class folders; put images in {base}/<class>/")
        if list_file is None:
            paths, labels = self._walk(base, classes)
        else:
            source = find_list(list_file, base)
            lines = read_lines(source)
            paths = [base / line for _, line in lines]
            labels = [class_of(line, classes, f"{source}:{n}") for n, line in lines]
        super().__init__(paths, labels, classes, transform, channels, strict, seed, training)

    def _walk(self, base: Path, classes: tuple[str, ...]) -> tuple[list[Path], list[int]]:
        found = {name: images_below(base / name) for name in classes}
        empty = [name for name, images in found.items() if not images]
        if empty:
            raise InputError(
                f"{type(self).__name__}: {base} has class folders without an image: {', '.join(empty[:5])}; "
                "remove them or fill them"
            )
        pairs = [(path, label) for label, name in enumerate(classes) for path in found[name]]
        return [path for path, _ in pairs], [label for _, label in pairs]
