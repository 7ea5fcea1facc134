"""``beagle compile``: the target's pass and its draft head's level as compiled graphs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from beagle.cli import options as o
from beagle.drafters.base import TreePlan
from beagle.errors import BeagleError

if TYPE_CHECKING:
    from beagle.drafters.head_drafter import HeadDrafter
    from beagle.targets.target import Target


SIZES = (1, 8, 16)
BATCH = 8
CONTEXT = 256
REPEATS = 9


def compile(
    target: o.TargetName = "smollm2-135m",
    draft: o.DraftName = "auto",
    dtype: o.DType = "auto",
    quantize: o.Quantize = None,
    exact: Annotated[bool, typer.Option("--exact", help="The pass of exact mode, too: as much time again.")] = False,
    batch: Annotated[bool, typer.Option("--batch", help="The pass of batches, too: as much time again.")] = False,
    trust_remote_code: o.Trust = False,
) -> None:
    """Compile a target's pass and its head's levels for this machine's CPU, once; every later command uses them.

    Examples: [bold]beagle compile -t smollm2-135m --dtype bfloat16[/bold]

    [bold]beagle compile -t Qwen/Qwen2.5-0.5B-Instruct --draft runs/mine/head[/bold]

    They serve as long as the weights, the dtype, the number of threads and PyTorch stay the same;
    BEAGLE_COMPILED=0 leaves them aside. What is compiled already stays: after training another head this takes seconds.
    """
    from beagle.drafters import compiled as levels
    from beagle.drafters.checkpoint import find_head, load_head
    from beagle.drafters.head_drafter import HeadDrafter
    from beagle.drafters.load import DraftSpec, load_drafter, resolve_draft
    from beagle.targets import aot_cache, loading
    from beagle.targets import compiled as passes
    from beagle.targets.linears.quantized import check_kind

    check_kind(quantize)
    if aot_cache.compiled_disabled():
        raise BeagleError("BEAGLE_COMPILED=0 is set, so nothing that is compiled would be used; unset it")
    o.quiet_transformers()
    folder = loading.compiled_dir()
    spec = resolve_draft(draft, target)
    engine: dict[str, Any] = {"dtype": dtype, "device": "cpu", "trust_remote_code": trust_remote_code}
    model, _ = loading.load_model(target, **engine)
    known = passes.find(folder, model, quantize)
    if known is None or (exact and "exact" not in known.kinds) or (batch and "trees" not in known.kinds):
        with o.console.status(f"compiling the pass of {target} (some minutes)"):
            told(*passes.build(folder, model, target, quantize, exact, batch))
    else:
        o.console.print(f"the pass of {target} is compiled already")
    del model, known
    loaded = o.load_target(target, quantize=quantize, **engine)
    for tokens, (eager, fast) in compare_passes(loaded).items():
        show_speed_up(f"{tokens:>3} token{'s' * (tokens > 1)}", eager, fast)
    if loaded.compiled is not None and "trees" in loaded.compiled.runner.kinds:
        show_speed_up(f"a token of each of {BATCH} answers", *compare_batch(loaded))
    if spec.head is None:
        return
    place = find_head(spec.head, target)
    head = load_head(place, loaded)
    if levels.find(folder, loaded, head) is None:
        with o.console.status(f"compiling the levels of {place.name}"):
            told(*levels.build(folder, loaded, head, place.name))
    drafter = load_drafter(DraftSpec(head=spec.head), loaded)
    assert isinstance(drafter, HeadDrafter)
    show_speed_up(f"a draft of {TreePlan().depth} levels", *compare_drafts(drafter))


def told(place: Path, seconds: float) -> None:
    size = sum(file.stat().st_size for file in place.iterdir()) / 1e6
    o.console.print(f"compiled in {seconds:.0f} s: {place} ({size:.0f} MB)", highlight=False)


def show_speed_up(what: str, eager: float, fast: float) -> None:
    o.console.print(
        f"{what}: {1e3 * eager:.1f} ms before, {1e3 * fast:.1f} ms now ({eager / fast:.2f}×)", highlight=False
    )


def compare_passes(target: Target) -> dict[int, tuple[float, float]]:
    """Median seconds of an eager and a compiled pass, interleaved, by number of tokens."""
    import torch
    from torch import Tensor

    from beagle.targets.shape import TreeShape

    fast = target.compiled
    cache = target.new_cache(1, CONTEXT + SIZES[-1])
    target.prefill(torch.ones(1, CONTEXT, dtype=torch.long), cache)
    found = {}
    for size in SIZES:
        tokens, shape = torch.ones(size, dtype=torch.long), TreeShape.chain(size)

        def run(compiled: bool, tokens: Tensor = tokens, shape: TreeShape = shape) -> None:
            target.compiled = fast if compiled else None
            target.verify(cache, tokens, shape)

        found[size] = in_turn(run)
    target.compiled = fast
    return found


def compare_batch(target: Target) -> tuple[float, float]:
    """Median seconds of an eager and a compiled pass over a token of each of ``BATCH`` answers."""
    import torch

    from beagle.targets.shape import TreeShape

    fast = target.compiled
    cache = target.new_cache(BATCH, CONTEXT + 1)
    cache.lengths = [CONTEXT] * BATCH

    def run(compiled: bool) -> None:
        target.compiled = fast if compiled else None
        target.verify_trees(cache, torch.ones(BATCH, dtype=torch.long), [TreeShape([-1])] * BATCH)

    return in_turn(run)


def compare_drafts(drafter: HeadDrafter) -> tuple[float, float]:
    """Median seconds of an eager and a compiled draft of all levels."""
    import torch

    fast = drafter.compiled
    random = torch.Generator().manual_seed(0)
    states = torch.randn(CONTEXT, drafter.head.config.hidden_size, generator=random).to(drafter.lm_head.dtype)
    context = drafter.context()
    context.extend([0] * CONTEXT, states)

    def run(compiled: bool) -> None:
        drafter.compiled = fast if compiled else None
        drafter.draft([context], [1], TreePlan())

    return in_turn(run)


def in_turn(run: Callable[[bool], None]) -> tuple[float, float]:
    """Median seconds of what ``run`` does eagerly (False) and compiled (True), interleaved."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for compiled in (False, True):
        run(compiled)  # its first call allocates
    for _ in range(REPEATS):
        for compiled in (False, True):
            began = time.perf_counter()
            run(compiled)
            times[compiled].append(time.perf_counter() - began)
    return median(times[False]), median(times[True])
