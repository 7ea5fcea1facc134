"""``beagle compile``: the target's pass and its head's drafts as libraries for this machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from beagle.cli import options as o
from beagle.errors import BeagleError


def compile(
    target: o.TargetName = "smollm2-135m",
    adapter: o.Adapter = None,
    draft: o.DraftName = "auto",
    dtype: o.DType = "auto",
    quantize: o.Quantize = None,
    exact: Annotated[bool, typer.Option("--exact", help="The pass of exact mode, too: as much time again.")] = False,
    batch: Annotated[bool, typer.Option("--batch", help="The pass of batches, too: as much time again.")] = False,
    trust_remote_code: o.Trust = False,
) -> None:
    """Compile a target's pass and its head's drafts for this machine's CPU, once; every later command uses them.

    Examples: [bold]beagle compile -t smollm2-135m --dtype bfloat16[/bold]

    [bold]beagle compile -t Qwen/Qwen2.5-0.5B-Instruct --draft runs/mine/head[/bold]

    They serve as long as the weights, the dtype, the number of threads and PyTorch stay the same;
    BEAGLE_COMPILED=0 leaves them aside. What is compiled already stays: after training another head this takes seconds.
    """
    import torch

    from beagle.drafters import compiled as levels
    from beagle.drafters import native
    from beagle.drafters.checkpoint import find_head, load_head
    from beagle.drafters.load import resolve_draft, state_layers
    from beagle.targets import aot_cache, loading
    from beagle.targets import compiled as passes
    from beagle.targets import native as native_passes
    from beagle.targets.linears import tiled
    from beagle.targets.linears.quantized import check_kind
    from beagle.targets.plan import Kind

    check_kind(quantize)
    if aot_cache.compiled_disabled():
        raise BeagleError("BEAGLE_COMPILED=0 is set, so nothing that is compiled would be used; unset it")
    o.quiet_transformers()
    folder = loading.compiled_dir()
    products_in = loading.pick_dtype(dtype, torch.device("cpu"))
    if products_in == torch.bfloat16 and (reason := tiled.build(folder) or native_passes.build(folder)):
        o.console.print(f"products stay PyTorch's own: {reason}", markup=False, highlight=False, style="dim")
    spec = resolve_draft(draft, target)
    engine: dict[str, Any] = {
        "dtype": dtype,
        "device": "cpu",
        "trust_remote_code": trust_remote_code,
        "adapter": adapter,
    }
    layers = state_layers(spec, target)
    load = partial(o.load_target, target, quantize=quantize, state_layers=layers, **engine)
    loaded = load()
    runner = None if loaded.compiled is None else loaded.compiled.runner
    if isinstance(runner, native_passes.NativePass):
        o.console.print(f"the pass of {target} is computed by C++, which needs no compiling of its own")
    elif runner is not None:
        o.console.print(f"the pass of {target} is compiled already")
    wanted: dict[Kind, bool] = {"tree": True, "exact": exact, "trees": batch}
    missing = tuple(kind for kind, asked in wanted.items() if asked and (runner is None or kind not in runner.kinds))
    if missing:
        del loaded, runner
        model, _ = loading.load_model(target, **engine)
        with o.console.status(f"compiling the pass of {target} (some minutes)"):
            report(*passes.build(folder, model, target, quantize, missing, layers))
        del model
        loaded = load()  # compares what is compiled with the eager pass
    if spec.head is not None:
        source = find_head(spec.head, target)
        head = load_head(source, loaded)
        if native.fits(loaded, head) and native.build(folder) is None:
            o.console.print(f"drafts of {source.name} are computed by C++, which needs no compiling of its own")
        elif levels.find(folder, loaded, head) is None:
            with o.console.status(f"compiling the levels of {source.name}"):
                report(*levels.build(folder, loaded, head, source.name))
    o.console.print(
        "`beagle profile` times passes and drafts as they are now, and with BEAGLE_COMPILED=0 as they were before",
        highlight=False,
    )


def report(package: Path, seconds: float) -> None:
    size = sum(file.stat().st_size for file in package.iterdir()) / 1e6
    o.console.print(f"compiled in {seconds:.0f} s: {package} ({size:.0f} MB)", highlight=False)
