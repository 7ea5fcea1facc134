"""The target's passes as compiled graphs, made once by ``beagle compile`` and kept in the user's cache.

Eager layers spend much of a small pass between their products: norms, RoPE, masks and the interpreter that
calls them. AOTInductor turns the whole pass, for any number of keys and of tokens (a tree has at most
``MAX_TREE_TOKENS``), into one library without Python, guards or tracing at load. The cache's tensors are inputs that it
writes in place.

Weights are part of each graph, in the order that its products read them, so they lie in memory once more for each that
is in use: the eager pass, which all but the shortest prompts take, has its own.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from beagle.errors import BeagleError
from beagle.limits import MAX_TREE_TOKENS
from beagle.targets import aot_cache, probe
from beagle.targets.cache import KVCache, LayerShape
from beagle.targets.family import base_of
from beagle.targets.head_transform import move_transform
from beagle.targets.layers import Layers
from beagle.targets.linears import tiled
from beagle.targets.linears.joined import join_linears
from beagle.targets.linears.packed import tile_linears
from beagle.targets.linears.quantized import quantize_linears
from beagle.targets.plan import Kind, Plan, Windows
from beagle.targets.runner import Graph, example, run_layers, tap

FILES: dict[Kind, str] = {"tree": "pass.so", "exact": "exact.so", "trees": "rows.so"}
Varying = tuple[int, ...]  # dimensions
VARYING: dict[
    Kind, tuple[Varying, Varying, list[Varying]]
] = {  # of masks, keys and values, and what a kind has besides
    "tree": ((2, 3), (2,), []),
    "exact": ((0, 2), (2,), [(0,)]),
    "trees": ((0, 2, 3), (0, 2), [(0,), (0, 1), (0,)]),
}


class Compiled:
    """A package of one model; implements ``FastRunner``."""

    name = "compiled"
    exact = False

    def __init__(self, package: Path, embed: nn.Module) -> None:
        """
        Args:
            embed: the model's embedding, which is no part of the graphs.
        """
        self._package, self._embed = package, embed
        self.remedy = f"delete {package} and run `beagle compile` again"
        self.kinds = frozenset(kind for kind, file in FILES.items() if (package / file).is_file())
        self._graphs: dict[Kind, Callable[[list[Tensor]], list[Tensor]]] = {}

    def new_cache(self, capacity: int) -> None:
        """Any cache will do."""

    def takes(self, plan: Plan) -> bool:
        if plan.kind not in self.kinds:
            return False
        if plan.sequences is not None:
            return plan.sequences.padding.shape[1] <= MAX_TREE_TOKENS
        return plan.positions.shape[1] <= MAX_TREE_TOKENS and len(plan.layers[0]) == 1

    def __call__(self, tokens: Tensor, plan: Plan) -> Tensor:
        if plan.kind not in self._graphs:  # each brings weights of its own, so not before it is asked for
            self._graphs[plan.kind] = aot_cache.load(self._package / FILES[plan.kind])
        (states,) = self._graphs[plan.kind]([self._embed(tokens), *plan.tensors()])
        return states


def find(folder: Path, model: nn.Module, quantize: str | None, state_layers: Sequence[int] = ()) -> Compiled | None:
    """What ``build`` made of this very model, before its weights are packed; None if there is nothing."""
    if model.device.type != "cpu":
        return None
    if not aot_cache.compiled_disabled():
        tiled.load(folder)
    package = aot_cache.find(folder, _key(model, quantize, state_layers), model.state_dict)
    return Compiled(package, model.get_input_embeddings()) if package is not None else None  # type: ignore[operator]


@torch.no_grad()
def build(
    folder: Path,
    model: nn.Module,
    name: str,
    quantize: str | None = None,
    kinds: tuple[Kind, ...] = ("tree",),
    state_layers: Sequence[int] = (),
) -> tuple[Path, float]:
    """Compile a freshly loaded model's passes; the model is of no use afterwards.

    Args:
        kinds: of passes: trees, exact mode's, those of several sequences; what there is already stays.
    Returns:
        The package's folder and the seconds it took.
    Raises:
        BeagleError: the model can't be traced, or there is no compiler, or no room.
    """
    began = time.perf_counter()
    package = aot_cache.path(folder, _key(model, quantize, state_layers), model.state_dict())
    model.eval().requires_grad_(False)
    move_transform(model)
    base = base_of(model)
    embed: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    layers = probe.learn(model, name)
    if layers.recurrent:
        raise BeagleError(f"{name} keeps a recurrent state, so its passes can't be compiled; use it without")
    if layers.indices:
        raise BeagleError(
            f"{name} chooses the keys of each token by an index, so its passes can't be compiled; use it without"
        )
    if layers.own:
        raise BeagleError(
            f"{name}: its layers compute their attention themselves, and such passes can't be compiled; run it as it is"
        )
    join(base, layers, embed.weight)  # type: ignore[arg-type]
    if quantize:
        quantize_linears(base, quantize)
    else:
        tile_linears(base)
    tap(base, state_layers, len(layers.shapes), name)
    with aot_cache.writing(package, {"target": name}) as partial:
        for kind, file in FILES.items():
            if (package / file).is_file():  # made before, of the very same
                shutil.copy2(package / file, partial / file)
            elif kind in kinds:
                _export(Graph(base, kind, layers.distinct_windows), embed, layers.shapes, partial / file, name)
    return package, time.perf_counter() - began


def join(base: nn.Module, layers: Layers, embedding: Tensor) -> None:
    """Join the linear layers that read the same tensor, in place.

    Args:
        base: the model without its LM head, with our attention.
    """
    ids, plan = _example("tree", layers.shapes, layers.distinct_windows, embedding)
    join_linears(base, lambda: run_layers(base, plan, input_ids=ids))


def _example(kind: Kind, layers: list[LayerShape], windows: Windows, embedding: Tensor) -> tuple[Tensor, Plan]:
    def new_cache(sequences: int, capacity: int) -> KVCache:
        return KVCache(layers, batch=sequences, capacity=capacity, dtype=embedding.dtype, device=embedding.device)

    return example(kind, new_cache, windows, len(embedding), None)


def _export(graph: Graph, embed: nn.Module, layers: list[LayerShape], library: Path, name: str) -> None:
    ids, plan = _example(graph.kind, layers, graph.windows, embed.weight)  # type: ignore[arg-type]
    # parts of one tensor take minutes to be proven apart
    plan = replace(plan, layers=[tensor.clone() for tensor in plan.layers])
    tensors = plan.tensors()
    aot_cache.export(graph, (embed(ids), tensors), ({1: torch.export.Dim.AUTO}, _dims(plan)), library, name)


def _dims(plan: Plan) -> list[dict[int, Any]]:
    """Which dimensions of ``plan.tensors()`` vary from pass to pass."""
    mask, layer, extra = VARYING[plan.kind]
    dims = [(1,), (0,), *[mask] * len(plan.masks), *[layer] * len(plan.layers), *extra]
    return [dict.fromkeys(varying, torch.export.Dim.AUTO) for varying in dims]


def _key(model: nn.Module, quantize: str | None, state_layers: Sequence[int]) -> str:
    config: Any = model.config
    settings = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    return aot_cache.key(
        "pass",
        transformers.__version__,
        type(model).__name__,
        settings,
        str(dtype := next(model.parameters()).dtype),
        tiled.used(dtype),
        quantize,
        *map(int, state_layers),
    )
