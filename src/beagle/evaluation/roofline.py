"""The least time that a pass can take here: its bytes and operations over this machine's measured rates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from beagle.memory import collapse, huge_pages_wanted
from beagle.targets.linears import tiled
from beagle.targets.linears.tiled import OUT
from beagle.targets.target import Target

LEAST_BYTES, MOST_BYTES = (
    2**30,
    4 * 2**30,
)  # far more than caches hold, which neighbours on a shared machine take and leave
ROUNDS = 5
LEAST_SECONDS = 20.0  # of all rounds: what slows the machine for a while is over by then
Work = Callable[[], object]


@dataclass(frozen=True)
class Machine:
    """Measured rates: ``bandwidth`` of reading memory, bytes/s; ``matrix_rate`` of large products, operations/s."""

    bandwidth: float
    matrix_rate: float

    def best(self, other: Machine) -> Machine:
        """The better one of each rate."""
        return Machine(max(self.bandwidth, other.bandwidth), max(self.matrix_rate, other.matrix_rate))


@dataclass(frozen=True)
class Roofline:
    """What a pass must at least do; ``seconds`` is the longer of the two, as they can overlap."""

    bytes: int
    operations: int
    seconds: float


def measure(target: Target, passes: Mapping[int, Work] | None = None) -> tuple[Machine, dict[int, float]]:
    """The machine's rates with the target's dtype and threads, and the seconds of some passes.

    All take turns and the best round of each counts, so that all are measured at the machine's best.
    """
    passes = passes or {}
    size, read = reading(min(max(target.pass_bytes, LEAST_BYTES), MOST_BYTES), target.device)
    operations, multiply = multiplying(target.dtype, target.device)
    times = best_times([*read, *multiply, *passes.values()], target.device)
    of_read, times = times[: len(read)], times[len(read) :]
    of_products, of_passes = times[: len(multiply)], times[len(multiply) :]
    rates = [count / seconds for count, seconds in zip(operations, of_products, strict=True)]
    return Machine(size / min(of_read), max(rates)), dict(zip(passes, of_passes, strict=True))


def reading(size: int, device: torch.device) -> tuple[int, list[Work]]:
    """Bytes, about ``size``, and several ways of reading them. The memory lies on huge pages where the weights do."""
    columns = 4096
    matrix = torch.ones(size // (4 * columns) // OUT * OUT, columns, device=device)
    if device.type == "cpu" and huge_pages_wanted():
        collapse()
    half, halves = matrix.view(torch.bfloat16), torch.ones(2 * columns, dtype=torch.bfloat16, device=device)
    vector = torch.ones(columns, device=device)
    works: list[Work] = [matrix.sum, lambda: torch.mv(matrix, vector), lambda: torch.mv(half, halves)]
    whole = matrix.view(torch.int8)
    if tiled.fits(whole):
        fours, scales = halves.repeat(1, 2), torch.ones(len(whole))
        sums = torch.zeros(len(whole), dtype=torch.int32)
        works.append(lambda: torch.ops.beagle.tiled_linear_int8(fours, whole, scales, sums, None))
    return matrix.nbytes, works


def multiplying(dtype: torch.dtype, device: torch.device) -> tuple[list[int], list[Work]]:
    """Operations of products of square matrices, and the products."""
    sizes = (4096, 8192) if device.type == "cuda" else (1024, 2048)
    matrices = [[torch.rand(n, n, device=device).to(dtype) for _ in range(2)] for n in sizes]
    return [2 * n**3 for n in sizes], [lambda a=a, b=b: torch.mm(a, b) for a, b in matrices]  # type: ignore[misc]


def best_times(works: Sequence[Work], device: torch.device) -> list[float]:
    """Seconds of each in its quickest round, in turns; launches of a GPU are paid once a round, not once a call."""
    calls = 10 if device.type == "cuda" else 1
    best = [math.inf] * len(works)
    for work in works:
        work()
    rounds, end = 0, time.perf_counter() + LEAST_SECONDS
    while rounds < ROUNDS or time.perf_counter() < end:
        rounds += 1
        for i, work in enumerate(works):
            synchronize(device)
            began = time.perf_counter()
            for _ in range(calls):
                work()
            synchronize(device)
            best[i] = min(best[i], (time.perf_counter() - began) / calls)
    return best


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
