"""What a draft head remembers of one answer: cached keys of its hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from beagle.drafters.base import DraftContext
from beagle.drafters.block import Block, Rotations


class HeadContext(DraftContext):
    """Keys and values of an answer's slots; key i is that of slot i.

    Keys of the prompt are made at once, later ones when a draft reads them: where another drafter is sure, none is
    read. While drafting, nodes write keys of their own behind them, and later ones are written over those.

    Attributes:
        tokens: of the answer so far, the prompt included.
        length: how many they are.
        keys: slots whose keys are in the cache.
        cache: keys and values, ``[2, cached_heads, capacity, head_dim]``.
        unread: what the slots behind ``keys`` are made of: tokens, and states ``[n, state_size]``.
    """

    def __init__(
        self,
        head: Block,
        embed: Callable[[Tensor], Tensor],
        rotations: Rotations,
        columns: Tensor | None = None,
    ) -> None:
        """
        Args:
            embed: the target's embeddings, token ids ``[n]`` -> ``[n, hidden]``.
            rotations: of this head; the cache has their dtype and device.
            columns: what the head reads of a hidden state, as of ``Target.columns``.
        """
        c = head.config
        self.head, self.embed, self.rotations, self._columns = head, embed, rotations, columns
        self.tokens: list[int] = []
        self.length = self.keys = 0
        self._states = torch.zeros(0, c.state_size, dtype=rotations.dtype, device=rotations.device)  # the last ones
        self.cache = torch.zeros(2, c.cached_heads, 0, c.head_dim, dtype=rotations.dtype, device=rotations.device)
        self.unread: list[tuple[list[int], Tensor]] = []

    def extend(self, tokens: list[int], states: Tensor) -> None:
        prompt = self.length == 0
        if self._columns is not None:
            states = states[:, self._columns]
        self.unread.append(self.head.known(tokens, states, self.newest))
        self.tokens += tokens
        self.length += len(tokens)
        self._states = states
        if prompt:
            write_unread([self])

    @property
    def newest(self) -> Tensor:
        """Hidden state of the newest token, ``[1, state_size]``; ``[0, state_size]`` before the prompt."""
        return self._states[-1:]

    def write(self, k: Tensor, v: Tensor, at: int) -> None:
        """Keys and values ``[cached_heads, n, head_dim]`` of the slots from ``at`` on."""
        self.cache[0, :, at : at + k.shape[1]] = k
        self.cache[1, :, at : at + k.shape[1]] = v

    def reserve(self, capacity: int) -> None:
        """Make room for so many keys; what there is grows by doubling."""
        if capacity <= self.cache.shape[2]:
            return
        _, heads, _, width = self.cache.shape
        fresh = self.cache.new_zeros(2, heads, max(512, 2 * capacity), width)
        if self.keys:
            fresh[:, :, : self.keys] = self.cache[:, :, : self.keys]
        self.cache = fresh


@torch.no_grad()
def write_unread(contexts: Sequence[HeadContext]) -> None:
    """Write the keys that the next draft reads and the caches lack, those of all contexts of one head at once."""
    tokens: list[int] = []
    states: list[Tensor] = []
    slots: list[int] = []
    counts: list[int] = []
    for context in contexts:
        known = [token for own, _ in context.unread for token in own]
        tokens += known
        states += [state for _, state in context.unread]
        slots += range(context.keys, context.keys + len(known))
        counts.append(len(known))
        context.reserve(context.length)
    if not tokens:
        return
    head, embed, rotations = contexts[0].head, contexts[0].embed, contexts[0].rotations
    index = torch.tensor([tokens, slots], device=rotations.device)
    k, v = head.remember(index[0], torch.cat(states), rotations(index[1], max(slots) + 1), embed)
    for context, key, value, n in zip(contexts, k.split(counts, 1), v.split(counts, 1), counts, strict=True):
        context.write(key, value, context.keys)
        context.keys += n
        context.unread = []  # last: where memory was short nothing is lost
