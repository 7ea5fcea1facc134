"""The two kinds of failure a user can meet, told apart by who has to act."""

from __future__ import annotations


class BeagleError(Exception):
    """Bad input. The message is one line that names the input and the remedy (exit code 2)."""

    exit_code = 2


class BeagleInternalError(BeagleError):
    """A failure of ours, not of the user's input (exit code 1)."""

    exit_code = 1
