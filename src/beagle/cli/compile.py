"""``beagle compile``: the target's pass as one compiled graph."""

from __future__ import annotations

import time
from statistics import median
from typing import Annotated

import torch
import typer

from beagle.cli import options as o
from beagle.errors import BeagleError
from beagle.targets import compiled, loading
from beagle.targets.loading import EMBEDDED
from beagle.targets.shape import TreeShape
from beagle.targets.target import Target

SIZES = (1, 8, 16)
CONTEXT = 256
REPEATS = 9


def compile(
    target: o.TargetName = EMBEDDED,
    dtype: o.DType = "auto",
    quantize: o.Quantize = None,
    exact: Annotated[bool, typer.Option("--exact", help="The pass of exact mode, too: twice the time.")] = False,
    trust_remote_code: o.Trust = False,
) -> None:
    """Compile a target's pass for this machine's CPU, once (some minutes); every later command uses it.

    Example: [bold]beagle compile -t smollm2-135m --dtype bfloat16[/bold]

    It serves as long as the weights, the dtype, the number of threads and PyTorch stay the same;
    BEAGLE_COMPILED=0 leaves it aside. Answers one at a time gain; batches run as before.
    """
    o.quiet_transformers()
    model, _ = loading.load_model(target, dtype=dtype, device="cpu", trust_remote_code=trust_remote_code)
    with o.console.status(f"compiling the pass of {target} (some minutes)"):
        place, seconds = compiled.build(loading.compiled_dir(), model, target, quantize, exact)
    del model
    size = sum(file.stat().st_size for file in place.iterdir()) / 1e6
    o.console.print(f"compiled in {seconds:.0f} s: {place} ({size:.0f} MB)", highlight=False)
    loaded = o.load_target(target, dtype=dtype, device="cpu", trust_remote_code=trust_remote_code, quantize=quantize)
    if loaded.compiled is None:
        raise BeagleError("BEAGLE_COMPILED=0 is set: the compiled pass won't be used")
    for rows, (eager, fast) in compare(loaded).items():
        o.console.print(
            f"{rows:>3} row{'s' * (rows > 1)}: {1e3 * eager:.1f} ms before, {1e3 * fast:.1f} ms now ({eager / fast:.2f}×)",
            highlight=False,
        )


def compare(target: Target) -> dict[int, tuple[float, float]]:
    """Median seconds of an eager and a compiled pass, interleaved, by number of rows."""
    fast = target.compiled
    cache = target.new_cache(1, CONTEXT + SIZES[-1])
    target.prefill(torch.ones(1, CONTEXT, dtype=torch.long), cache)
    found = {}
    for rows in SIZES:
        tokens, shape = torch.ones(rows, dtype=torch.long), TreeShape.chain(rows)
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(REPEATS):
            for compiled_now in (False, True):
                target.compiled = fast if compiled_now else None
                began = time.perf_counter()
                target.verify(cache, tokens, shape)
                times[compiled_now].append(time.perf_counter() - began)
        found[rows] = median(times[False]), median(times[True])
    target.compiled = fast
    return found
