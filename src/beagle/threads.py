"""How long a thread waits for work before it sleeps."""

from __future__ import annotations

import os

SPINS = 100_000  # a tenth of a millisecond or so: the time between two products of a pass


def wait_briefly() -> None:
    """Let OpenMP's threads spin a little, then sleep; call it before PyTorch is imported, which starts them.

    To sleep at once costs more than a small layer takes, where waking a thread is slow (a virtual machine). To spin
    for long, the default, takes the cores from whoever shares them. What the user set (``OMP_WAIT_POLICY``) stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
