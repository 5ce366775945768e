"""Errors that are meant for the person at the keyboard."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).parent


class Notice(UserWarning):
    """Something that a user may want to change, in one line."""


class InputError(ValueError):
    """The user's input is wrong. The message is one line: what, where, how to mend. Commands exit with code 2."""

    def __init__(self, message: str = "") -> None:
        # a worker of a DataLoader hands an error on as the text of its traceback, which ends with the message
        said = message.rpartition(f"\n{type(self).__module__}.{type(self).__qualname__}: ")[2]
        super().__init__(said.strip())
        if said != message:
            self.add_note(message)  # for --debug


@contextmanager
def refusals(where: str) -> Iterator[None]:
    """Make an InputError of what other packages raise about the arguments that a user gave them.

    An error that arises in this package stays what it is: a bug.

    Args:
        where: the place in the config, or the class.

    Raises:
        InputError: a constructor of another package does not take its arguments.
    """
    try:
        yield
    except InputError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AssertionError, RuntimeError) as error:
        if PACKAGE in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parents:
            raise
        raise InputError(f"{where}: {' '.join(str(error).split()) or type(error).__name__}") from error


def counted(count: int, noun: str) -> str:
    """A number and a noun with a regular plural: "1 band", "4 bands"."""
    return f"{count} {noun}{'s' * (count != 1)}"


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
