"""One answer on its way: what was asked, what has come so far, and what it has cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from beagle.decoding.sampling import Sampler
from beagle.decoding.stats import Stats
from beagle.drafters.base import DraftContext
from beagle.errors import BeagleError
from beagle.targets.cache import KVCache
from beagle.targets.shape import TreeShape
from beagle.targets.target import Target

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Emitted:
    """Tokens of one iteration.

    Attributes:
        tokens: the first ``drafted`` were drafted, the last is the target's own. Empty where the answer has failed.
        drafted: how many of the tokens were drafted.
        finish_reason: the answer is complete: its last token ends it, or it has all tokens it may have.
    """

    tokens: list[int]
    drafted: int
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Step:
    """What one iteration verified, for whoever wants to look inside.

    Prefill is an iteration too: its tree is the prompt's last token alone.

    Attributes:
        tokens: of the tree, the root first.
        shape: of the tree.
        states: hidden states ``[nodes, hidden]``.
        logits: ``[nodes, vocabulary]``.
        path: the accepted nodes, whose logits the iteration's tokens were chosen from.
    """

    tokens: list[int]
    shape: TreeShape
    states: Tensor
    logits: Tensor
    path: list[int]


@dataclass(eq=False)
class Sequence:
    """One answer: waiting, live, or ended.

    Attributes:
        ids: the prompt.
        max_new_tokens: at least 1; prompt and answer fit into the target's context (see ``room``).
        sampler: chooses the tokens.
        drafts: False decodes this answer plainly.
        watch: called with each iteration before its tokens are emitted.
        stats: the time of what several answers share is divided equally among them.
        tokens: the answer so far.
        states: hidden states of the prompt and of all tokens but the last, ``[n, hidden]`` piece by piece, where the
            decoder keeps them.
        cached_tokens: first tokens of the prompt that were not run, since their keys were there.
        context: what the drafter remembers, while the answer is live.
        cache: keys and values of the prompt, until all of it is run.
        ended: whether the answer has left its decoder.
        error: what ended it, if it has failed.
    """

    ids: list[int]
    max_new_tokens: int
    sampler: Sampler
    drafts: bool = True
    watch: Callable[[Step], None] | None = None
    stats: Stats = field(default_factory=Stats)
    tokens: list[int] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    cached_tokens: int = 0
    context: DraftContext | None = None
    cache: KVCache | None = None
    ended: bool = False
    error: Exception | None = None

    @property
    def left(self) -> int:
        return self.max_new_tokens - len(self.tokens)


class SequenceError(Exception):
    """What went wrong in one of several sequences."""

    def __init__(self, sequence: Sequence, error: Exception) -> None:
        self.sequence, self.error = sequence, error


def room(target: Target, ids: list[int], max_new_tokens: int, name: str = "the prompt") -> int:
    """``max_new_tokens``, or what the target's context has left behind the prompt.

    Raises:
        BeagleError: nothing is left; the prompt is called by its ``name``.
    """
    limit = target.context_limit
    if len(ids) >= limit:
        raise BeagleError(f"{name} has {len(ids)} tokens, the context of {target.name} {limit}; shorten the prompt")
    if target.context_ends and len(ids) + max_new_tokens > limit:
        raise BeagleError(
            f"{name} and its answer may take {len(ids) + max_new_tokens} tokens, {target.name} ends at {limit}, since "
            f"{target.context_ends}; lower max_new_tokens to {limit - len(ids)}"
        )
    return min(max_new_tokens, limit - len(ids))
