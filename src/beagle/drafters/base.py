"""What decoding asks of anything that proposes tokens."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from beagle.targets.shape import TreeShape


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

    @property
    def sized_by_costs(self) -> bool:
        """Whether measured costs choose how many candidates are verified."""
        return self.kind == "dynamic" and self.nodes is None

    def as_chain(self) -> TreePlan:
        """The plan of chains that is most like it: whatever is as deep, with one candidate a level."""
        return replace(self, kind="chain" if self.kind == "static" else self.kind, top_k=1)


# Static tree: children kept per rank path; the k-th best child of a node at rank path r is kept if
# the path (r, k) is here. Wide at the top, a chain at the bottom, 25 candidates.
STATIC_PATHS: frozenset[tuple[int, ...]] = frozenset(
    [(i,) for i in range(6)]
    + [(0, i) for i in range(5)] + [(1, i) for i in range(3)] + [(2, 0), (3, 0)]
    + [(0, 0, i) for i in range(3)] + [(0, 1, 0), (1, 0, 0)]
    + [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0)]
    + [(0, 0, 0, 0, 0)]
)  # fmt: skip


NODE_GAIN_SHARE = 0.15  # of ``min_expected_tokens``, below which a candidate is not worth verifying: it counts a level and a node twice


@dataclass(frozen=True)
class Draft:
    """Candidates, best first; a prefix of any length is a tree (parents stand before children).

    Attributes:
        tokens: target token ids.
        parents: index of each candidate's parent, -1 for the root.
        scores: cumulative log-probability of each candidate, descending where the plan is dynamic.
    """

    tokens: list[int]
    parents: list[int]
    scores: list[float]

    def tree(self) -> TreeShape:
        """The shape that is verified: node 0 is the root, node i + 1 is candidate i."""
        from beagle.targets.shape import TreeShape  # takes torch, which plans do without

        return TreeShape([-1, *(parent + 1 for parent in self.parents)])

    def first(self, n: int) -> Draft:
        """The best ``n`` candidates."""
        return Draft(self.tokens[:n], self.parents[:n], self.scores[:n])


def best_chain(draft: Draft) -> Draft:
    """The path of a draft that is worth most: where most of its candidates are expected to be right."""
    worth: list[float] = []
    for parent, score in zip(draft.parents, draft.scores, strict=True):
        worth.append(math.exp(score) + (worth[parent] if parent >= 0 else 0.0))
    path: list[int] = []
    at = max(range(len(worth)), key=worth.__getitem__, default=-1)
    while at >= 0:
        path.append(at)
        at = draft.parents[at]
    path.reverse()
    tokens, scores = [draft.tokens[i] for i in path], [draft.scores[i] for i in path]
    return Draft(tokens, list(range(-1, len(path) - 1)), scores)


def prune(draft: Draft, depth: int, most: int) -> Draft:
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


class LevelNoise(Protocol):
    """What the target's sampler adds to its logits at the positions that a draft's candidates would take."""

    def __call__(self, levels: Sequence[int], tokens: Tensor) -> Tensor:
        """
        Args:
            levels: of the draft, from 1.
            tokens: ids, int64 ``[tokens]``, where the noise is wanted.

        Returns:
            Noise of each token at each level in units of logits, fp32 ``[levels, tokens]``.
        """


class DraftContext(ABC):
    """What a drafter remembers of one answer; it starts empty.

    Attributes:
        noise: of the next draft, where the answer is sampled: a token that wins with it is likely to be
            the target's. A drafter may leave it alone.
    """

    noise: LevelNoise | None = None

    @abstractmethod
    def extend(self, tokens: list[int], states: Tensor) -> None:
        """The target has run ``tokens``, too.

        Args:
            tokens: first the whole prompt, then what each pass accepted.
            states: their hidden states ``[n, hidden]``.
        """


Context = TypeVar("Context", bound=DraftContext)


class Drafter(ABC, Generic[Context]):
    """Proposes continuations of contexts that the target has run.

    What it keeps of an answer lies in the answer's context, so that one drafter serves any number of answers.

    Attributes:
        name: what the cost of a draft depends on; measured costs are kept under it.
    """

    name: str

    @abstractmethod
    def context(self) -> Context:
        """A fresh, empty context."""

    @abstractmethod
    def draft(
        self, contexts: Sequence[Context], roots: list[int], plan: TreePlan, min_expected_tokens: float = 0.0
    ) -> list[Draft]:
        """Candidates for what follows each context.

        Args:
            contexts: of this drafter, each with its prompt.
            roots: the newest token of each, which the target has not run yet.
            plan: shape of the trees.
            min_expected_tokens: expected accepted tokens below which another level is not worth its time (above 1, none is);
                a candidate with less than ``NODE_GAIN_SHARE`` of it is not worth verifying, and nothing that follows it is.

        Returns:
            A draft for each context.
        """
