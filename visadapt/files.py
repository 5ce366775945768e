"""Writing files so that a crash, a kill or a full disk never harms what was there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError

UMASK = os.umask(0)
os.umask(UMASK)


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well.

    Raises:
        InputError: no space is left, or the folder cannot be written; the file that was there is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)  # safetensors writes files for the owner alone
        os.replace(temporary, path)
    except BaseException as error:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)
        if reason := _storage_problem(error):
            intact = "; the file that was there is intact" if path.exists() else ""
            raise InputError(f"cannot write {path}: {reason}{intact}") from error
        raise


def _storage_problem(error: BaseException) -> str:
    """Why the disk refused, or "" where the error is of another sort."""
    reasons = {errno.ENOSPC: "no space left on device", errno.EDQUOT: "disk quota exceeded"}
    reasons |= {errno.EACCES: "permission denied", errno.EROFS: "read-only file system", errno.EFBIG: "file too large"}
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in reasons:
            return reasons[seen.errno]
        seen = seen.__cause__ or seen.__context__
    text = str(error)
    # torch and safetensors report a full disk in words of their own
    if "No space left" in text or "unexpected pos" in text or "file write failed" in text:
        return "no space left on device"
    return ""
