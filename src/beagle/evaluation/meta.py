"""Where and how a figure was made: machine, versions, revision, date."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from beagle.drafters.base import Drafter
from beagle.drafters.small import PREFIX
from beagle.targets.target import Target


def describe(target: Target | None = None, drafters: Iterable[Drafter | None] = ()) -> dict[str, Any]:
    """Everything a reader needs to judge or repeat a measurement."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    about: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory_gib": round(memory, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "threads": torch.get_num_threads(),
            "system": platform.system(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "beagle-decoding")},
        },
        "revision": revision(),
    }
    if target is not None:
        about["target"] = {"name": target.name, "dtype": str(target.dtype).removeprefix("torch.")}
        if target.quantize:
            about["target"]["quantize"] = target.quantize
        if target.compiled is not None:
            about["target"][target.compiled.runner.name] = True
            if "trees" in target.compiled.runner.kinds:
                about["target"][f"{target.compiled.runner.name}_batches"] = True
    if names := sorted({drafter.name for drafter in drafters if drafter}):
        about["drafters"] = [portable(name) for name in names]
    return about


def command_line() -> str:
    """The command that runs, as anyone can repeat it."""
    return shlex.join(["beagle", *(portable(word) for word in sys.argv[1:])])


def portable(word: str) -> str:
    """A word of the command line without the folders of this machine."""
    if word.startswith(PREFIX):
        return PREFIX + portable(word.removeprefix(PREFIX))
    data = os.environ.get("BEAGLE_DATA")
    if data and word.startswith(data):
        return "$BEAGLE_DATA" + word.removeprefix(data.rstrip("/"))
    return Path(word).name if word.startswith("/") else word


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = dict(line.split(":", 1) for line in lines[:40] if ":" in line)
    fields = {key.strip(): value.strip() for key, value in names.items()}
    return f"{fields.get('model name', platform.machine())}, model {fields.get('model', '?')}"


def revision() -> str | None:
    """Git revision of the working tree this package runs from, ``+`` if it has changes."""
    try:
        here = Path(__file__).parent
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True)
        if head.returncode:
            return None
        status = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
        return head.stdout.strip() + ("+" if status.stdout.strip() else "")
    except OSError:
        return None


def reset_peak_memory() -> float:
    """Start a new measurement of peak memory, where the system can; the megabytes that are in use now."""
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps freed memory, and the next peak would hide in it
        ctypes.CDLL(None).malloc_trim(0)
    _restart_peak()
    return peak_memory_mb()


def _restart_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # else the peak is that of the process so far
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """Peak since ``reset_peak_memory``: of the GPU if there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if "VmHWM" in (status := _status()):
        return status["VmHWM"]
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class MemoryMeter:
    """Highest memory of pieces of work above what the process held when the meter was made, in MB.

    On a GPU what is allocated there; else resident anonymous memory, so that mapped files (stored
    states) don't count. What happens between the pieces counts only as far as it stays resident.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.peak = 0.0
        self.baseline = self._held()

    def _held(self) -> float:
        if self.cuda:
            return torch.cuda.memory_allocated() / 2**20
        status = _status()
        return status.get("RssAnon", status.get("VmRSS", peak_memory_mb()))

    @contextlib.contextmanager
    def piece(self) -> Iterator[None]:
        """Measure what runs inside."""
        _restart_peak()  # freed memory stays: handing it back at each step would slow the next, whose time counts
        held, resident = self._held(), _status().get("VmRSS", 0.0)
        yield
        grown = max(0.0, _status().get("VmHWM", resident) - resident)
        highest = peak_memory_mb() if self.cuda else held + grown
        self.peak = max(self.peak, highest - self.baseline)


def _status() -> dict[str, float]:
    """Memory figures of this process in MB, where the system tells them (Linux)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("Vm", "Rss"))}
