"""The target's pass as one compiled graph, made once by ``beagle compile`` and kept in the user's cache.

Eager layers spend much of a small pass between their products: norms, RoPE, masks and the interpreter that
calls them. AOTInductor turns the whole pass, for any number of keys and of rows (a tree has at most ``MOST_ROWS``), into one
library without Python, guards or tracing at load. The cache's tensors are inputs that it writes in place.

Weights are part of each graph, in the order that its products read them, so they lie in memory once more for each that
is in use: the eager pass, which all but the shortest prompts take, has its own.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn

from beagle.targets import packages, probe
from beagle.targets.attention import FOLDED, ExactPass, Pass
from beagle.targets.cache import KVCache, LayerShape
from beagle.targets.family import base_of
from beagle.targets.joining import join_linears
from beagle.targets.quantize import quantize_linears
from beagle.targets.ragged import RaggedPass
from beagle.targets.traced import ExactGraph, PassGraph, RowsGraph

MOST_ROWS = FOLDED  # of a compiled pass: a tree with its root
PASS, EXACT, ROWS = "pass.so", "exact.so", "rows.so"
TAIL = 64  # keys that each row of an exact pass gathers for itself
Run = Callable[[list[Tensor]], list[Tensor]]


class FastPass(Protocol):
    """A pass over trees that does what the eager one does, faster.

    Attributes:
        kind: for records of what was run. remedy: what to do where it goes wrong. has_exact: whether it runs the
            passes of exact mode, too; has_rows: those over several rows (``RaggedPass``, from a cache's first row on
            and with trees of at most ``MOST_ROWS`` nodes).
    """

    kind: str
    remedy: str
    has_exact: bool
    has_rows: bool

    def new_cache(self, capacity: int) -> KVCache | None:
        """A cache of one row for it; None: any will do, or there is none left."""

    def takes(self, cache: KVCache, rows: int, keys: int) -> bool:
        """Whether it can run so many rows on this cache, over so many keys."""

    def __call__(self, embeddings: Tensor, plan: Pass) -> Tensor:
        """``[1, rows, hidden]``, embeddings to states; fresh keys and values are written where ``plan`` says."""


class CompiledPass:
    """A package of one model; implements ``FastPass``."""

    kind = "compiled"

    def __init__(self, place: Path) -> None:
        """
        Raises:
            BeagleError: the package can't be read.
        """
        self._place = place
        self.remedy = f"delete {place} and run `beagle compile` again"
        # of sliding layers (None: the whole context)
        self._windows: list[int | None] = packages.about(place, "windows")
        self.has_exact = (place / EXACT).is_file()
        self.has_rows = (place / ROWS).is_file()
        self._run = packages.load(place / PASS)

    # with weights of their own, so not before they are asked for

    @cached_property
    def _run_exact(self) -> Run:
        return packages.load(self._place / EXACT)

    @cached_property
    def _run_rows(self) -> Run:
        return packages.load(self._place / ROWS)

    def new_cache(self, capacity: int) -> None:
        """Any cache will do."""

    def takes(self, cache: KVCache, rows: int, keys: int) -> bool:
        return rows <= MOST_ROWS and cache.batch == 1

    def __call__(self, embeddings: Tensor, plan: Pass) -> Tensor:
        run, positions, own = self._run, plan.query_positions, []
        if isinstance(plan, RaggedPass):
            run, positions, own = self._run_rows, plan.positions, plan.places
        elif isinstance(plan, ExactPass):
            run, own = self._run_exact, [plan.tail_slots]
        slots = plan.slots
        if isinstance(slots, slice):
            slots = torch.arange(slots.start, slots.stop)
        masks = [plan.mask(window, embeddings.dtype) for window in self._windows]
        (states,) = run([embeddings, positions, slots, *masks, *plan.cache.tensors, *own])
        return states


def find(folder: Path, model: nn.Module, quantize: str | None) -> CompiledPass | None:
    """The pass that ``build`` made of this very model, before its weights are packed; None if there is none."""
    if model.device.type != "cpu":
        return None
    place = packages.find(folder, _kind(model, quantize), model.state_dict)
    return CompiledPass(place) if place is not None else None


@torch.no_grad()
def build(
    folder: Path, model: nn.Module, name: str, quantize: str | None = None, exact: bool = False, rows: bool = False
) -> tuple[Path, float]:
    """Compile a freshly loaded model's pass; the model is of no use afterwards.

    Args:
        folder: of all packages. name: of the target, for errors. exact, rows: the passes of exact mode and over
            several rows, too. What there is of them already stays.
    Returns:
        The package's folder and the seconds it took.
    Raises:
        BeagleError: the model can't be traced, or there is no compiler, or no room.
    """
    began = time.perf_counter()
    place = packages.place(folder, _kind(model, quantize), model.state_dict())
    model.eval().requires_grad_(False)
    base = base_of(model)
    embed: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    layers = probe.learn(model, name)
    windows = layers.distinct_windows
    join_linears(base, lambda: probe.learn(model, name))
    if quantize:
        quantize_linears(base, quantize)
    kinds: dict[str, type[PassGraph]] = {PASS: PassGraph, EXACT: ExactGraph, ROWS: RowsGraph}
    for file, wanted in ((EXACT, exact), (ROWS, rows)):
        if not wanted and not (place / file).is_file():
            del kinds[file]
    with packages.fresh(place, {"target": name, "windows": windows}) as partial:
        for file, kind in kinds.items():
            if (place / file).is_file():  # made before, of the very same
                shutil.copy2(place / file, partial / file)
            else:
                _export(kind(base, windows), embed, layers.shapes, partial / file, name)
    return place, time.perf_counter() - began


def _export(graph: PassGraph, embed: nn.Module, layers: list[LayerShape], library: Path, name: str) -> None:
    weight: Tensor = embed.weight  # type: ignore[assignment]
    rows, nodes, context = (3, 2, 10) if isinstance(graph, RowsGraph) else (1, 6, 10)
    tokens, auto = rows * nodes, torch.export.Dim.AUTO
    whole = KVCache(layers, batch=rows + 1 if rows > 1 else 1, capacity=96, dtype=weight.dtype, device=weight.device)
    caches = [tensor.clone() for tensor in whole.tensors]  # parts of one tensor take minutes to be proven apart
    cache_shape, mask_shape = {2: auto}, {2: auto, 3: auto}
    own: list[Tensor] = []
    own_shapes: list[dict[int, Any]] = []
    masks = [torch.zeros(rows, 1, nodes, context + nodes, dtype=weight.dtype) for _ in graph.windows]
    if isinstance(graph, ExactGraph):
        masks = [torch.zeros(tokens, 1, 32 + TAIL) for _ in graph.windows]
        own, own_shapes = [torch.arange(tokens * TAIL).view(tokens, TAIL) % 32], [{0: auto}]
        mask_shape = {0: auto, 2: auto}
    if isinstance(graph, RowsGraph):
        places = torch.arange(tokens)
        own, own_shapes = (
            [places // nodes, places.view(rows, nodes), places],
            [{0: auto}, {0: auto, 1: auto}, {0: auto}],
        )
        cache_shape, mask_shape = {0: auto, 2: auto}, {0: auto, 2: auto, 3: auto}
    example = embed(torch.ones(1, tokens, dtype=torch.long))
    positions = (context + torch.arange(tokens) % nodes)[None]
    slots = positions[0]
    shapes = ({1: auto}, {1: auto}, {0: auto}, [mask_shape] * len(masks), [cache_shape] * len(caches), own_shapes)
    packages.export(graph, (example, positions, slots, masks, caches, own), shapes, library, name)


def _kind(model: nn.Module, quantize: str | None) -> str:
    config: Any = model.config
    settings = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    return packages.kind(
        "pass", transformers.__version__, type(model).__name__, settings, str(next(model.parameters()).dtype), quantize
    )
