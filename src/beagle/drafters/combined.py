"""A draft head and prompt lookup in one tree: the head for what is new, the lookup for what repeats."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from beagle.drafters.base import Draft, DraftContext, Drafter, TreePlan, best_first
from beagle.drafters.lookup import LookupContext, LookupDrafter
from beagle.limits import MAX_NODES

SURE = math.log(0.6)  # a looked-up chain that likely to hold to its end needs no help from the head


class CombinedContext(DraftContext):
    """A context of each of the two drafters."""

    def __init__(self, head: DraftContext, lookup: LookupContext) -> None:
        self.head = head
        self.lookup = lookup

    def extend(self, tokens: list[int], states: Tensor) -> None:
        self.head.extend(tokens, states)
        self.lookup.extend(tokens, states)


class CombinedDrafter(Drafter[CombinedContext]):
    """The candidates of a head (or another drafter) and of prompt lookup, merged where they agree.

    Both scores estimate a candidate's probability of acceptance, and where both propose it, it is likelier than either says.
    """

    def __init__(self, head: Drafter, lookup: LookupDrafter) -> None:
        self.head = head
        self.lookup = lookup
        self.name = f"{head.name}+{lookup.name}"

    def context(self) -> CombinedContext:
        return CombinedContext(self.head.context(), self.lookup.context())

    def draft(
        self, contexts: Sequence[CombinedContext], roots: list[int], plan: TreePlan, min_expected_tokens: float = 0.0
    ) -> list[Draft]:
        for context in contexts:
            context.head.noise = context.noise
        drafts = self.lookup.draft([context.lookup for context in contexts], roots, plan, min_expected_tokens)
        unsure = [i for i, repeated in enumerate(drafts) if depth_of(repeated, SURE) < plan.depth]
        if unsure:
            heads, own_roots = [contexts[i].head for i in unsure], [roots[i] for i in unsure]
            for i, draft in zip(unsure, self.head.draft(heads, own_roots, plan, min_expected_tokens), strict=True):
                drafts[i] = merge(draft, drafts[i], plan.nodes or MAX_NODES)
        return drafts


def depth_of(draft: Draft, least: float) -> int:
    """Levels of a draft's deepest candidate whose score is at least ``least``."""
    depths: list[int] = []
    for parent in draft.parents:
        depths.append(1 + (depths[parent] if parent >= 0 else 0))
    return max((d for d, score in zip(depths, draft.scores, strict=True) if score >= least), default=0)


def merge(one: Draft, other: Draft, most: int) -> Draft:
    """The ``most`` best candidates of two drafts, each path once.

    A candidate that both propose fails where both are wrong: their probabilities of it given its parent are joined as those
    of independent causes. What a draft says of it besides, it says relative to its own parent.
    """
    tokens: list[int] = []
    parents: list[int] = []
    misses: list[float] = []  # probability that a candidate is wrong, given that its parent is right
    nodes: dict[tuple[int, int], int] = {}
    for draft in (one, other):
        place: list[int] = []
        for token, old, score in zip(draft.tokens, draft.parents, draft.scores, strict=True):
            parent, above = (place[old], draft.scores[old]) if old >= 0 else (-1, 0.0)
            node = nodes.setdefault((parent, token), len(tokens))
            if node == len(tokens):
                tokens.append(token)
                parents.append(parent)
                misses.append(1.0)
            misses[node] *= -math.expm1(min(score - above, 0.0))
            place.append(node)
    scores: list[float] = []
    for parent, miss in zip(parents, misses, strict=True):
        scores.append((scores[parent] if parent >= 0 else 0.0) + math.log1p(-min(miss, 1 - 1e-9)))
    return best_first(tokens, parents, scores, most)
