"""One pass over rows of unequal length: their tokens lie end to end, and only attention tells them apart.

Linear layers, norms and the LM head see one flat list of tokens, without padding. Attention pads the
queries of a row to those of the longest and looks at the rows' slices of the cache, where they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from beagle.targets.attention import FOLDED, Pass
from beagle.targets.cache import KVCache
from beagle.targets.shape import TreeShape

if TYPE_CHECKING:
    from beagle.targets.compiled import FastPass
    from beagle.targets.target import Target


class RaggedPass(Pass):
    """A tree of tokens for each of several rows of a cache that stand side by side.

    Attributes:
        positions: ``[1, tokens]``, of all rows' tokens end to end.
        places: each token's row ``[tokens]``; the tokens of each row ``[rows, longest]``, padded with its last; where in
            that table, laid out flat, each token stands ``[tokens]``.
    """

    def __init__(self, cache: KVCache, first: int, shapes: list[TreeShape], device: torch.device) -> None:
        """
        Args:
            first: row of the cache that the first shape belongs to; the others follow.
            shapes: a tree for each row, behind what the row has committed.
        """
        starts = cache.lengths[first : first + len(shapes)]
        counts = [len(shape.parents) for shape in shapes]
        most, end = max(counts), max(start + n for start, n in zip(starts, counts, strict=True))
        keys = torch.arange(end).repeat(len(shapes), 1)
        queries = torch.zeros(len(shapes), most, dtype=torch.long)
        visible = (keys < torch.tensor(starts)[:, None])[:, None].repeat(1, most, 1)
        for row, (start, n, shape) in enumerate(zip(starts, counts, shapes, strict=True)):
            depths = torch.tensor(shape.depths()) + start
            queries[row, :n] = keys[row, start : start + n] = depths
            visible[row, :n, start : start + n] = shape.ancestors()
        counted = torch.tensor(counts)
        before = counted.cumsum(0) - counted  # tokens of the rows above
        rows = torch.arange(len(shapes)).repeat_interleave(counted)
        behind = torch.arange(len(rows)) - before[rows]  # how far into its row a token stands
        padding = before[:, None] + torch.arange(most).clamp(max=counted[:, None] - 1)
        super().__init__(
            cache,
            slots=(torch.tensor(starts)[rows] + behind).to(device),
            key_positions=keys.to(device),
            query_positions=queries.to(device),
            visible=visible.to(device),
        )
        self.positions = queries[rows, behind][None].to(device)
        self.places = [x.to(device) for x in (first + rows, padding, rows * most + behind)]
        self._full = len(rows) == len(shapes) * most  # nothing to pad
        self._side_by_side = slice(first, first + len(shapes))

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``[1, kv_heads, tokens, head_dim]``; return the rows' keys and values in view."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        rows = self.places[0]
        keys[rows, :, self.slots] = key[0].transpose(0, 1)
        values[rows, :, self.slots] = value[0].transpose(0, 1)
        end = self.visible.shape[-1]
        return keys[self._side_by_side, :, :end], values[self._side_by_side, :, :end]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """``[1, heads, tokens, head_dim]`` to ``[1, heads, tokens, value_dim]``."""
        _, padding, places = self.places
        flat = query[0].transpose(0, 1)  # [tokens, heads, head_dim]
        padded = flat.unflatten(0, padding.shape) if self._full else flat[padding]
        out = super().attend(padded.transpose(1, 2), key, value, scaling, window, softcap).transpose(1, 2).flatten(0, 1)
        return (out if self._full else out[places]).transpose(0, 1)[None]


class RaggedPasses:
    """Passes over several rows of one target, compiled ones where there are any and they agree with the eager ones."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._agrees: FastPass | None = None

    def verify(self, cache: KVCache, tokens: Tensor, shapes: list[TreeShape], first: int) -> Tensor:
        """As of ``Target.verify_rows``.

        Raises:
            BeagleError: the compiled pass computes something else.
        """
        compiled = self._target.compiled
        small = first == 0 and max(len(shape.parents) for shape in shapes) <= FOLDED
        if compiled is None or not compiled.has_rows or not small:
            return self._run(None, cache, tokens, shapes, first)
        if compiled is not self._agrees:  # not when it is loaded: it has weights of its own
            self._target.refuse_others(compiled, self._states_of_trees(compiled), self._states_of_trees(None))
            self._agrees = compiled
        return self._run(compiled, cache, tokens, shapes, first)

    def _run(
        self, compiled: FastPass | None, cache: KVCache, tokens: Tensor, shapes: list[TreeShape], first: int = 0
    ) -> Tensor:
        target = self._target
        plan = RaggedPass(cache, first, shapes, target.device)
        if compiled is not None:
            return compiled(target.embed(tokens[None]), plan)[0]
        return target.forward(tokens[None], plan.positions, plan)[0]

    def _states_of_trees(self, compiled: FastPass | None) -> Tensor:
        """A chain, a tree and a root behind contexts of unequal length, in a cache with a row to spare."""
        target = self._target
        contexts = [3, 7, 5]
        cache = target.new_cache(len(contexts) + 1, 16)
        ids = torch.arange(1, 23, device=target.device) % target.vocab_size
        self._run(None, cache, ids[:15], [TreeShape.chain(n) for n in contexts])
        cache.lengths = [*contexts, 0]
        return self._run(compiled, cache, ids[15:], [TreeShape.chain(2), TreeShape([-1, 0, 0, 1]), TreeShape([-1])])
