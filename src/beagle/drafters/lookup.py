"""Prompt lookup: what followed the same words before is likely to follow them again.

No training and no tensors. The idea is Saxena's prompt lookup decoding; the incremental index, the
tree of several matches and their scores are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from beagle.drafters.base import Draft, DraftContext, Drafter, TreePlan, best_first
from beagle.limits import MAX_NODES


class LookupContext(DraftContext):
    """An answer's tokens, and where each n-gram of them occurred."""

    def __init__(self, max_ngram: int) -> None:
        self.max_ngram = max_ngram
        self.tokens: list[int] = []
        self._starts: dict[tuple[int, ...], list[int]] = {}  # n-gram -> where its continuations start
        self._tries = [0] * (max_ngram + 1)
        self._hits = [0] * (max_ngram + 1)

    def extend(self, tokens: list[int], states: Tensor) -> None:
        for token in tokens:
            self._judge(token)
            self.tokens.append(token)
            for n in range(1, min(self.max_ngram, len(self.tokens)) + 1):
                self._starts.setdefault(tuple(self.tokens[-n:]), []).append(len(self.tokens))

    def _judge(self, token: int) -> None:
        """Note whether the newest match of the tokens so far would have proposed ``token``."""
        for n in range(min(self.max_ngram, len(self.tokens)), 0, -1):
            starts = self._starts[tuple(self.tokens[-n:])]
            if len(starts) > 1:  # the last one is where ``token`` itself goes
                self._tries[n] += 1
                self._hits[n] += self.tokens[starts[-2]] == token
                return

    def hit_rate(self, n: int) -> float:
        """How often a match of n tokens was right in this context; n / (n + 2) before anything is known."""
        n = min(n, self.max_ngram)
        return (self._hits[n] + n) / (self._tries[n] + n + 2)

    def matches(self, root: int) -> tuple[int, list[int]]:
        """The longest n whose n-gram ending in ``root`` occurred before, and where its continuations start."""
        newest = [*self.tokens[max(0, len(self.tokens) - self.max_ngram + 1) :], root]
        for n in range(len(newest), 0, -1):
            if starts := self._starts.get(tuple(newest[-n:])):
                return n, starts
        return 0, []

    def continuation(self, start: int, root: int, depth: int) -> list[int]:
        """``depth`` tokens from ``start`` on; where the context ends, the proposal goes on by itself."""
        period = len(self.tokens) + 1 - start
        run = [*self.tokens[start : start + depth], root][:depth]
        while len(run) < depth:  # a loop of ``period`` tokens, seen once so far
            run.append(run[-period])
        return run


class LookupDrafter(Drafter[LookupContext]):
    """Proposes what followed earlier occurrences of the newest n-gram.

    A chain is the newest match, a tree the newest ``top_k`` matches, merged where they agree. ``min_expected_tokens`` is not
    needed: another level costs no time here.
    """

    name = "lookup"

    def __init__(self, max_ngram: int = 4) -> None:
        """
        Args:
            max_ngram: longest suffix that is looked up; shorter ones where it never occurred.
        """
        if max_ngram < 1:
            raise ValueError("max_ngram is at least 1")
        self.max_ngram = max_ngram

    def context(self) -> LookupContext:
        return LookupContext(self.max_ngram)

    def draft(
        self, contexts: Sequence[LookupContext], roots: list[int], plan: TreePlan, min_expected_tokens: float = 0.0
    ) -> list[Draft]:
        return [self._draft(context, root, plan) for context, root in zip(contexts, roots, strict=True)]

    def _draft(self, context: LookupContext, root: int, plan: TreePlan) -> Draft:
        n, starts = context.matches(root)
        if not starts:
            return Draft([], [], [])
        count = 1 if plan.kind == "chain" else plan.top_k
        newest = starts[: -count - 1 : -1]
        children: dict[tuple[int, int], int] = {}
        tokens: list[int] = []
        parents: list[int] = []
        depths: list[int] = []
        weights: list[float] = []
        for age, start in enumerate(newest):
            node = -1
            for depth, token in enumerate(context.continuation(start, root, plan.depth), 1):
                child = children.setdefault((node, token), len(tokens))
                if child == len(tokens):
                    tokens.append(token)
                    parents.append(node)
                    depths.append(depth)
                    weights.append(0.0)
                weights[child] += 0.5**age  # the newer, the likelier
                node = child
        # each level right as often as a match of its length was so far, shared among those who differ
        total = sum(0.5**age for age in range(len(newest)))
        right = [0.0]
        for depth in range(plan.depth):
            right.append(right[-1] + math.log(context.hit_rate(n + depth)))
        scores = [right[depth] + math.log(weight / total) for depth, weight in zip(depths, weights, strict=True)]
        return best_first(tokens, parents, scores, plan.nodes or MAX_NODES)
