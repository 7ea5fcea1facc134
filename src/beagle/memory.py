"""Weights on huge pages: a pass reads every weight once, and looking up small pages is a part of its time on a CPU."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path
from threading import Timer

HUGE = 2 << 20  # bytes of a huge page
LEAST = 16 * HUGE  # of a region worth the while
MADV_COLLAPSE = 25  # linux/mman.h, since Linux 6.1
_ANONYMOUS = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p [0-9a-f]+ 00:00 0\s*(?:\[heap\])?\s*$")
PATIENCE = 5.0  # seconds: moving pages holds up whoever asks for memory, and a short command is over by then
_asked_for: list[Timer] = []


def huge_pages_wanted() -> bool:
    """Whether this system has them and ``BEAGLE_HUGE_PAGES=0`` doesn't refuse them."""
    return sys.platform.startswith("linux") and os.environ.get("BEAGLE_HUGE_PAGES") != "0"


def use_huge_pages() -> None:
    """Put this process's large private memory on huge pages in a while, beside whatever it does then; some seconds.

    Elsewhere than on Linux, or with ``BEAGLE_HUGE_PAGES=0``, nothing happens; an older Linux refuses and nothing
    is lost.
    """
    if not huge_pages_wanted():
        return
    timer = Timer(PATIENCE, collapse)
    timer.daemon = True
    timer.start()
    _asked_for.append(timer)


def finish_huge_pages() -> None:
    """Do at once all that was asked for, and wait until it is done: what is timed beside it is slow."""
    while _asked_for:
        timer = _asked_for.pop()
        timer.cancel()
        timer.join()
        collapse()  # what lies there already costs little


def collapse() -> int:
    """Bytes that lie on huge pages now, of regions of ``LEAST`` or more."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        advise = ctypes.CDLL(None).madvise  # lets other threads run
    except (OSError, AttributeError):
        return 0
    done = 0
    for line in lines:
        if found := _ANONYMOUS.match(line):
            start = -(-int(found[1], 16) // HUGE) * HUGE
            size = int(found[2], 16) // HUGE * HUGE - start
            if size >= LEAST:
                done += size * (advise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_COLLAPSE) == 0)
    return done
