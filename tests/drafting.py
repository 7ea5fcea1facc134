"""A drafter with a context of its own, for tests that look at one answer at a time."""

from __future__ import annotations

from beagle.drafters.base import Draft, Drafter, TreePlan


class One:
    """What the drafter and its context know is read through it."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.context = drafter.context()

    def begin(self, tokens, states) -> None:
        self.context = self.drafter.context()
        self.context.extend(tokens, states)

    def extend(self, tokens, states) -> None:
        self.context.extend(tokens, states)

    def draft(self, root: int, plan: TreePlan, min_expected_tokens: float = 0.0) -> Draft:
        (draft,) = self.drafter.draft([self.context], [root], plan, min_expected_tokens)
        return draft

    def __getattr__(self, name: str):
        return getattr(self.context, name) if hasattr(self.context, name) else getattr(self.drafter, name)


def paths(draft: Draft) -> dict[tuple[int, ...], float]:
    """Scores by the tokens from the root on: candidates of nearly equal scores may change places."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return dict(zip(found, draft.scores, strict=True))
