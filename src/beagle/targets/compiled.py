"""The target's pass as one compiled graph, made once by ``beagle compile`` and kept in the user's cache.

Eager layers spend much of a small pass between their products: norms, RoPE, masks and the interpreter that
calls them. AOTInductor turns the whole pass, for any number of rows up to ``MOST_ROWS`` and of keys, into one
library without Python, guards or tracing at load. The cache's tensors are inputs that it writes in place.

Weights are part of the package, in the order that its products read them, so they lie in memory twice: the eager
pass, which prompts and batches take, has its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn

from beagle.targets import packages
from beagle.targets.attention import FOLDED, NAME, ExactPass, Pass, ShapeProbe, current_pass
from beagle.targets.cache import KVCache, LayerShape
from beagle.targets.joining import join_linears
from beagle.targets.quantize import quantize_linears

MOST_ROWS = FOLDED  # of a compiled pass: a tree with its root
PASS, EXACT = "pass.so", "exact.so"
TAIL = 64  # keys that each row of an exact pass gathers for itself


class _Places:
    """Where a traced pass writes: tensors and slots that are inputs of a graph."""

    def __init__(self, caches: list[Tensor], slots: Tensor) -> None:
        self._caches = caches
        self._slots = slots

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``[1, kv_heads, rows, head_dim]``; all keys and values that there are."""
        keys, values = self._caches[2 * layer : 2 * layer + 2]
        keys[:, :, self._slots] = key
        values[:, :, self._slots] = value
        return keys, values


class _TracedPass(Pass):
    def __init__(self, places: _Places, masks: dict[int | None, Tensor]) -> None:
        self._places = places
        self._masks = masks
        self._folded_masks = {}

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._places.write(layer, key, value)
        end = next(iter(self._masks.values())).shape[-1]
        return keys[:, :, :end], values[:, :, :end]


class _TracedExactPass(ExactPass):
    def __init__(self, places: _Places, masks: dict[int | None, Tensor], tail_slots: Tensor) -> None:
        self._places = places
        self._masks = masks
        self.tail_slots = tail_slots
        self._keys = next(iter(masks.values())).shape[-1] - tail_slots.shape[1]

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._places.write(layer, key, value)


class PassGraph(nn.Module):
    """What is compiled: ``(embeddings, positions, slots, masks, caches) -> states``, in exact mode with tail slots too."""

    def __init__(self, base: nn.Module, windows: list[int | None]) -> None:
        super().__init__()
        self.base = base
        self.windows = windows

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        slots: Tensor,
        masks: list[Tensor],
        caches: list[Tensor],
        tail_slots: Tensor | None = None,
    ) -> Tensor:
        by_window = dict(zip(self.windows, masks, strict=True))
        places = _Places(caches, slots)
        plan = _TracedPass(places, by_window) if tail_slots is None else _TracedExactPass(places, by_window, tail_slots)
        token = current_pass.set(plan)
        try:
            states: Tensor = self.base(inputs_embeds=embeddings, position_ids=positions, use_cache=False)[0]
            return states
        finally:
            current_pass.reset(token)


class FastPass(Protocol):
    """A pass over trees that does what the eager one does, faster.

    Attributes:
        kind: for records of what was run. remedy: what to do where it goes wrong. has_exact: whether it runs the
            passes of exact mode, too.
    """

    kind: str
    remedy: str
    has_exact: bool

    def new_cache(self, capacity: int) -> KVCache | None:
        """A cache of one row for it; None: any will do, or there is none left."""

    def takes(self, cache: KVCache, rows: int, keys: int) -> bool:
        """Whether it can run so many rows on this cache, over so many keys."""

    def __call__(self, embeddings: Tensor, plan: Pass) -> Tensor:
        """``[1, rows, hidden]``, embeddings to states; fresh keys and values are written where ``plan`` says."""


class CompiledPass:
    """A package of one model; implements ``FastPass``.

    Attributes:
        has_exact: whether it holds the pass of exact mode, too.
    """

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
        self._run = packages.load(place / PASS)

    @cached_property
    def _run_exact(self) -> Callable[[list[Tensor]], list[Tensor]]:
        return packages.load(self._place / EXACT)  # with weights of its own, so not before it is asked for

    def new_cache(self, capacity: int) -> None:
        """Any cache will do."""

    def takes(self, cache: KVCache, rows: int, keys: int) -> bool:
        return rows <= MOST_ROWS and cache.batch == 1

    def __call__(self, embeddings: Tensor, plan: Pass) -> Tensor:
        assert isinstance(plan.slots, slice)
        slots = torch.arange(plan.slots.start, plan.slots.stop)
        masks = [plan.mask(window, embeddings.dtype) for window in self._windows]
        inputs = [embeddings, plan.query_positions, slots, *masks, *plan.cache.tensors]
        (states,) = self._run_exact([*inputs, plan.tail_slots]) if isinstance(plan, ExactPass) else self._run(inputs)
        return states


def find(folder: Path, model: nn.Module, quantize: str | None) -> CompiledPass | None:
    """The pass that ``build`` made of this very model, before its weights are packed; None if there is none."""
    if model.device.type != "cpu":
        return None
    place = packages.find(folder, _kind(model, quantize), model.state_dict)
    return CompiledPass(place) if place is not None else None


@torch.no_grad()
def build(
    folder: Path, model: nn.Module, name: str, quantize: str | None = None, exact: bool = False
) -> tuple[Path, float]:
    """Compile a freshly loaded model's pass; the model is of no use afterwards.

    Args:
        folder: of all packages. name: of the target, for errors. exact: the pass of exact mode, too.
    Returns:
        The package's folder and the seconds it took.
    Raises:
        BeagleError: the model can't be traced, or there is no compiler, or no room.
    """
    began = time.perf_counter()
    place = packages.place(folder, _kind(model, quantize), model.state_dict())
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    model.eval().requires_grad_(False)
    base: nn.Module = model.base_model  # type: ignore[assignment]
    embed: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    layers, windows = probe(base)
    join_linears(base, lambda: probe(base))
    if quantize:
        quantize_linears(base, quantize)
    graph = PassGraph(base, windows)
    with packages.fresh(place, {"target": name, "windows": windows}) as partial:
        _export(graph, embed, layers, partial / PASS, name)
        if exact:
            _export(graph, embed, layers, partial / EXACT, name, exact=True)
    return place, time.perf_counter() - began


def _export(
    graph: PassGraph, embed: nn.Module, layers: list[LayerShape], library: Path, name: str, exact: bool = False
) -> None:
    weight: Tensor = embed.weight  # type: ignore[assignment]
    rows, context = 6, 10
    whole = KVCache(layers, batch=1, capacity=96, dtype=weight.dtype, device=weight.device)
    caches = [tensor.clone() for tensor in whole.tensors]  # parts of one tensor take minutes to be proven apart
    positions = torch.arange(context, context + rows)[None]
    auto = torch.export.Dim.AUTO
    tail: list[Tensor] = []
    if exact:
        masks = [torch.zeros(rows, 1, 32 + TAIL) for _ in graph.windows]
        tail = [torch.arange(rows * TAIL).view(rows, TAIL) % 32]
        mask_shape = {0: auto, 2: auto}
    else:
        masks = [torch.zeros(1, 1, rows, context + rows, dtype=weight.dtype) for _ in graph.windows]
        mask_shape = {2: auto, 3: auto}
    example = embed(torch.ones(1, rows, dtype=torch.long))
    shapes = (
        {1: auto},
        {1: auto},
        {0: auto},
        [mask_shape for _ in masks],
        [{2: auto} for _ in caches],
        *({0: auto} for _ in tail),
    )
    packages.export(graph, (example, positions, positions[0], masks, caches, *tail), shapes, library, name)


def probe(base: nn.Module) -> tuple[list[LayerShape], list[int | None]]:
    """What each layer caches, and the sliding windows there are."""
    probe = ShapeProbe()
    token = current_pass.set(probe)
    try:
        device = next(base.parameters()).device
        base(input_ids=torch.ones(1, 2, dtype=torch.long, device=device), use_cache=False)
    finally:
        current_pass.reset(token)
    return [probe.layers[i] for i in sorted(probe.layers)], list(probe.windows)


def _kind(model: nn.Module, quantize: str | None) -> str:
    config: Any = model.config
    settings = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    return packages.kind(
        "pass", transformers.__version__, type(model).__name__, settings, str(next(model.parameters()).dtype), quantize
    )
