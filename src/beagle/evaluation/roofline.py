"""The least time that a pass can take here: its bytes and operations over this machine's measured rates."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from beagle.memory import collapse, huge_pages_wanted
from beagle.targets.linears import tiled
from beagle.targets.linears.tiled import OUT
from beagle.targets.target import Target

LEAST_BYTES, MOST_BYTES = 64 * 2**20, 4 * 2**30
ROUNDS = 5
LEAST_SECONDS = 1.0  # of the rounds of one kernel: a neighbour's burst is over by then


@dataclass(frozen=True)
class Machine:
    """Measured rates: ``bandwidth`` of reading memory, bytes/s; ``matrix_rate`` of large products, operations/s."""

    bandwidth: float
    matrix_rate: float


@dataclass(frozen=True)
class Roofline:
    """What a pass must at least do; ``seconds`` is the longer of the two, as they can overlap."""

    bytes: int
    operations: int
    seconds: float


def probe(target: Target) -> Machine:
    """Measure both rates, with the target's dtype and threads: the best of several plain kernels, some seconds."""
    size = min(max(target.pass_bytes, LEAST_BYTES), MOST_BYTES)
    return Machine(bandwidth(size, target.device), matrix_rate(target.dtype, target.device))


def bandwidth(size: int, device: torch.device) -> float:
    """Bytes/s of reading ``size`` bytes again and again: as large as the weights, so that caches help both alike.

    The memory lies on huge pages where the weights do.
    """
    columns = 4096
    matrix = torch.ones(size // (4 * columns) // OUT * OUT, columns, device=device)
    if device.type == "cpu" and huge_pages_wanted():
        collapse()
    half, halves = matrix.view(torch.bfloat16), torch.ones(2 * columns, dtype=torch.bfloat16, device=device)
    vector = torch.ones(columns, device=device)
    kernels: list[Callable[[], object]] = [matrix.sum, lambda: torch.mv(matrix, vector), lambda: torch.mv(half, halves)]
    if tiled.fits(half):
        kernels.append(lambda: torch.ops.beagle.tiled_linear(halves[None], half, None))
    return matrix.nbytes / min(best_time(kernel, device) for kernel in kernels)


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations/s of products of square matrices."""
    sizes = (4096, 8192) if device.type == "cuda" else (1024, 2048)
    rates = []
    for n in sizes:
        a, b = (torch.rand(n, n, device=device).to(dtype) for _ in range(2))
        rates.append(2 * n**3 / best_time(lambda a=a, b=b: torch.mm(a, b), device))  # type: ignore[misc]
    return max(rates)


def best_time(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest of many rounds; launches of a GPU are paid once a round, not once a call."""
    calls = 10 if device.type == "cuda" else 1
    times: list[float] = []
    work()
    end = time.perf_counter() + LEAST_SECONDS
    while len(times) < ROUNDS or time.perf_counter() < end:
        synchronize(device)
        began = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        times.append((time.perf_counter() - began) / calls)
    return min(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def roofline(target: Target, machine: Machine, tokens: int, context: int) -> Roofline:
    """The least that a verification takes, LM head included.

    Args:
        context: tokens before them, all of them seen in every layer.
    """
    keys = context + tokens
    read = target.pass_bytes + keys * target.layers.slot_bytes(target.dtype)
    operations = tokens * (2 * target.pass_weights + keys * target.layers.slot_operations())
    return Roofline(read, operations, max(read / machine.bandwidth, operations / machine.matrix_rate))
