"""Errors that are meant for the person at the keyboard."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The user's input is wrong. The message is one line: what, where, how to mend. Commands exit with code 2."""


def hint(bad: str, good: Iterable[str], limit: int = 12) -> str:
    """Near misses of `bad` among `good`, or the whole list where nothing is near.

    Returns:
        " (did you mean 'x'?)" or "; it is one of: a, b, c" or "" where `good` is empty.
    """
    names = sorted({str(g) for g in good})
    if not names:
        return ""
    lowered = {n.lower(): n for n in names}
    near = difflib.get_close_matches(str(bad).lower(), lowered, n=3, cutoff=0.6)
    if near:
        return " (did you mean " + " or ".join(repr(lowered[n]) for n in near) + "?)"
    more = f", … ({len(names)} in all)" if len(names) > limit else ""
    return "; it is one of: " + ", ".join(names[:limit]) + more
