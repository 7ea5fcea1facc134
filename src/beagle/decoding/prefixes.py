"""Keys and values of sequences that have ended, for prompts that begin with the same tokens (prefix caching).

A chat's next turn repeats the dialogue so far, and requests of one application share a system prompt: with their keys
at hand only what is new of a prompt is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from beagle.targets.cache import KVCache


@dataclass(eq=False)
class Prefix:
    """The beginning of a sequence.

    Attributes:
        tokens: ``[n]``, int64, on the CPU.
        cache: their keys and values, of one sequence.
        states: their hidden states ``[n, hidden]``, from which a drafter learns the context.
    """

    tokens: Tensor
    cache: KVCache
    states: Tensor

    @property
    def length(self) -> int:
        return len(self.tokens)


class PrefixCache:
    """The newest sequences, of at most ``most`` tokens together; the least recently used goes first. Threads may share it."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: list[Prefix] = []  # the least recently used first
        self._lock = Lock()

    @property
    def tokens(self) -> int:
        return sum(one.length for one in self._kept)

    def find(self, ids: list[int]) -> Prefix | None:
        """The longest beginning of a prompt that is kept, at most all of it but the last token; None if there is none."""
        prompt = torch.tensor(ids[:-1])
        with self._lock:
            common = [_common(one.tokens, prompt) for one in self._kept]
            common = [n if n >= one.cache.fewest(0) else 0 for n, one in zip(common, self._kept, strict=True)]
            if not max(common, default=0):
                return None
            best = max(range(len(common)), key=common.__getitem__)
            found = self._kept.pop(best)
            self._kept.append(found)
            return Prefix(found.tokens[: common[best]], found.cache, found.states[: common[best]])

    def keep(self, tokens: list[int], cache: KVCache, row: int, states: list[Tensor]) -> None:
        """Keep a sequence: a copy of its keys and values, as far as there is room.

        Args:
            states: hidden states ``[n, hidden]`` of all tokens, piece by piece.
        """
        ids = torch.tensor(tokens[: self.most])
        if len(ids) < cache.fewest(row):
            return
        with self._lock:
            for one in self._kept:
                if _common(one.tokens, ids) == len(ids):  # nothing new
                    self._kept.remove(one)
                    self._kept.append(one)
                    return
            self._kept = [one for one in self._kept if _common(one.tokens, ids) < one.length]
            while self._kept and self.tokens + len(ids) > self.most:
                self._kept.pop(0)
            try:
                copied = cache.copy_of(row, len(ids))
                self._kept.append(Prefix(ids, copied, torch.cat(states)[: len(ids)].clone()))
            except RuntimeError:  # no memory: then the next prompt is run whole
                self._kept.clear()


def _common(one: Tensor, other: Tensor) -> int:
    """Length of the longest common beginning."""
    n = min(len(one), len(other))
    differ = (one[:n] != other[:n]).nonzero()
    return int(differ[0]) if len(differ) else n
