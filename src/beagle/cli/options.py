"""Options that several commands share."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console

from beagle.drafters.base import TreePlan
from beagle.errors import BeagleError
from beagle.files import writing_to
from beagle.limits import MAX_NODES

if TYPE_CHECKING:
    from beagle.model import Model
    from beagle.ranks import Ranks
    from beagle.targets.target import Target


console = Console(stderr=True)
PLAN = TreePlan()  # defaults of the tree options

TargetName = Annotated[str, typer.Option("--target", "-t", help="smollm2-135m, a hub id, a folder, or a .gguf file.")]
Adapter = Annotated[
    str | None,
    typer.Option("--adapter", help="Folder of a LoRA adapter of the target, which is merged into its weights."),
]
DraftName = Annotated[
    str,
    typer.Option(
        "--draft",
        "-d",
        help="head (the shipped one), a folder that `beagle train` wrote or ORG/NAME[@revision] of a head on the hub, "
        "lookup (what followed the same words before), head+lookup or FOLDER+lookup (both in one tree), "
        "model:NAME (a smaller model with the same tokenizer, such as model:Qwen/Qwen2.5-0.5B-Instruct), none; auto is head+lookup where a head is shipped.",
    ),
]
DType = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="int8 or int4 weights (int8: of activations too, a scale per token). Lossless relative to this target."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda.")]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="auto: layers that one GPU has no room for are kept in the CPU's memory or on disk, and brought for each pass."
    ),
]
TensorParallel = Annotated[
    bool,
    typer.Option(
        "--tensor-parallel",
        help="Divide the target's layers among the processes: torchrun --nproc-per-node N -m beagle …",
    ),
]
Exact = Annotated[
    bool, typer.Option("--exact", help="Shape-stable passes: bit-equal to plain decoding in half precision too.")
]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of sampling.")]
Tree = Annotated[str, typer.Option(help="dynamic, static or chain.")]
Depth = Annotated[int, typer.Option(min=1, max=16, help="Drafted levels.")]
TreeTopK = Annotated[
    int, typer.Option("--tree-top-k", min=1, max=MAX_NODES, help="Candidates expanded per level of a dynamic tree.")
]
Nodes = Annotated[
    int, typer.Option(min=0, max=MAX_NODES, help="Candidates verified per pass; 0 chooses by this machine's costs.")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model's repository brings.")]

Modes = Annotated[
    str,
    typer.Option(
        help="Comma-separated. Our engine: plain, beagle (what --draft names), chain (the same, a chain instead of a "
        "tree), head (its head, without lookup), eagle (--eagle), lookup (prompt lookup), small (--small-model drafts). "
        "transformers' generate: transformers, prompt-lookup, assisted (by --small-model)."
    ),
]
SmallModel = Annotated[
    str | None,
    typer.Option(help="A smaller model with the target's tokenizer, for 'small' and 'assisted'; named like --target."),
]
Eagle = Annotated[str | None, typer.Option(help="Folder of an EAGLE head that `beagle train` wrote, for 'eagle'.")]


@dataclass(frozen=True)
class Setup:
    """What most commands take alike: the target, what drafts, and how."""

    target: TargetName = "smollm2-135m"
    adapter: Adapter = None
    draft: DraftName = "auto"
    exact: Exact = False
    dtype: DType = "auto"
    quantize: Quantize = None
    device: Device = "auto"
    tree: Tree = "dynamic"
    depth: Depth = PLAN.depth
    tree_top_k: TreeTopK = PLAN.top_k
    nodes: Nodes = 0
    trust_remote_code: Trust = False
    device_map: DeviceMap = None

    def plan(self) -> TreePlan:
        return tree_plan(self.tree, self.depth, self.tree_top_k, self.nodes)

    def engine(self) -> dict[str, Any]:
        """How models are loaded, but for the quantisation, which is the target's alone."""
        return {"dtype": self.dtype, "device": self.device, "trust_remote_code": self.trust_remote_code}

    def load_model(self, **options: Any) -> Model:
        """The target and its drafter; further options as of ``beagle.load``."""
        own = {
            "plan": self.plan(), "quantize": self.quantize, "adapter": self.adapter, "device_map": self.device_map,
            **self.engine(),
        }  # fmt: skip
        return load_model(self.target, self.draft, **own, **options)

    def exact_of(self, target: Target) -> bool:
        """Whether answers are computed in exact mode: as asked for, where the target has it."""
        return exact_of(target, self.exact)

    def arguments(self) -> dict[str, Any]:
        """What a result file holds of this, without the folders of this machine."""
        from beagle.meta import redact_paths

        return {
            "exact": self.exact, "target": redact_paths(self.target), "draft": redact_paths(self.draft),
            "dtype": self.dtype, "device": self.device, "quantize": self.quantize, "tree": self.tree,
            "depth": self.depth, "top_k": self.tree_top_k, "nodes": self.nodes or "by cost",
            "device_map": self.device_map, "adapter": redact_paths(self.adapter) if self.adapter else None,  # older files lack both
        }  # fmt: skip


def exact_of(target: Target, asked: bool) -> bool:
    """Whether answers are computed in exact mode; a line says so where it was asked for and the target has none."""
    why = target.why_not_exact
    if asked and why:
        console.print(
            f"{target.name}: answers do without exact mode: {why}; with --dtype float32 near-ties hardly matter",
            style="dim", markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    return asked and why is None


def with_setup(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with the fields of ``Setup`` as options in place of its parameter ``setup``."""
    shared = inspect.signature(Setup, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True)

    @wraps(command)
    def expanded(**given: Any) -> None:
        command(setup=Setup(**{name: given.pop(name) for name in shared}), **given)

    parameters = [
        parameter.replace(kind=parameter.KEYWORD_ONLY)
        for name, whole in own.parameters.items()
        for parameter in (shared.values() if name == "setup" else [whole])
    ]
    expanded.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded


def with_ranks(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with the processes that a launcher has started it in as its parameter ``ranks``; rank 0 prints."""

    @wraps(command)
    def joined(**given: Any) -> None:
        from beagle.ranks import joined as joined_ranks

        with ExitStack() as stack:
            ranks = stack.enter_context(joined_ranks())
            if not ranks.leads:
                from beagle.targets import loading

                console.quiet = loading._console.quiet = True
                stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            command(ranks=ranks, **given)

    hints = get_type_hints(command, localns={"Ranks": Any}, include_extras=True)
    own = inspect.signature(command)
    parameters = [whole.replace(annotation=hints[name]) for name, whole in own.parameters.items() if name != "ranks"]
    joined.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    joined.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return joined


def target_ranks(ranks: Ranks, tensor_parallel: bool) -> Ranks:
    """The ranks that a target is divided among, where a command runs in more than one process for nothing else.

    Raises:
        BeagleError: there is one process, or there are several for nothing.
    """
    if tensor_parallel and ranks.count == 1:
        raise BeagleError(
            "--tensor-parallel needs several processes; start them: torchrun --nproc-per-node N -m beagle …"
        )
    if ranks.count > 1 and not tensor_parallel:
        raise BeagleError(
            f"{ranks.count} processes would do the same work; add --tensor-parallel, or start one process"
        )
    return ranks


def tree_plan(tree: str, depth: int, top_k: int, nodes: int) -> TreePlan:
    if tree not in ("dynamic", "static", "chain"):
        raise BeagleError(f"tree '{tree}' is unknown; use dynamic, static or chain")
    return TreePlan(tree, depth, top_k, nodes or None)  # type: ignore[arg-type]


def load_model(target: str, draft: str, **options: Any) -> Model:
    """A target and its drafter; options as of ``beagle.load``."""
    from beagle.model import load

    _refuse_adapter(target)
    quiet_transformers()
    with console.status(f"loading {target}"):
        model = load(target, draft=None if draft == "none" else draft, **options)
    if model.drafter is None and draft == "auto":
        console.print(f"[yellow]no head is shipped for {target}: decoding plainly (see `beagle train`)[/yellow]")
    return model


def load_target(target: str, **options: Any) -> Target:
    """A target alone; options as of ``targets.loading.load_target``."""
    from beagle.targets import loading

    _refuse_adapter(target)
    quiet_transformers()
    with console.status(f"loading {target}"):
        return loading.load_target(target, **options)


def _refuse_adapter(target: str) -> None:
    """
    Raises:
        BeagleError: the target is an adapter's folder; the option that takes it is named.
    """
    from beagle.targets.adapter import is_adapter

    if target and is_adapter(Path(target)):
        raise BeagleError(
            f"--target '{target}' is an adapter (LoRA), not a whole model; give its base model with --target and this "
            "folder with --adapter, or a folder that peft's merge_and_unload().save_pretrained made"
        )


def quiet_transformers() -> None:
    """No bar while weights are loaded; downloads keep theirs."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    logging.getLogger("transformers").setLevel(logging.ERROR)
    shown = not are_progress_bars_disabled()
    disable_progress_bar()  # of downloads, too
    if shown:
        enable_progress_bars()


def check_writable(path: Path) -> None:
    """Find out before the work, not after it, that its result can't be stored."""
    with writing_to(path, "choose another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with path.open("a"):
            pass
        if not existed:
            path.unlink()
