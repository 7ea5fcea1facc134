"""``beagle export``: a draft head for another engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from beagle.cli import options as o
from beagle.errors import BeagleError


def export(
    draft: Annotated[str, typer.Argument(help="A folder that `beagle train` wrote, or head (the shipped one).")],
    folder: Annotated[Path, typer.Argument(help="Where to write.")],
    to: Annotated[
        str, typer.Option(help="vllm (a draft model), or speculators (a folder to serve as the model).")
    ] = "vllm",
    target: Annotated[
        str, typer.Option("--target", "-t", help="By default the one that the head was trained for.")
    ] = "",
    depth: o.Depth = o.PLAN.depth,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Add the target's embeddings, for pipeline parallelism.")
    ] = False,
    dtype: o.DType = "auto",
    trust_remote_code: o.Trust = False,
) -> None:
    """Write a head for vLLM and print the command that serves the target with it.

    Example: [bold]beagle export --to vllm runs/mine exported[/bold]
    """
    from beagle.drafters.checkpoint import find_head, kv_layers, load_head
    from beagle.targets.loading import resolve
    from beagle.vllm.export import export as write
    from beagle.vllm.launch import Launch

    if to not in ("vllm", "speculators"):
        raise BeagleError(f"--to '{to}' is unknown; use vllm or speculators")
    name = target or trained_for(draft)
    source = find_head(draft, name)
    layers = kv_layers(source)
    loaded = o.load_target(name, dtype=dtype, device="cpu", trust_remote_code=trust_remote_code, state_layers=layers)
    verifier = resolve(name)
    head = load_head(source, loaded)
    write(head, loaded, folder, to=to, depth=depth, verifier=verifier, embeddings=embeddings)  # type: ignore[arg-type]
    where = str(folder.resolve())
    launch = Launch(verifier if to == "vllm" else where, where, depth)
    o.console.print(f"written to {folder}; with vLLM and this package installed, start it with", highlight=False)
    print(launch.line)
    if launch.cpu:
        o.console.print(
            "[yellow]on vLLM's CPU backend only temperature 0 is right while it speculates "
            "(vllm-project/vllm#55005): this line refuses other requests[/yellow]",
            highlight=False,
        )


def trained_for(draft: str) -> str:
    """Name of the target of a draft, as its config has it."""
    from beagle.drafters.checkpoint import find_head
    from beagle.targets.loading import DEFAULT_TARGET

    if draft == "head":
        return DEFAULT_TARGET
    path = find_head(draft, "") / "config.json"
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        return str(content["target"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BeagleError(f"draft '{draft}': its config.json names no target; give it with --target") from error
