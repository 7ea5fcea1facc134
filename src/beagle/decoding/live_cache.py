"""Keys and values of live sequences: of one in a cache of its own, of several in one that they share."""

from __future__ import annotations

from beagle.decoding.sequence import Sequence
from beagle.limits import MAX_TREE_TOKENS
from beagle.targets.cache import KVCache
from beagle.targets.plan import EXACT_BLOCK, EXACT_TOKENS
from beagle.targets.target import Target

FIRST_SLOTS = 4096  # of a cache behind its prompts, before it grows: a long limit need not be met


def first_slots(sequence: Sequence) -> int:
    """Tokens of a sequence, or as many of them as a cache has room for at first."""
    return min(len(sequence.ids) + sequence.max_new_tokens, len(sequence.ids) + FIRST_SLOTS)


def exact_keys(sequence: Sequence) -> int:
    """Keys of every exact pass of an answer, in whole blocks."""
    slots = len(sequence.ids) + sequence.max_new_tokens + EXACT_TOKENS
    return -(-slots // EXACT_BLOCK) * EXACT_BLOCK


class LiveCache:
    """The live sequences are the first ones of the cache; the last takes the place of one that leaves."""

    def __init__(self, target: Target, size: int) -> None:
        self._target, self._size = target, size
        self._cache: KVCache | None = None
        self._first: KVCache | None = None  # the first sequence of a shared cache

    @property
    def whole(self) -> KVCache:
        """The cache of all live sequences."""
        assert self._cache is not None
        return self._cache

    def add(self, own: KVCache, at: int, capacity: int) -> None:
        """A sequence becomes the live one number ``at``, the last.

        Args:
            capacity: least slots.

        Raises:
            BeagleError: there is no memory for it.
        """
        if at:
            self.share(max(own.length, capacity)).copy_sequence(at, own, 0)
        else:
            self._cache, self._first = own, None

    def share(self, capacity: int) -> KVCache:
        """The cache, with room for all sequences and so many tokens of each.

        Raises:
            BeagleError: there is no memory for it.
        """
        old = self._cache
        if old is None or old.batch < self._size:
            capacity = max(capacity + MAX_TREE_TOKENS, old.capacity if old is not None else 0)
            self._cache = self._target.new_cache(self._size, capacity)
            if old is not None:
                self._cache.copy_sequence(0, old, 0)
        self.reserve(capacity)
        self._first = None
        return self.whole

    def reserve(self, capacity: int) -> None:
        """Room for so many tokens of each sequence.

        Raises:
            BeagleError: there is no memory for it.
        """
        if capacity > self.whole.capacity:
            self._cache, self._first = self._target.with_room(self.whole, capacity), None

    def of(self, i: int) -> KVCache:
        """One sequence as a cache of its own over the same memory; what is to be committed is committed in ``whole``."""
        if self.whole.batch == 1:
            return self.whole
        if i == 0 and self._first is not None:
            view = self._first
        else:
            view = self.whole.sequence(i)
            if i == 0:
                self._first = view
        view.lengths = [self.whole.lengths[i]]
        return view

    def remove(self, at: int, last: int, clear: bool = False) -> None:
        """A sequence leaves.

        Args:
            clear: its keys may be NaN, which the mask of whoever comes next would not hide: 0 times NaN is NaN.
        """
        if last == 0:
            self._cache = self._first = None
            return
        if clear:
            self.whole.clear_sequence(at)
        if at != last:
            self.whole.copy_sequence(at, self.whole, last)
        self.whole.lengths[last] = 0
