"""``beagle serve --engine vllm``: the target and its head in vLLM's own server."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from beagle.cli import options as o
from beagle.errors import BeagleError

if TYPE_CHECKING:
    from beagle.vllm.launch import Launch


TAKEN = {
    "engine", "target", "draft", "host", "port", "api_key", "name", "live", "context", "dtype", "depth",
    "trust_remote_code",
}  # fmt: skip


def serve(context: typer.Context) -> None:
    """Replace this process by vLLM's server.

    Raises:
        BeagleError: vLLM isn't there, or an option that only our own engine has was given.
    """
    import torch

    from beagle.vllm.launch import CPU_DEPTH, require_vllm

    given: dict[str, Any] = context.params
    if given["adapter"]:
        raise BeagleError(
            f"--adapter '{given['adapter']}' is not for --engine vllm; merge it with peft (merge_and_unload, "
            "save_pretrained) and give that folder with --target"
        )
    for name in given.keys() - TAKEN:
        if _asked(context, name):
            raise BeagleError(f"--{name.replace('_', '-')} means nothing with --engine vllm; leave it out")
    require_vllm()
    if not _asked(context, "depth") and not torch.cuda.is_available():
        given = given | {"depth": CPU_DEPTH}
    launch = prepare(given)
    o.console.print(f"starting {launch.line}", highlight=False, markup=False, soft_wrap=True)
    if launch.advice:
        o.console.print(f"[yellow]{launch.advice}[/yellow]", highlight=False, soft_wrap=True)
    if not given["api_key"] and given["host"] not in ("127.0.0.1", "::1", "localhost"):
        o.console.print("[yellow]anyone who reaches this address can use it: no --api-key is set[/yellow]")
    launch.start({"VLLM_API_KEY": given["api_key"]} if given["api_key"] else {})


def _asked(context: typer.Context, name: str) -> bool:
    """Whether the user gave an option, by command line or environment."""
    source = context.get_parameter_source(name)
    return source is not None and not source.name.startswith("DEFAULT")


def prepare(given: dict[str, Any]) -> Launch:
    """The start that the options of ``beagle serve`` ask for, the head exported."""
    import torch

    from beagle.targets.loading import pick_dtype, resolve
    from beagle.vllm.launch import Launch

    target, dtype = given["target"], given["dtype"]
    name = given["name"] or (Path(target).resolve().name if Path(target).exists() else target)
    extra = ["--host", given["host"], "--port", str(given["port"]), "--served-model-name", name]
    precision = dtype if dtype == "auto" else str(pick_dtype(dtype, torch.device("cpu"))).removeprefix("torch.")
    extra += ["--max-num-seqs", str(given["live"]), "--dtype", precision]
    if given["context"]:
        extra += ["--max-model-len", str(given["context"])]
    if given["trust_remote_code"]:
        extra += ["--trust-remote-code"]
    draft = exported(target, given["draft"], dtype, given["trust_remote_code"])
    return Launch(resolve(target), draft, given["depth"], extra=tuple(extra))


def exported(target: str, draft: str, dtype: str, trust: bool) -> str | None:
    """Folder of the head that ``--draft`` names, exported once; None without drafts."""
    from beagle.drafters.checkpoint import find_head, kv_layers, load_head, shipped_head, weight_files
    from beagle.drafters.load import DraftSpec
    from beagle.targets.loading import cache_dir, resolve, sha256
    from beagle.vllm.export import export

    if draft == "auto":
        draft = "head" if shipped_head(target) else "none"
    spec = DraftSpec.parse(draft, target)
    if spec == DraftSpec():
        return None
    if spec.head is None or spec.lookup:
        raise BeagleError(f"--draft {draft} is not for --engine vllm; use head, a folder, auto or none")
    source = find_head(spec.head, target)
    weights = [sha256(path) for path in weight_files(source) if path.is_file()]
    content = f"{' '.join(weights)} {resolve(target)} {dtype}"
    folder = cache_dir() / "vllm" / hashlib.sha256(content.encode()).hexdigest()[:16]
    if not (folder / "config.json").is_file():
        layers = kv_layers(source)
        loaded = o.load_target(target, dtype=dtype, device="cpu", trust_remote_code=trust, state_layers=layers)
        export(load_head(source, loaded), loaded, folder)
    return str(folder)
