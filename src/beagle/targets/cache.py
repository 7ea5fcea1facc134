"""The target's KV cache: allocated once, written in place, compacted in place."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from beagle.targets.chains import Chains
from beagle.targets.linears import tiled


@dataclass(frozen=True)
class LayerShape:
    """Shape of what one attention layer caches (K and V may differ in width)."""

    kv_heads: int
    key_dim: int
    value_dim: int


class KVCache:
    """Preallocated keys and values of every layer.

    Layers of equal shape share one tensor ``[2 * layers, batch, kv_heads, capacity, head_dim]``, so
    that moving the accepted path of a tree into place is one indexing operation, not one per layer.

    Attributes:
        lengths: committed tokens of each sequence, ``[batch]`` as Python ints.
        capacity: slots of each sequence.
        tensors: keys and values of each layer in turn, ``[batch, kv_heads, capacity, head_dim]``.
    """

    def __init__(
        self,
        layers: list[LayerShape],
        *,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.capacity = capacity
        self.batch = batch
        self.dtype, self.device = dtype, device
        self.lengths = [0] * batch
        counts: dict[tuple[int, int], int] = {}
        places: list[tuple[tuple[int, int], int]] = []
        for layer in layers:
            for dim in (layer.key_dim, layer.value_dim):
                shape = (layer.kv_heads, dim)
                places.append((shape, counts.get(shape, 0)))
                counts[shape] = counts.get(shape, 0) + 1
        # zeros, not empty: masked slots are multiplied by probability 0, and 0 * NaN is NaN
        self._stacks = {
            (heads, dim): torch.zeros(n, batch, heads, capacity, dim, dtype=dtype, device=device)
            for (heads, dim), n in counts.items()
        }
        self.tensors = [self._stacks[shape][i] for shape, i in places]

    def clear(self) -> None:
        """Zeros everywhere, nothing committed."""
        for stack in self._stacks.values():
            stack.zero_()
        self.lengths = [0] * self.batch

    def clear_sequence(self, i: int) -> None:
        """``clear`` for one sequence."""
        for stack in self._stacks.values():
            stack[:, i].zero_()
        self.lengths[i] = 0

    def sequence(self, i: int) -> KVCache:
        """One sequence of the cache as a cache of its own over the same memory, with nothing committed."""
        view = copy.copy(self)
        view._stacks = {shape: stack[:, i : i + 1] for shape, stack in self._stacks.items()}
        view.tensors = [tensor[i : i + 1] for tensor in self.tensors]
        view.batch, view.lengths = 1, [0]
        return view

    def chains(self, committed: list[int], counts: list[int], first: int = 0, done: int = 0) -> Chains | None:
        """What a pass does to recurrent layers; None: there are none.

        Args:
            committed: tokens of each sequence that no later pass rejects.
            counts: tokens of the pass, of each sequence.
            first: the first of these sequences; the others follow.
            done: tokens behind the committed ones that an earlier pass has run.
        """
        return None

    def fewest(self, i: int) -> int:
        """The fewest tokens that a sequence can be cut back to."""
        return 0

    @property
    def length(self) -> int:
        """Committed tokens of a cache of one sequence."""
        return self.lengths[0]

    def compact(self, kept: list[int]) -> None:
        """Commit slots ``length + kept[0], length + kept[1], …`` of a cache of one sequence, in this order.

        ``kept`` is strictly increasing (a path through a tree in topological order).
        """
        self.compact_sequences([kept])

    def compact_sequences(self, kept: list[list[int]]) -> None:
        """``compact`` for the first sequences, all in one indexing operation."""
        sequences: list[int] = []
        sources: list[int] = []
        places: list[int] = []
        for i, path in enumerate(kept):
            start = self.lengths[i]
            for place, source in enumerate(path):
                if place != source:  # else in place already: a chain, or the first branch of a tree
                    sequences.append(i)
                    sources.append(start + source)
                    places.append(start + place)
            self.lengths[i] += len(path)
        if not sequences:
            return
        for stack in self._stacks.values():
            if self.batch == 1 and stack.is_cpu and stack.is_contiguous() and tiled.loaded():
                tiled.move_slots(stack, sources, places)
                continue
            where, to, source_index = torch.tensor([sequences, places, sources], device=stack.device)
            stack[:, where, :, to] = stack[:, where, :, source_index]

    def copy_of(self, i: int, n: int) -> KVCache:
        """The first ``n`` tokens of one sequence, in a cache of their own with no room for more."""
        own = copy.copy(self)
        own._stacks = {shape: stack[:, i : i + 1, :, :n].clone() for shape, stack in self._stacks.items()}
        own.tensors = []
        own.batch, own.capacity, own.lengths = 1, n, [n]
        return own

    def copy_sequence(self, i: int, other: KVCache, other_i: int, n: int | None = None) -> None:
        """Take over the first ``n`` tokens of one sequence of ``other`` (same layer shapes), by default all committed."""
        n = other.lengths[other_i] if n is None else n
        for shape, stack in self._stacks.items():
            stack[:, i, :, :n] = other._stacks[shape][:, other_i, :, :n]
        self.lengths[i] = n
