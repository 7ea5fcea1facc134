"""The two kinds of failure a user can meet, told apart by who has to act."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


class BeagleError(Exception):
    """Bad input. The message is one line that names the input and the remedy (exit code 2)."""

    exit_code = 2


class BeagleInternalError(BeagleError):
    """A failure of ours, not of the user's input (exit code 1)."""

    exit_code = 1


def first_line(error: object) -> str:
    """What an error says, in one line; the name of its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def required(package: str, extra: str, what: str) -> Any:
    """A package that one of our extras installs; refuses what needs it where it isn't there."""
    try:
        return import_module(package)
    except ImportError as error:
        raise BeagleError(f"{what} needs the library `{package}`: pip install 'beagle-decoding[{extra}]'") from error


def run_script(main: Callable[[], None]) -> None:
    """Run a script of ``tools/`` or ``benchmarks/``: a ``BeagleError`` ends it with one line, not with a traceback."""
    try:
        main()
    except BeagleError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
