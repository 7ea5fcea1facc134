"""The target's pass as captured CUDA graphs: one launch for all kernels of a pass.

A graph replays the same kernels on the same memory. So rows and keys come in fixed sizes, each with a graph of its own,
recorded when it is first needed; inputs are copied to where the graph reads them; and a cache's memory outlives the
answer, so that the next one finds its graphs. What a pass has less than its graph is padded: rows that mean nothing and
write to a slot behind all others, and keys that no row sees.
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

from beagle.targets.attention import FOLDED, Pass
from beagle.targets.cache import KVCache
from beagle.targets.probe import Layers
from beagle.targets.traced import PassGraph

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, FOLDED)
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
    """A graph for so many rows and keys of one cache, and the memory of its inputs."""

    def __init__(self, graph: PassGraph, cache: KVCache, rows: int, keys: int, hidden: int, record: Recorder) -> None:
        dtype, device = cache.tensors[0].dtype, cache.tensors[0].device
        self._windows = graph.windows
        self._embeddings = torch.zeros(1, rows, hidden, dtype=dtype, device=device)
        self._positions = torch.zeros(1, rows, dtype=torch.long, device=device)
        self._spare = cache.capacity  # the slot that padding is written to
        self._slots = torch.full((rows,), self._spare, device=device)
        self._masks = [torch.zeros(1, 1, rows, keys, dtype=dtype, device=device) for _ in graph.windows]
        inputs = self._embeddings, self._positions, self._slots, self._masks, cache.tensors
        self._replay, self._states = record(lambda: graph(*inputs, []))

    def run(self, embeddings: Tensor, plan: Pass) -> Tensor:
        assert isinstance(plan.slots, slice)
        n, end = plan.visible.shape[1:]
        self._embeddings[:, :n] = embeddings
        self._positions.zero_()  # some kinds of RoPE look at the largest
        self._positions[:, :n] = plan.query_positions
        self._slots.fill_(self._spare)
        self._slots[:n] = torch.arange(plan.slots.start, plan.slots.stop, device=self._slots.device)
        for window, mask in zip(self._windows, self._masks, strict=True):
            mask.fill_(torch.finfo(mask.dtype).min)
            mask[:, :, :n, :end] = plan.mask(window, mask.dtype)
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


class CapturedPass:
    """Implements ``FastPass`` for a model on a GPU.

    Attributes:
        failure: what went wrong where a graph could not be recorded; passes of its size are eager from then on.
    """

    kind = "captured"
    has_exact = has_rows = False
    remedy = "set BEAGLE_COMPILED=0, which takes eager passes"

    def __init__(self, base: nn.Module, hidden: int, layers: Layers, record: Recorder | None = None) -> None:
        """
        Args:
            base: the model without its LM head, with our attention.
            hidden: its width.
            layers: what its layers cache and see.
            record: stands in for CUDA graphs.
        """
        weight = next(base.parameters())
        self._layers = layers.shapes
        self._graph = PassGraph(base, layers.distinct_windows)
        self._hidden, self._dtype, self._device = hidden, weight.dtype, weight.device
        self._record = record or GraphRecorder(weight.device)
        self._rooms: list[_Room] = []
        self._lock = Lock()
        self.failure: str | None = None

    def new_cache(self, capacity: int) -> KVCache | None:
        """A cache of one row that graphs can read and write; None: there are ``ROOMS`` in use."""
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

    def takes(self, cache: KVCache, rows: int, keys: int) -> bool:
        return rows <= ROWS[-1] and self._recorded(cache, rows, keys) is not None

    def __call__(self, embeddings: Tensor, plan: Pass) -> Tensor:
        recorded = self._recorded(plan.cache, *plan.visible.shape[1:])
        assert recorded is not None
        return recorded.run(embeddings, plan)

    def _recorded(self, cache: KVCache, rows: int, keys: int) -> _Recorded | None:
        """The graph for a pass of this size; None: the cache has no room, or it could not be recorded."""
        room = next((room for room in self._rooms if room.tenant() is cache), None)
        if room is None:
            return None
        size = next(n for n in ROWS if n >= rows), min(key_size(keys), room.memory.capacity)
        if size not in room.graphs:
            try:
                with torch.inference_mode(False), torch.no_grad():
                    room.graphs[size] = _Recorded(self._graph, room.memory, *size, self._hidden, self._record)
            except RuntimeError as error:  # no memory left, for one
                self.failure, room.graphs[size] = str(error), None  # its traceback would hold the cache
        return room.graphs[size]
