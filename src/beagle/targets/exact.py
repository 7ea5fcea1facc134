"""Exact mode: passes in which a node's states have the same bits however many nodes share them.

Fast passes differ in their last bits with the number of rows, since kernels do; so in half precision a near-tie may
fall otherwise with drafts than without. Here the rows of a pass are as many as the kernels need, and every query
sums its keys in the same order: the shared context, then the keys of its own block and the one before, gathered.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from beagle.targets.attention import ExactPass
from beagle.targets.cache import KVCache
from beagle.targets.compiled import FastPass
from beagle.targets.shape import TreeShape

if TYPE_CHECKING:
    from beagle.targets.target import Target

EXACT_ROWS = 16  # most rows of a pass; all of them, where kernels differ by number of rows
EXACT_BLOCK = 32  # the keys of a query's own block and the one before are gathered per row


class ExactPasses:
    """``verify`` and ``logits`` of a target in the shape-stable form."""

    def __init__(self, target: Target) -> None:
        self._target = target

    @torch.no_grad()
    def verify(self, cache: KVCache, tokens: Tensor, shape: TreeShape, keys: int) -> Tensor:
        """``verify`` in the shape-stable form: states bit-equal to those of one node at a time.

        Args:
            tokens: ``[nodes]``, at most ``EXACT_ROWS`` of them.
            keys: padded number of keys of every pass of this generation.
        Returns:
            True states ``[nodes, hidden]``.
        """
        n = len(shape.parents)
        return self._run(self._compiled, cache, tokens, shape, max(n, self.least), keys)

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """``logits`` of ``[nodes, hidden]`` in the shape-stable form."""
        missing = self.least - len(states)
        if missing <= 0:
            return self._target.logits(states)
        return self._target.logits(torch.cat([states, states.new_zeros(missing, states.shape[1])]))[: len(states)]

    @cached_property
    def least(self) -> int:
        """Rows from which on a row's bits are the same however many share an exact pass, on this machine.

        Packed CPU kernels differ for a single row at most, GPU libraries for every number (then it is
        ``EXACT_ROWS``: all passes have as many). Tried out on a chain, for every number of rows from two on.
        """
        target = self._target
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(target.vocab_size, (EXACT_ROWS + 8,), generator=random).to(target.device)
        keys = 2 * EXACT_BLOCK
        cache = target.new_cache(1, keys)
        target.prefill(ids[None, :8], cache)
        chain = list(range(-1, EXACT_ROWS - 1))
        compiled = self._compiled
        whole = self._run(compiled, cache, ids[8:], TreeShape(chain), EXACT_ROWS, keys)
        eager = self._run(None, cache, ids[8:], TreeShape(chain), EXACT_ROWS, keys) if compiled else whole
        if compiled:
            target.refuse_others(compiled, whole, eager)
        target.refuse_difference(eager, target.verify(cache, ids[8:], TreeShape(chain)), "exact mode")
        logits = target.logits(whole)
        # A single row takes other kernels, which differ so rarely that few tokens don't show it (on CPUs with AMX one
        # bf16 output in some 10,000); and a graph of any number of rows is no graph of one.
        least = 1 if target.dtype == torch.float32 and not compiled else 2
        for n in range(EXACT_ROWS - 1, least - 1, -1):
            part = self._run(compiled, cache, ids[8 : 8 + n], TreeShape(chain[:n]), n, keys)
            if not torch.equal(part, whole[:n]) or not torch.equal(target.logits(part), logits[:n]):
                return n + 1
        return least

    @property
    def _compiled(self) -> FastPass | None:
        compiled = self._target.compiled
        return compiled if compiled is not None and compiled.has_exact else None

    def _run(
        self,
        compiled: FastPass | None,
        cache: KVCache,
        tokens: Tensor,
        shape: TreeShape,
        rows: int,
        keys: int,
    ) -> Tensor:
        """An exact pass of ``rows`` rows, eager if ``compiled`` is None; missing nodes are padded."""
        target = self._target
        start, n = cache.length, len(shape.parents)
        depths = torch.tensor(shape.depths())
        positions = torch.zeros(rows, dtype=torch.long)  # padding rows stand at position 0 and see slot 0
        positions[:n] = start + depths
        cuts = (positions // EXACT_BLOCK - 1).clamp(min=0) * EXACT_BLOCK
        slots = (cuts[:, None] + torch.arange(2 * EXACT_BLOCK)).clamp_(max=cache.capacity - 1)
        for node in range(1, n):
            at = node
            while at > 0:
                slots[node, start + depths[at] - cuts[node]] = start + at
                at = shape.parents[at]
        padded = torch.cat([tokens, tokens.new_zeros(rows - n)])
        where = positions[None].to(target.device)
        plan = ExactPass(
            cache,
            keys=keys,
            tail_slots=slots.to(target.device),
            cuts=cuts.to(target.device),
            slots=slice(start, start + rows),
            key_positions=where,
            query_positions=where,
            visible=torch.ones(1, 1, cache.capacity, dtype=torch.bool, device=target.device),
        )
        if compiled:
            return compiled(target.embed(padded[None]), plan)[0, :n]
        return target.forward(padded[None], where, plan)[0, :n]
