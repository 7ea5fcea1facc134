"""Accepting a drafted tree: from the root along the target's own choices, as far as the draft has them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor

from beagle.decoding.sampling import Sampler, choose_all
from beagle.drafters.base import Draft
from beagle.targets.linears import tiled


class Walk:
    """The way through a verified tree.

    The target's choice at a node is what plain decoding would have chosen there; where a child
    carries that token the walk goes on, else the token is the bonus. Deterministic candidates are
    so verified losslessly, greedy or sampled.

    Attributes:
        path: the accepted nodes, the root first.
        chosen: the tokens chosen at each of them.
        active: whether ``path[-1]`` still has no token.
        ended: whether the last token ends the answer.
        error: what went wrong at ``path[-1]``, if anything.
    """

    def __init__(self, draft: Draft, sampler: Sampler, *, first: int, position: int, left: int) -> None:
        """
        Args:
            first: index of the root's logits among those of the pass.
            left: most tokens to choose.
        """
        self.path: list[int] = [0]
        self.chosen: list[int] = []
        self.active = True
        self.ended = False
        self.error: Exception | None = None
        self.sampler = sampler
        self._first, self._position, self._left = first, position, left
        self._children: dict[tuple[int, int], int] = {}
        for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True), 1):
            self._children.setdefault((parent + 1, token), node)

    @property
    def index(self) -> int:
        """Of the logits that the next token is chosen from."""
        return self._first + self.path[-1]

    @property
    def position(self) -> int:
        """Of the answer, which the next token takes."""
        return self._position + len(self.chosen)

    def take(self, token: int) -> None:
        """The target chooses ``token`` at ``path[-1]``."""
        self.chosen.append(token)
        child = self._children.get((self.path[-1], token))
        self.ended = self.sampler.ended(token)
        self.active = child is not None and len(self.chosen) < self._left and not self.ended
        if child is not None and self.active:
            self.path.append(child)

    def fail(self, error: Exception) -> None:
        """No more tokens: choosing one raised ``error``."""
        self.error, self.active = error, False


@dataclass(frozen=True)
class Verdict:
    """What the target says of the nodes of a pass.

    Attributes:
        logits: ``[tokens, vocabulary]``; None where their largest ones are all that is needed.
        likeliest: the largest logit of each node and its token, where they were asked for.
    """

    logits: Tensor | None
    likeliest: tuple[list[float], list[int]] | None = None


def accept(walks: Sequence[Walk], verdict: Verdict) -> None:
    """Walk all trees of a pass to their ends, side by side. What goes wrong in one walk ends that walk alone."""
    logits, likeliest = verdict.logits, verdict.likeliest
    greedy = [walk for walk in walks if walk.sampler.greedy]
    if likeliest is None and logits is not None and greedy and (len(walks) > 1 or logits.is_cuda):
        values, tokens = tiled.largest(logits)  # at once; else what is asked for
        likeliest = values.tolist(), tokens.tolist()
    if likeliest is not None:
        _accept_greedy(greedy, *likeliest)
    while active := [walk for walk in walks if walk.active]:
        assert logits is not None
        for walk, token in zip(active, _choose_together(active, logits), strict=True):
            try:
                walk.take(walk.sampler.choose(logits[walk.index], walk.position) if token is None else token)
            except Exception as error:
                walk.fail(error)


def _choose_together(walks: Sequence[Walk], logits: Tensor) -> Sequence[int | None]:
    """The next token of each walk; None where each is to choose alone, as if there is one, or one of them fails."""
    if len(walks) > 1:
        samplers, positions = [walk.sampler for walk in walks], [walk.position for walk in walks]
        with suppress(Exception):
            return choose_all(samplers, logits[[walk.index for walk in walks]], positions)
    return [None] * len(walks)


def _accept_greedy(walks: Sequence[Walk], largest: list[float], tokens: list[int]) -> None:
    for walk in walks:
        while walk.active:
            try:
                walk.sampler.check(largest[walk.index])
                walk.take(tokens[walk.index])
            except Exception as error:
                walk.fail(error)
