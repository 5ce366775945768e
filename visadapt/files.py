"""Writing files so that a crash, a kill or a full disk never harms what was there."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InputError

UMASK = os.umask(0)
os.umask(UMASK)

FULL = {errno.ENOSPC: "no space left on device", errno.EDQUOT: "disk quota exceeded"}
"""Errors of a disk that takes no more, in words."""


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well.

    Raises:
        InputError: no space is left, or the place cannot be written; the file that was there is untouched.
    """
    path = Path(path)
    if not path.name:
        raise InputError(f"cannot write '{path}': it names no file")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)  # safetensors writes files for the owner alone
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # there may be no such folder
            temporary.unlink()
        if reason := _storage_problem(error, {path, temporary, *path.parents}):
            intact = "; the file that was there is intact" if os.path.isfile(path) else ""
            raise InputError(f"cannot write {path}: {reason}{intact}") from error
        raise


def _storage_problem(error: BaseException, places: set[Path]) -> str:
    """Why the disk refused, or "" where the error is of another sort or about another place."""
    reasons = dict(FULL)
    reasons |= {errno.EACCES: "permission denied", errno.EROFS: "read-only file system", errno.EFBIG: "file too large"}
    reasons |= dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "a file stands where a folder is needed")
    reasons |= {errno.EISDIR: "it is a folder", errno.ENAMETOOLONG: "the name is too long"}
    if isinstance(error, InputError):  # it has been told already
        return ""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in reasons:
            about = seen.filename is None or Path(str(seen.filename)) in places
            return reasons[seen.errno] if about else ""
        seen = seen.__cause__ or seen.__context__
    text = str(error)
    if number := re.search(r"\(os error (\d+)\)", text):  # safetensors reports errors of the system as text
        return reasons.get(int(number[1]), "")
    # torch has words of its own for a full disk
    return "no space left on device" if "unexpected pos" in text or "file write failed" in text else ""
