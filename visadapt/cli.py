"""The `visadapt` command: finds the module of a subcommand and turns errors into exit codes."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from . import __version__
from .errors import InputError, Notice, hint
from .files import FULL

COMMANDS = {
    "train": "train an adapter and a head from a config",
    "test": "evaluate an adapter file on the test or validation set of a config",
    "predict": "label images or clips; write JSON lines and pictures",
    "merge": "fold an adapter into its backbone and write the weights",
    "convert": "convert checkpoints of other projects",
    "bench": "compare methods; measure speed and memory",
    "list": "show adapters, backbones, heads, tasks and datasets",
    "sites": "show where a backbone can be adapted",
    "info": "show what an adapter file holds",
    "check": "check a config: arguments, model, metrics, some samples",
    "data": "check the data of a config: labels, bands, sizes, damaged and equal files",
    "doctor": "check the installation",
}
DONE, BUG, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"visadapt: error: {message}; see '{self.prog} --help'\n")


def _front() -> _Parser:
    """The parser of the first word; each command has one of its own for the rest."""
    parser = _Parser(
        "visadapt",
        description="Adapt vision foundation models with small adapters.",
        epilog="'visadapt COMMAND --help' shows the arguments of a command.",
    )
    parser.add_argument("--version", action="version", version=f"visadapt {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, line in COMMANDS.items():
        commands.add_parser(name, help=line, add_help=False)
    return parser


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Options may stand between overrides; argparse refuses that form only to parsers with subcommands."""
    nested = any(action.nargs == argparse.PARSER for action in parser._actions)
    return parser.parse_args(argv) if nested else parser.parse_intermixed_args(argv)


def _system_problem(error: OSError, argv: Sequence[str]) -> str | None:
    """One line for a system error that the user can mend, None for one that is a bug."""
    if error.errno in FORBIDDEN and error.filename is not None:
        return f"{error.filename}: {os.strerror(error.errno).lower()}"
    if error.errno in FULL:
        place = f" while writing {error.filename}" if error.filename else ""
        return f"{FULL[error.errno]}{place}; free some space and run the command again"
    given = {part for word in argv for part in (word, word.partition("=")[2]) if part}
    if error.filename is not None and str(error.filename) in given:
        return f"{error.filename}: {(error.strerror or str(error)).lower()}"
    return None


def _machine_problem(error: Exception) -> str | None:
    """One line where the machine is too small for the task, None for a bug."""
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "out of memory; lower the batch size or the image size, or train fewer layers"
    if text.startswith("DataLoader worker") and ("killed" in text or "exited unexpectedly" in text):
        return f"{text.split('.')[0]}; mostly for lack of memory: lower num_workers or the batch size"
    return None


def _fail(message: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"visadapt: error: {' '.join(message.split())}", file=sys.stderr)
    return WRONG_INPUT


def _guarded(command, args: argparse.Namespace, argv: Sequence[str]) -> int:
    try:
        code = command.run(args)
        if sys.stdout is not None:  # None where the caller closed it
            sys.stdout.flush()
        return code
    except InputError as error:
        return _fail(str(error), args.debug)
    except KeyboardInterrupt:
        print("visadapt: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough, as in `visadapt list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        if (message := _system_problem(error, argv)) is not None:
            return _fail(message, args.debug)
        traceback.print_exc()
        return BUG
    except Exception as error:
        if (message := _machine_problem(error)) is not None:
            return _fail(message, args.debug)
        traceback.print_exc()
        return BUG


_format = warnings.formatwarning


def _told(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
    """A warning as the screen shows it; where it came from is of no use to a user of commands."""
    if issubclass(category, Notice):
        return f"visadapt: warning: {message}\n"
    return _format(message, category, *place, **more)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done; 1 a bug, with its traceback; 2 wrong input, told in one line; 130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    warnings.formatwarning = _told
    front = _front()
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        front.error(f"unknown command '{argv[0]}'{hint(argv[0], COMMANDS)}")
    name = front.parse_args(argv[:1]).command
    command = importlib.import_module(f".commands.{name}", __package__)
    parser = _Parser(f"visadapt {name}", description=command.__doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.add_arguments(parser)
    return _guarded(command, _parse(parser, argv[1:]), argv)
