"""A draft head and prompt lookup in one tree: the head for what is new, the lookup for what repeats."""

from __future__ import annotations

import math

from torch import Tensor

from beagle.drafters.base import Draft, Drafter, TreePlan, best_first
from beagle.drafters.lookup import LookupDrafter

SURE = math.log(0.6)  # a looked-up chain that likely to hold to its end needs no help from the head


class CombinedDrafter:
    """Implements ``Drafter``: the candidates of both, merged where they agree.

    A candidate's score is the better of the two: both estimate its chance of acceptance.
    """

    def __init__(self, head: Drafter, lookup: LookupDrafter) -> None:
        self.head = head
        self.lookup = lookup
        self.name = f"{getattr(head, 'name', type(head).__name__)}+{lookup.name}"

    def fork(self) -> CombinedDrafter:
        return CombinedDrafter(self.head.fork(), self.lookup.fork())

    def begin(self, tokens: list[int], states: Tensor) -> None:
        self.head.begin(tokens, states)
        self.lookup.begin(tokens, states)

    def extend(self, tokens: list[int], states: Tensor) -> None:
        self.head.extend(tokens, states)
        self.lookup.extend(tokens, states)

    def draft(self, root: int, plan: TreePlan, min_gain: float = 0.0) -> Draft:
        repeated = self.lookup.draft(root, plan, min_gain)
        if depth_of(repeated, SURE) >= plan.depth:
            return repeated
        return merge(self.head.draft(root, plan, min_gain), repeated, plan.nodes or 64)


def depth_of(draft: Draft, least: float) -> int:
    """Levels of a draft's deepest candidate whose score is at least ``least``."""
    depths: list[int] = []
    for parent in draft.parents:
        depths.append(1 + (depths[parent] if parent >= 0 else 0))
    return max((d for d, score in zip(depths, draft.scores, strict=True) if score >= least), default=0)


def merge(one: Draft, other: Draft, most: int) -> Draft:
    """The ``most`` best candidates of two drafts, each path once, with the better of its scores."""
    tokens: list[int] = []
    parents: list[int] = []
    scores: list[float] = []
    nodes: dict[tuple[int, int], int] = {}
    for draft in (one, other):
        place: list[int] = []
        for token, old, score in zip(draft.tokens, draft.parents, draft.scores, strict=True):
            parent = place[old] if old >= 0 else -1
            node = nodes.setdefault((parent, token), len(tokens))
            if node == len(tokens):
                tokens.append(token)
                parents.append(parent)
                scores.append(score)
            scores[node] = max(scores[node], score)
            place.append(node)
    return best_first(tokens, parents, scores, most)
