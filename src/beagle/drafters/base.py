"""What the decoding loop asks of anything that proposes tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TreePlan:
    """How a tree of candidates is grown (paper §3, EAGLE-2).

    Attributes:
        kind: ``chain`` (one candidate a level), ``static`` (a fixed shape) or
            ``dynamic`` (expand the best ``top_k`` by cumulative log-probability, then re-rank).
        depth: drafted levels.
        top_k: candidates that each level expands.
        nodes: candidates kept for verification, besides the root; None: whatever the measured
            costs of this machine make worth while, step by step.
    """

    kind: Literal["chain", "static", "dynamic"] = "dynamic"
    depth: int = 5
    top_k: int = 8
    nodes: int | None = None

    def __post_init__(self) -> None:
        if min(self.depth, self.top_k, self.nodes or 1) < 1:
            raise ValueError("depth, top_k and nodes of a tree are at least 1")

    @property
    def width(self) -> int:
        """Most candidates expanded a level."""
        return 1 if self.kind == "chain" else self.top_k


# Static tree: children kept per rank path; the k-th best child of a node at rank path r is kept if
# the path (r, k) is here. Wide at the top, a chain at the bottom, 25 candidates.
STATIC_PATHS: frozenset[tuple[int, ...]] = frozenset(
    [(i,) for i in range(6)]
    + [(0, i) for i in range(5)] + [(1, i) for i in range(3)] + [(2, 0), (3, 0)]
    + [(0, 0, i) for i in range(3)] + [(0, 1, 0), (1, 0, 0)]
    + [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0)]
    + [(0, 0, 0, 0, 0)]
)  # fmt: skip


HOPE = 0.15  # of ``min_gain``, which counts a level and a row twice


@dataclass(frozen=True)
class Draft:
    """Candidates, best first; a prefix of any length is a tree (parents stand before children).

    Attributes:
        tokens: target token ids. parents: index of each candidate's parent, -1 for the root.
        scores: cumulative log-probability of each candidate, descending where the plan is dynamic.
    """

    tokens: list[int]
    parents: list[int]
    scores: list[float]

    def first(self, n: int) -> Draft:
        """The best ``n`` candidates."""
        return Draft(self.tokens[:n], self.parents[:n], self.scores[:n])


def cut(draft: Draft, depth: int, most: int) -> Draft:
    """The best ``most`` candidates among those at most ``depth`` levels below the root."""
    depths = [0]  # of the root, then of each candidate
    for parent in draft.parents:
        depths.append(depths[parent + 1] + 1)
    if max(depths) <= depth:
        return draft.first(most)
    kept = [i for i in range(len(draft.tokens)) if depths[i + 1] <= depth]
    return best_first(
        [draft.tokens[i] for i in kept],
        [kept.index(draft.parents[i]) if draft.parents[i] >= 0 else -1 for i in kept],
        [draft.scores[i] for i in kept],
        most,
    )


def best_first(
    tokens: list[int], parents: list[int], scores: list[float], most: int, least: float = -math.inf
) -> Draft:
    """The ``most`` best candidates of a tree, of scores of ``least`` or more.

    A stable sort keeps parents before children of equal score.
    """
    order = sorted((i for i, score in enumerate(scores) if score >= least), key=lambda i: -scores[i])[:most]
    place = {-1: -1} | {old: new for new, old in enumerate(order)}
    return Draft([tokens[i] for i in order], [place[parents[i]] for i in order], [scores[i] for i in order])


class Drafter(Protocol):
    """Proposes continuations of a context that the target has run."""

    def fork(self) -> Drafter:
        """A drafter of the same weights for another context at the same time; ``begin`` comes first."""

    def begin(self, tokens: list[int], states: Tensor) -> None:
        """A new context: its tokens and their true states ``[n, hidden]``."""

    def extend(self, tokens: list[int], states: Tensor) -> None:
        """The target has run ``tokens`` too; true states ``[n, hidden]``."""

    def draft(self, root: int, plan: TreePlan, min_gain: float = 0.0) -> Draft:
        """Candidates for what follows ``root``, the newest token, which the target has not run.

        ``min_gain``: expected accepted tokens below which another level is not worth its time (above 1, none is); a
        candidate with less than ``HOPE`` of it is not worth a row, and nothing that follows it is.
        """

    # for several contexts at once; a drafter that has something to share among them does better

    def draft_rows(self, rows: Sequence[Any], roots: list[int], plan: TreePlan, min_gain: float = 0.0) -> list[Draft]:
        """``draft`` for each of some forks."""
        return [row.draft(root, plan, min_gain) for row, root in zip(rows, roots, strict=True)]
