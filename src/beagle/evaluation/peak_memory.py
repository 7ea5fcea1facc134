"""How much memory a piece of work takes, of the GPU or of this process."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import torch


def reset_peak_memory() -> float:
    """Start a new measurement of peak memory, where the system can; the megabytes that are in use now."""
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps freed memory, and the next peak would hide in it
        ctypes.CDLL(None).malloc_trim(0)
    restart_peak()
    return peak_memory_mb()


def restart_peak() -> None:
    """Let the peak be that of what is in use now, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # else the peak is that of the process so far
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """Peak since ``reset_peak_memory``: of the GPU if there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if "VmHWM" in (status := memory_status()):
        return status["VmHWM"]
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory_status() -> dict[str, float]:
    """Memory figures of this process in MB, where the system tells them (Linux)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("Vm", "Rss"))}
