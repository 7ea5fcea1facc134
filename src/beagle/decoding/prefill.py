"""Prefill: the prompts of sequences that enter a decoder, several in one pass or one piece by piece."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from beagle.decoding.live_cache import LiveCache, exact_keys, first_slots
from beagle.decoding.prefixes import Prefix, PrefixCache
from beagle.decoding.sequence import Sequence
from beagle.errors import BeagleError
from beagle.limits import MAX_TREE_TOKENS
from beagle.targets.shape import TreeShape
from beagle.targets.target import Target

TOGETHER = 4096  # tokens of prompts that run in one pass, the shorter ones counted as long as the longest


@dataclass(frozen=True)
class Prefilled:
    """What one step of prefill has brought.

    Attributes:
        sequences: whose prompts have run; they are the last ones of the cache now.
        states: hidden states of each prompt, ``[n, state_size]``.
        logits: of each prompt's last token, ``[sequences, vocabulary]``; None without sequences.
        failed: sequences that have failed, each with its ``error``.
    """

    sequences: list[Sequence] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    logits: Tensor | None = None
    failed: list[Sequence] = field(default_factory=list)


class Prefill:
    """Prompts that wait, and the passes over them.

    Attributes:
        waiting: sequences whose prompts have not run, or not all of it.
        prefixes: keys of earlier sequences, for prompts that begin as they did.
    """

    def __init__(
        self, target: Target, cache: LiveCache, prefixes: PrefixCache | None, piece: int | None, exact: bool
    ) -> None:
        """
        Args:
            cache: of the live sequences, whom those that have run join.
            prefixes: None keeps none.
            piece: most tokens of a prompt that run in one step while others are live; None: all of them.
            exact: each prompt has passes of its own, and keys of exact mode.
        """
        self._target, self._cache, self._exact = target, cache, exact
        self._piece = None if exact else piece
        self.prefixes = prefixes
        self.waiting: deque[Sequence] = deque()

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Let sequences wait, short prompts first, so that passes have little padding."""
        self.waiting += sorted(sequences, key=lambda one: len(one.ids))

    def step(self, live: int) -> Prefilled:
        """One pass over prompts that wait: over several, or over one, of which it is a ``piece`` if others are live."""
        together = [] if self._exact else self._together(live)
        return self._several(together, live) if len(together) > 1 else self._alone(live)

    def _together(self, live: int) -> list[Sequence]:
        """The next prompts that wait, as many as one pass may take whole."""
        most = self._piece if live and self._piece is not None else TOGETHER
        found: list[Sequence] = []
        longest = 0
        for one in self.waiting:
            longest = max(longest, len(one.ids))
            if one.cache is not None or longest > (self._piece or most) or (len(found) + 1) * longest > most:
                break
            found.append(one)
        return found

    def _several(self, sequences: list[Sequence], live: int) -> Prefilled:
        """Run whole prompts in one pass, each behind what is known of it."""
        began = time.perf_counter()
        known = [self._known(one) for one in sequences]
        starts = [prefix.length if prefix is not None else 0 for prefix in known]
        pieces = [one.ids[start:] for one, start in zip(sequences, starts, strict=True)]
        tokens = torch.tensor([token for piece in pieces for token in piece], device=self._target.device)
        try:
            cache = self._cache.share(max(map(first_slots, sequences)))
        except BeagleError as error:
            return _failed([max(sequences, key=first_slots)], error)
        try:
            for i, prefix in enumerate(known, live):
                cache.lengths[i] = 0
                if prefix is not None:
                    cache.copy_sequence(i, prefix.cache, 0, prefix.length)
            shapes = [TreeShape.chain(len(piece)) for piece in pieces]
            lengths = [len(piece) for piece in pieces]
            parts = list(self._target.verify_trees(cache, tokens, shapes, live).split(lengths))
            logits = self._target.logits(torch.stack([part[-1] for part in parts]))
            for i, prefix in enumerate(known):
                if prefix is not None:
                    parts[i] = torch.cat([prefix.states, parts[i]])
        except Exception as error:  # of the pass that they share
            return _failed(sequences, error)
        for i, (one, start) in enumerate(zip(sequences, starts, strict=True)):
            cache.lengths[live + i] = len(one.ids)
            one.cached_tokens = start
            one.stats.prefill_seconds += (time.perf_counter() - began) / len(sequences)
            self.waiting.remove(one)
        return Prefilled(sequences, parts, logits)

    def _alone(self, live: int) -> Prefilled:
        """Run the first prompt that waits, or its next piece, in a cache of its own."""
        began = time.perf_counter()
        sequence = self.waiting[0]
        try:
            if sequence.cache is None:
                self._allocate(sequence, live)
            cache = sequence.cache
            assert cache is not None
            piece = sequence.ids[cache.length :][: self._piece if live else None]
            sequence.states.append(self._target.prefill(torch.tensor([piece], device=self._target.device), cache)[0])
            sequence.stats.prefill_seconds += time.perf_counter() - began
            if cache.length < len(sequence.ids):
                return Prefilled()
            states = sequence.states[0] if len(sequence.states) == 1 else torch.cat(sequence.states)
            logits = self._target.logits(states[-1])[None]
            self._cache.add(cache, live, exact_keys(sequence) if self._exact else first_slots(sequence))
        except Exception as error:
            return _failed([sequence], error)
        self.waiting.popleft()
        sequence.cache, sequence.states = None, []
        return Prefilled([sequence], [states], logits)

    def _allocate(self, sequence: Sequence, live: int) -> None:
        """A cache for the prompt, and for the answer where it is the only one; with what is known of the prompt."""
        known = self._known(sequence)
        capacity = len(sequence.ids)
        if not live:
            capacity = exact_keys(sequence) if self._exact else first_slots(sequence) + MAX_TREE_TOKENS
        sequence.cache = self._target.new_cache(1, capacity)
        if known is not None:
            sequence.cache.copy_sequence(0, known.cache, 0, known.length)
            sequence.states = [known.states]
            sequence.cached_tokens = known.length

    def _known(self, sequence: Sequence) -> Prefix | None:
        return self.prefixes.find(sequence.ids) if self.prefixes is not None else None


def _failed(sequences: list[Sequence], error: Exception) -> Prefilled:
    for one in sequences:
        one.error = error  # nowhere else: its traceback holds their keys
    return Prefilled(failed=sequences)
