"""The ``beagle`` command: nothing that takes time is imported where Ctrl-C would end in a traceback."""

from __future__ import annotations

import sys


def run() -> None:
    """Entry point, see ``beagle.cli.main.run``."""
    try:
        from beagle.cli.main import run as command
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    command()


if __name__ == "__main__":
    run()
