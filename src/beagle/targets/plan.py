"""The plan of one forward pass: what each token sees, and where its keys and values go.

Attention reads nothing else. A plan holds tensors only, so that a compiled or captured graph can take them as inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from beagle.targets.cache import KVCache
from beagle.targets.chains import Chains
from beagle.targets.paths import Paths
from beagle.targets.shape import TreeShape

EXACT_TOKENS = 16  # most tokens of an exact pass; all of them, where kernels differ by number of tokens
KEY_BLOCK = 32  # a tree sees a multiple of as many slots: fused attention sums those behind the last block otherwise
EXACT_BLOCK = 32  # the keys of a query's own block and of the one before are gathered for it
Kind = Literal["prompt", "tree", "trees", "exact"]


@dataclass(frozen=True)
class Chunk:
    """Chunked attention: a query sees what comes before it in its own chunk, of ``size`` tokens."""

    size: int


@dataclass(frozen=True)
class Biased:
    """The whole context, with biases that grow with the key's position (ALiBi).

    Attributes:
        slopes: of each query head.
        rounded: the dtype that a model rounds its biases to; empty: none.
        scale: what they are multiplied with after that.
    """

    slopes: tuple[float, ...]
    rounded: str = ""
    scale: float = 1.0

    def at(self, positions: Tensor, dims: int) -> Tensor:
        """Biases of each head at positions, fp32; heads are the second of ``dims`` dimensions, where positions have a 1."""
        biases = torch.tensor(self.slopes, device=positions.device).view(-1, *[1] * (dims - 2)) * positions
        return biases.to(getattr(torch, self.rounded)).float() * self.scale if self.rounded else biases


# a sliding window in tokens, the query's own included; a chunk; biases; None: the whole context
Window = int | Chunk | Biased | None
Windows = list[Window]
Masks = dict[Window, Tensor]


def span(window: Window) -> int | None:
    """The longest text of which every token is in view; None: any."""
    if isinstance(window, Biased):
        return None
    return window.size if isinstance(window, Chunk) else window


def heads_of(window: Window) -> int:
    """Of a mask: 1, or those of the model where each has biases of its own."""
    return len(window.slopes) if isinstance(window, Biased) else 1


@dataclass(eq=False)
class Sequences:
    """Where the tokens of several sequences stand, which lie end to end in one pass.

    Attributes:
        sequence: each token's sequence among those of ``Plan.layers``, ``[tokens]``.
        padding: the tokens of each sequence, ``[sequences, longest]``, padded with its last.
        place: where each token stands in ``padding`` laid out flat, ``[tokens]``.
        full: whether nothing is padded.
    """

    sequence: Tensor
    padding: Tensor
    place: Tensor
    full: bool = False


@dataclass(eq=False)
class Plan:
    """One forward pass.

    Attributes:
        kind: ``prompt``, ``tree``, ``trees`` (of several sequences) or ``exact`` (a tree in exact mode).
        positions: of RoPE, ``[1, tokens]``; those of a tree are made when they are first asked for, as masks.
        slots: slots of the cache where fresh keys go.
        layers: the cache's keys and values of each layer in turn, ``[batch, kv_heads, capacity, head_dim]``; written
            in place.
        keys: slots in view, from the first on; in exact mode those that all tokens share.
        masks: by window, additive, ``[sequences or 1, 1 or heads, queries, keys]``; in exact mode fp32,
            ``[tokens, 1 or heads, keys + tail]``. A prompt has none where causal attention is all there is. Those of a tree
            are made when they are first asked for: native passes need none.
        tree: of ``tree``, with nodes that earlier passes have run; None inside a graph.
        sequences: of ``trees``.
        tail: in exact mode the slots that each token sees besides, in the order of their positions, ``[tokens, tail]``.
        folded: masks repeated for the heads of a group, filled by attention.
        before: the last slots of each token's path by their number, filled by short convolutions.
        paths: what each token has before it, filled by indices.
        chains: what the pass does to recurrent layers, where there are some.
        named_layer: the layer whose keys are attended to next, where a module shared by several layers has named it.
    """

    kind: Kind
    made_positions: Tensor | Callable[[], Tensor]
    slots: slice | Tensor
    layers: list[Tensor]
    keys: int
    made_masks: Masks | Callable[[], Masks]
    tree: TreeShape | None = None
    sequences: Sequences | None = None
    tail: Tensor | None = None
    folded: dict[tuple[Window, int], Tensor] = field(default_factory=dict)
    before: dict[int, Tensor] = field(default_factory=dict)
    paths: list[Paths] = field(default_factory=list)
    chains: Chains | None = None
    named_layer: int | None = None

    @property
    def positions(self) -> Tensor:
        if callable(self.made_positions):
            self.made_positions = self.made_positions()
        return self.made_positions

    @property
    def masks(self) -> Masks:
        if callable(self.made_masks):
            self.made_masks = self.made_masks()
        return self.made_masks

    def tensors(self) -> list[Tensor]:
        """What a graph takes. ``of_tensors`` is the inverse."""
        slots = self.slots
        if isinstance(slots, slice):
            slots = torch.arange(slots.start, slots.stop, device=self.positions.device)
        extra = [] if self.tail is None else [self.tail]
        if self.sequences is not None:
            extra = [self.sequences.sequence, self.sequences.padding, self.sequences.place]
        return [self.positions, slots, *self.masks.values(), *self.layers, *extra]

    @classmethod
    def of_tensors(cls, kind: Kind, windows: Windows, tensors: list[Tensor]) -> Plan:
        """A plan inside a graph.

        Args:
            windows: of its masks, in their order.
        """
        positions, slots, *rest = tensors
        masks, rest = dict(zip(windows, rest, strict=False)), rest[len(windows) :]
        keys = next(iter(masks.values())).shape[-1]
        if kind == "trees":
            *layers, sequence, padding, place = rest
            return cls(kind, positions, slots, layers, keys, masks, sequences=Sequences(sequence, padding, place))
        if kind == "exact":
            *layers, tail = rest
            return cls(kind, positions, slots, layers, keys - tail.shape[1], masks, tail=tail)
        return cls(kind, positions, slots, rest, keys, masks)


def of_prompt(cache: KVCache, first: int, last: int, windows: Windows, scored: bool) -> Plan:
    """Tokens ``first`` … ``last - 1`` of a prompt of each sequence; those before them have been run.

    Args:
        cache: written in place.
        scored: whether some layer has a soft cap or sinks, which need a mask.
    """
    queries = torch.arange(first, last, device=cache.device)
    plain = first == 0 and not scored
    needed = [w for w in windows if not plain or isinstance(w, Biased) or last > (span(w) or last)]
    masks: Masks = {}
    if needed:
        keys = torch.arange(last, device=cache.device)
        masks = _masks((keys <= queries[:, None])[None, None], queries[:, None], keys, needed, cache.dtype)
    chains = cache.chains([first] * cache.batch, [last - first] * cache.batch)
    return Plan("prompt", queries[None], slice(first, last), cache.tensors, last, masks, chains=chains)


def of_tree(cache: KVCache, tree: TreeShape, windows: Windows, done: int = 0) -> Plan:
    """A tree behind what a cache of one sequence has committed.

    Args:
        cache: written in place.
        tree: each node sees the context, its ancestors and itself.
    """
    start, n, device = cache.length, len(tree.parents), cache.device
    end = _whole_blocks(start + n, cache)

    def positions() -> Tensor:
        return start + torch.tensor(tree.depths(), device=device)

    def masks() -> Masks:
        all_positions = positions()
        queries = all_positions[done:]
        visible = torch.zeros(1, 1, n - done, end, dtype=torch.bool, device=device)
        visible[..., :start] = True
        visible[..., start : start + n] = tree.ancestors()[done:].to(device)
        keys = torch.arange(end, device=device)
        keys[start : start + n] = all_positions
        return _masks(visible, queries[:, None], keys, windows, cache.dtype)

    slots = slice(start + done, start + n)
    chains = cache.chains([start], [n - done], done=done)
    return Plan("tree", lambda: positions()[None, done:], slots, cache.tensors, end, masks, tree, chains=chains)


def _whole_blocks(slots: int, cache: KVCache) -> int:
    """As many slots, and those that are missing to a multiple of ``KEY_BLOCK``, which no token sees.

    So a token's attention has the same bits in a pass of its own and in a chain, and nearly always in a tree.
    """
    return min(-(-slots // KEY_BLOCK) * KEY_BLOCK, cache.capacity)


def of_trees(cache: KVCache, trees: list[TreeShape], windows: Windows, first: int = 0) -> Plan:
    """A tree behind each of several sequences of a cache that stand side by side; a prompt is a chain.

    Args:
        cache: written in place.
        trees: one for each sequence, behind what it has committed.
        first: sequence of the first tree; the others follow.
    """
    starts = cache.lengths[first : first + len(trees)]
    counts = [len(tree.parents) for tree in trees]
    most = max(counts)
    end = _whole_blocks(max(start + n for start, n in zip(starts, counts, strict=True)), cache)
    keys = torch.arange(end).repeat(len(trees), 1)
    queries = torch.zeros(len(trees), most, dtype=torch.long)
    visible = (keys < torch.tensor(starts)[:, None])[:, None].repeat(1, most, 1)
    for i, (start, n, tree) in enumerate(zip(starts, counts, trees, strict=True)):
        queries[i, :n] = keys[i, start : start + n] = torch.tensor(tree.depths()) + start
        visible[i, :n, start : start + n] = tree.ancestors()
    counted = torch.tensor(counts)
    before = counted.cumsum(0) - counted  # tokens of the sequences before
    index = torch.arange(len(trees)).repeat_interleave(counted)
    column = torch.arange(len(index)) - before[index]  # how far into its sequence's tree a token stands
    padding = before[:, None] + torch.arange(most).clamp(max=counted[:, None] - 1)
    device = cache.device
    sequences = Sequences(
        index.to(device),
        padding.to(device),
        (index * most + column).to(device),
        full=len(index) == len(trees) * most,
    )
    masks = _masks(
        visible[:, None].to(device),
        queries[:, None, :, None].to(device),
        keys[:, None, None].to(device),
        windows,
        cache.dtype,
    )
    slots = (torch.tensor(starts)[index] + column).to(device)
    positions = queries[index, column][None].to(device)
    layers = [tensor[first:] for tensor in cache.tensors] if first else cache.tensors
    chains = cache.chains(starts, counts, first)
    return Plan("trees", positions, slots, layers, end, masks, sequences=sequences, chains=chains)


def of_exact_tree(cache: KVCache, tree: TreeShape, keys: int, tokens: int, windows: Windows) -> Plan:
    """A tree whose nodes get the same bits however many of them share the pass.

    A query at position p sees its keys in two parts, cut at a place that depends on p alone: those below the cut are
    shared by all and lie in position order; the last ones are gathered for each query in path order, since a node's
    ancestors stand at scattered slots. The number of keys never changes within a generation, and keys that a query
    doesn't see get probability 0, which adds nothing: so every sum runs over the same numbers in the same order.

    Args:
        cache: of one sequence, written in place.
        tree: at most ``EXACT_TOKENS`` nodes.
        keys: padded number of shared keys, the same in every pass of a generation.
        tokens: of the pass; those that the tree has less stand at position 0 and mean nothing.
    """
    start, n = cache.length, len(tree.parents)
    depths = torch.tensor(tree.depths())
    positions = torch.zeros(tokens, dtype=torch.long)
    positions[:n] = start + depths
    cuts = (positions // EXACT_BLOCK - 1).clamp(min=0) * EXACT_BLOCK
    own = cuts[:, None] + torch.arange(2 * EXACT_BLOCK)  # positions of each query's own keys
    tail = own.clamp(max=cache.capacity - 1)
    for node in range(1, n):
        at = node
        while at > 0:
            tail[node, start + depths[at] - cuts[node]] = start + at
            at = tree.parents[at]
    shared = torch.arange(keys).expand(tokens, -1)
    queries = positions[:, None]
    visible = torch.cat([shared < cuts[:, None], own <= queries], dim=1)
    device = cache.device
    masks = _masks(
        visible[:, None].to(device),
        queries[:, None].to(device),
        torch.cat([shared, own], dim=1)[:, None].to(device),
        windows,
        torch.float32,
    )
    slots = slice(start, start + tokens)
    return Plan("exact", positions[None].to(device), slots, cache.tensors, keys, masks, tail=tail.to(device))


def _masks(visible: Tensor, queries: Tensor, keys: Tensor, windows: Windows, dtype: torch.dtype) -> Masks:
    """Additive masks by window, in the shape of ``visible``.

    Args:
        visible: bool, whether a query sees a key where there is no window.
        queries: their positions, to be broadcast to ``visible``.
        keys: their positions, to be broadcast to ``visible``.
    """
    masks = {}
    for window in windows:
        seen = visible
        if isinstance(window, Chunk):
            seen = visible & (keys // window.size == queries // window.size)
        elif isinstance(window, int):
            seen = visible & (keys > queries - window)
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        if isinstance(window, Biased):  # less the query's own, so that they are small where it looks
            mask = mask + (window.at(keys, seen.dim()) - window.at(queries, seen.dim())).to(dtype)
        masks[window] = mask.masked_fill_(~seen, torch.finfo(dtype).min)
    return masks
