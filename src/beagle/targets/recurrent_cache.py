"""A KV cache that keeps the states of recurrent layers, too."""

from __future__ import annotations

from typing import Any

from beagle.targets.cache import KVCache
from beagle.targets.chains import Chains, Track


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

    def chains(self, committed: list[int], counts: list[int], first: int = 0, done: int = 0) -> Chains:
        starts = [n + done for n in committed]
        return Chains(self._tracks[first : first + len(counts)], committed, starts, counts)

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
