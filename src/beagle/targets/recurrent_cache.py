"""What recurrent layers keep of each sequence, so that rejected tokens leave no trace.

A recurrent state can't be cut back to an earlier token. So each layer keeps the state that it had at some token, and what it
was given since. The next pass says where its tokens begin: what the layer was given up to there is run again, in front of
the new tokens, and what lies behind is forgotten. Only recurrent layers run tokens again; all others see new ones alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from beagle.limits import MAX_TREE_TOKENS
from beagle.targets.cache import KVCache

State = dict[tuple[str, int], Tensor]  # a layer's states of one sequence, by their sort and number, ``[1, ...]`` each


@dataclass
class Track:
    """What one recurrent layer keeps of one sequence.

    Attributes:
        states: by the number of tokens that they have seen. At no token there is none.
        first: number of tokens before ``inputs``.
        inputs: what the layer was given since, ``[tokens, hidden]``; None: nothing.
    """

    states: dict[int, State] = field(default_factory=lambda: {0: {}})
    first: int = 0
    inputs: Tensor | None = None

    def at(self, start: int) -> tuple[State, Tensor | None]:
        """The latest state within the first ``start`` tokens, and the inputs from there on to be run again.

        Raises:
            RuntimeError: those tokens haven't run, or their state is no longer kept.
        """
        if start == 0:
            return {}, None
        known = max((n for n in self.states if n <= start), default=-1)
        end = self.first + (len(self.inputs) if self.inputs is not None else 0)
        if known < 0 or max(known, end) < start:
            raise RuntimeError(f"a recurrent layer has no state of {start} tokens")
        if known == start or self.inputs is None:
            return self.states[known], None
        return self.states[known], self.inputs[known - self.first : start - self.first]

    def keep(self, states: dict[int, State], inputs: Tensor | None) -> None:
        """
        Args:
            states: by the number of tokens that they have seen.
            inputs: of the tokens since the first of them, as far as some may be rejected.
        """
        self.states, self.first, self.inputs = states, min(states), inputs

    def take(self, other: Track) -> None:
        """Become a copy of ``other``; states are shared, since nothing writes into them."""
        self.states, self.first, self.inputs = dict(other.states), other.first, other.inputs


@dataclass(frozen=True)
class Chains:
    """What a pass does to recurrent layers: a chain of tokens goes on behind each of some sequences.

    Attributes:
        tracks: of each sequence, one for each recurrent layer.
        starts: tokens of each sequence before the chain.
        counts: tokens of each chain.
    """

    tracks: list[list[Track]]
    starts: list[int]
    counts: list[int]


class RecurrentCache(KVCache):
    """A KV cache, and a ``Track`` of each recurrent layer for each sequence.

    What is committed follows from ``lengths`` alone, as with keys: a pass begins behind them.
    """

    def __init__(self, *arguments: Any, recurrent_layers: int, **options: Any) -> None:
        """
        Args:
            *arguments: as of ``KVCache``.
            recurrent_layers: how many there are.
            **options: as of ``KVCache``.
        """
        super().__init__(*arguments, **options)
        self._tracks = [[Track() for _ in range(recurrent_layers)] for _ in range(self.batch)]

    def chains(self, starts: list[int], counts: list[int], first: int = 0) -> Chains:
        return Chains(self._tracks[first : first + len(counts)], list(starts), counts)

    def fewest(self, i: int) -> int:
        return max(min(track.states) for track in self._tracks[i]) if self._tracks[i] else 0

    def clear(self) -> None:
        super().clear()
        for i in range(self.batch):
            self._forget(i)

    def clear_sequence(self, i: int) -> None:
        super().clear_sequence(i)
        self._forget(i)

    def _forget(self, i: int) -> None:
        for track in self._tracks[i]:
            track.take(Track())

    def sequence(self, i: int) -> RecurrentCache:
        view = super().sequence(i)
        assert isinstance(view, RecurrentCache)
        view._tracks = self._tracks[i : i + 1]
        return view

    def copy_of(self, i: int, n: int) -> RecurrentCache:
        own = super().copy_of(i, n)
        assert isinstance(own, RecurrentCache)
        own._tracks = [[Track() for _ in self._tracks[i]]]
        own._copy_tracks(0, self, i)
        return own

    def copy_sequence(self, i: int, other: KVCache, other_i: int, n: int | None = None) -> None:
        super().copy_sequence(i, other, other_i, n)
        assert isinstance(other, RecurrentCache)
        self._copy_tracks(i, other, other_i)

    def _copy_tracks(self, i: int, other: RecurrentCache, other_i: int) -> None:
        for own, of in zip(self._tracks[i], other._tracks[other_i], strict=True):
            own.take(of)


def is_prompt(count: int) -> bool:
    """Whether so many tokens of one sequence are a prompt, none of which is rejected."""
    return count > MAX_TREE_TOKENS
