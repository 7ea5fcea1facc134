"""The peak memory of many pieces of work, such as the steps of a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from beagle.evaluation.peak_memory import memory_status, peak_memory_mb, restart_peak


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
        status = memory_status()
        return status.get("RssAnon", status.get("VmRSS", peak_memory_mb()))

    @contextmanager
    def piece(self) -> Iterator[None]:
        """Measure what runs inside."""
        restart_peak()  # freed memory stays: handing it back at each step would slow the next, whose time counts
        held, resident = self._held(), memory_status().get("VmRSS", 0.0)
        yield
        grown = max(0.0, memory_status().get("VmHWM", resident) - resident)
        highest = peak_memory_mb() if self.cuda else held + grown
        self.peak = max(self.peak, highest - self.baseline)
