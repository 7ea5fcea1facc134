"""The target's passes as captured CUDA graphs: one launch for all kernels of a pass.

A graph replays the same kernels on the same memory. So tokens and keys come in fixed sizes, each with a graph of its
own, recorded when it is first needed; inputs are copied to where the graph reads them; and a cache's memory outlives the
answer, so that the next one finds its graphs. What a pass has less than its graph is padded: tokens that mean nothing
and write to a slot behind all others, and keys that no token sees.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from weakref import ref

import torch
from torch import Tensor, nn

from beagle.limits import MAX_TREE_TOKENS
from beagle.targets.cache import KVCache
from beagle.targets.layers import Layers
from beagle.targets.plan import Kind, Plan, heads_of
from beagle.targets.runner import Graph

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, MAX_TREE_TOKENS)  # tokens of a graph
LEAST_KEYS = 256
Recording = tuple[Callable[[], None], Tensor]
Recorder = Callable[[Callable[[], Tensor]], Recording]
ROOMS = 8  # caches that have graphs; more at a time take eager passes


def key_size(keys: int) -> int:
    """The least size that holds so many keys: powers of two and halfway between, so at most a third is padding."""
    size = LEAST_KEYS
    while size < keys:
        if size * 3 // 2 >= keys:
            return size * 3 // 2
        size *= 2
    return size


class GraphRecorder:
    """Captures on one stream into one pool of memory; graphs of one recorder must not replay at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Recording:
        """What replays ``run``, and the tensor that each replay writes.

        Raises:
            RuntimeError: it can't be captured, or there is no memory left.
        """
        with torch.cuda.device(self._device):
            before = torch.cuda.get_sync_debug_mode()
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            try:
                with torch.cuda.stream(self._stream):
                    run()  # what libraries allocate in a first call must not be part of the graph
                    with warnings.catch_warnings(action="ignore"):  # that the mode is a prototype
                        torch.cuda.set_sync_debug_mode("error")  # a pass that asks the GPU back can't be captured,
                    run()  # and a capture that fails harms the process: so refuse it before
                    torch.cuda.set_sync_debug_mode(before)
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(
                        graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                    ):
                        out = run()
            finally:
                torch.cuda.set_sync_debug_mode(before)
                here.wait_stream(self._stream)
        return graph.replay, out


class _Recorded:
    """A graph for so many tokens and keys of one cache, and the memory of its inputs."""

    def __init__(self, graph: Graph, cache: KVCache, tokens: int, keys: int, hidden: int, record: Recorder) -> None:
        dtype, device = cache.dtype, cache.device
        self._embeddings = torch.zeros(1, tokens, hidden, dtype=dtype, device=device)
        self._positions = torch.zeros(1, tokens, dtype=torch.long, device=device)
        self._spare = cache.capacity  # the slot that padding is written to
        self._slots = torch.full((tokens,), self._spare, device=device)
        self._masks = {
            window: torch.zeros(1, heads_of(window), tokens, keys, dtype=dtype, device=device)
            for window in graph.windows
        }
        inputs = Plan(graph.kind, self._positions, self._slots, cache.tensors, keys, self._masks).tensors()
        self._replay, self._states = record(lambda: graph(self._embeddings, inputs))

    def run(self, embeddings: Tensor, plan: Plan) -> Tensor:
        assert isinstance(plan.slots, slice)
        n = embeddings.shape[1]
        self._embeddings[:, :n] = embeddings
        self._positions.zero_()  # some kinds of RoPE look at the largest
        self._positions[:, :n] = plan.positions
        self._slots.fill_(self._spare)
        self._slots[:n] = torch.arange(plan.slots.start, plan.slots.stop, device=self._slots.device)
        for window, mask in self._masks.items():
            mask.fill_(torch.finfo(mask.dtype).min)
            mask[:, :, :n, : plan.keys] = plan.masks[window]
        self._replay()
        return self._states[:, :n].clone()  # the next replay writes over them


@dataclass(eq=False)
class _Room:
    """Memory of a cache, the cache that has it now, and the graphs that read and write it."""

    memory: KVCache
    tenant: ref[KVCache]
    graphs: dict[tuple[int, int], _Recorded | None] = field(default_factory=dict)

    def let(self) -> KVCache:
        self.memory.clear()
        lent = copy.copy(self.memory)
        lent.lengths = [0]  # a list of its own
        self.tenant = ref(lent)
        return lent


class Captured:
    """Passes over a tree of a model on a GPU; implements ``FastRunner``.

    Attributes:
        failure: what went wrong where a graph could not be recorded; passes of its size are eager from then on.
    """

    name = "captured"
    exact = False
    kinds: frozenset[Kind] = frozenset({"tree"})
    remedy = "set BEAGLE_COMPILED=0, which takes eager passes"

    def __init__(self, base: nn.Module, hidden: int, layers: Layers, record: Recorder | None = None) -> None:
        weight = next(base.parameters())
        self._embed: nn.Module = base.get_input_embeddings()  # type: ignore[operator]
        self._layers = layers.shapes
        self._graph = Graph(base, "tree", layers.distinct_windows)
        self._hidden, self._dtype, self._device = hidden, weight.dtype, weight.device
        self._record = record or GraphRecorder(weight.device)
        self._rooms: list[_Room] = []
        self._lock = Lock()
        self.failure: str | None = None

    def new_cache(self, capacity: int) -> KVCache | None:
        """A cache of one sequence that graphs can read and write; None: there are ``ROOMS`` in use."""
        with self._lock, torch.inference_mode(False):
            free = [room for room in self._rooms if room.tenant() is None]
            fitting = [room for room in free if room.memory.capacity >= capacity]
            if fitting:
                return min(fitting, key=lambda room: room.memory.capacity).let()
            self._rooms = [room for room in self._rooms if room not in free]  # larger ones serve for small ones, too
            if len(self._rooms) >= ROOMS:
                return None
            size = key_size(capacity)
            memory = KVCache(self._layers, batch=1, capacity=size + 1, dtype=self._dtype, device=self._device)
            memory.capacity = size  # what lies behind takes the padding
            room = _Room(memory, ref(memory))
            self._rooms.append(room)
            return room.let()

    def takes(self, plan: Plan) -> bool:
        return plan.kind == "tree" and plan.positions.shape[1] <= SIZES[-1] and self._recorded(plan) is not None

    def __call__(self, tokens: Tensor, plan: Plan) -> Tensor:
        recorded = self._recorded(plan)
        assert recorded is not None
        return recorded.run(self._embed(tokens), plan)

    def _recorded(self, plan: Plan) -> _Recorded | None:
        """The graph for a pass of this size; None: the cache has no room, or it could not be recorded."""
        room = next((room for room in self._rooms if room.memory.tensors is plan.layers), None)
        if room is None:
            return None
        tokens = plan.positions.shape[1]
        size = next(n for n in SIZES if n >= tokens), min(key_size(plan.keys), room.memory.capacity)
        if size not in room.graphs:
            try:
                with torch.inference_mode(False), torch.no_grad():
                    room.graphs[size] = _Recorded(self._graph, room.memory, *size, self._hidden, self._record)
            except RuntimeError as error:  # no memory left, for one
                self.failure, room.graphs[size] = str(error), None  # its traceback would hold the cache
        return room.graphs[size]
