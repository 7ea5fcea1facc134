"""How much memory a piece of work takes, of the GPU or of this process."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch


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
