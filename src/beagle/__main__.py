"""The ``beagle`` command: nothing that takes time is imported where Ctrl-C would end in a traceback."""

from __future__ import annotations

import gc
import sys

from beagle.threads import wait_briefly


def run() -> None:
    """Entry point, see ``beagle.cli.main.run``."""
    wait_briefly()
    gc.disable()  # what is imported stays: to search it for garbage, again and again, takes long
    try:
        from beagle.cli.main import run as command
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    gc.freeze()
    gc.enable()
    command()


if __name__ == "__main__":
    run()
