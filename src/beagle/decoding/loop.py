"""The decoding loop: draft a tree, verify it in one pass, accept a path, commit.

Greedy, sampling, chain, static and dynamic trees, and plain decoding (a tree of the root alone)
are this one loop with different parts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from beagle.decoding.costs import Costs
from beagle.decoding.sampling import Sampler
from beagle.decoding.stats import Stats
from beagle.drafters.base import Draft, Drafter, TreePlan
from beagle.errors import BeagleError
from beagle.limits import MAX_NODES
from beagle.targets.exact import EXACT_BLOCK, EXACT_ROWS
from beagle.targets.target import Target, TreeShape

FIRST_SLOTS = 4096  # of a cache behind its prompt, before it grows: a long limit need not be met
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Emitted:
    """Tokens of one iteration.

    Attributes:
        tokens: the first ``len(tokens) - 1`` were drafted, the last is the target's own.
        drafted: how many of the tokens were drafted.
        finish_reason: the answer is complete: its last token ends it, or it has all tokens it may have.
    """

    tokens: list[int]
    drafted: int
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Step:
    """What one iteration verified, for tests and for whoever wants to look inside.

    ``states[path]`` are the true states that the iteration's tokens were chosen from. Prefill is an
    iteration too: its tree is the prompt's last token alone.
    """

    tokens: list[int]
    shape: TreeShape
    states: Tensor
    path: list[int]


def decode(
    target: Target,
    ids: list[int],
    *,
    max_new_tokens: int,
    sampler: Sampler,
    stats: Stats,
    drafter: Drafter | None = None,
    plan: TreePlan | None = None,
    costs: Costs | None = None,
    exact: bool = False,
    watch: Callable[[Step], None] | None = None,
) -> Generator[Emitted, None, None]:
    """Answer ``ids``, yielding the tokens of each iteration until the sampler or the limit ends it.

    Args:
        drafter: None is plain decoding. plan: shape of the tree.
        costs: measured times that choose the tree's size where the plan leaves it open.
        exact: shape-stable passes, bit-equal to plain decoding in this mode.
        watch: called with each iteration before its tokens are yielded.
    Raises:
        BeagleError: the prompt doesn't fit into the target's context, or its cache into memory; or the
            logits are no numbers.
    """
    plan = plan or TreePlan()
    max_new_tokens = room(target, ids, max_new_tokens)
    most = EXACT_ROWS - 1 if exact else MAX_NODES
    slack = EXACT_ROWS if exact else most + 1
    keys = -(-(len(ids) + max_new_tokens + slack) // EXACT_BLOCK) * EXACT_BLOCK
    cache = target.new_cache(1, keys if exact else min(keys, len(ids) + FIRST_SLOTS))

    clock = time.perf_counter
    began = clock()
    prompt = torch.tensor([ids], device=target.device)
    states = target.prefill(prompt, cache)[0]
    root = sampler.choose(target.logits(states[-1]), 0)
    stats.tokens += 1
    context = drafter.context() if drafter is not None else None
    if context is not None:
        context.extend(ids, states)
    if watch is not None:
        watch(Step([ids[-1]], TreeShape([-1]), states[-1:], [0]))
    stats.prefill_seconds += clock() - began
    over = sampler.ended(root)
    made = 1
    yield Emitted([root], 0, finish_reason(over, max_new_tokens - made))

    while made < max_new_tokens and not over:
        began = clock()
        draft = Draft([], [], [])
        left = max_new_tokens - made
        if drafter is not None and context is not None and left > 1:
            reach = replace(plan, depth=min(plan.depth, left - 1))  # never past the limit or the context
            (draft,) = drafter.draft([context], [root], reach, costs.min_gain() if costs else 0.0)
            size = min(len(draft.tokens), most)
            if plan.sized_by_costs and costs is not None:
                size = costs.best_size(draft.scores[:size])
            draft = draft.first(size)
        drafted_at = clock()

        shape = draft.tree()
        cache = target.with_room(cache, cache.length + len(shape.parents))
        tokens = torch.tensor([root, *draft.tokens], device=target.device)
        states = target.exact.verify(cache, tokens, shape, keys) if exact else target.verify(cache, tokens, shape)
        logits = target.exact.logits(states) if exact else target.logits(states)
        if target.device.type == "cuda":
            torch.cuda.synchronize(target.device)  # acceptance waits for the logits anyhow: time them where they belong
        verified_at = clock()

        path, chosen, over = accept(logits, draft, sampler, made, left)
        cache.compact(path)
        if context is not None:
            context.extend([root, *chosen[:-1]], states[path])
        accepted_at = clock()
        if watch is not None:
            watch(Step(tokens.tolist(), shape, states, path))
        made += len(chosen)
        root = chosen[-1]
        now = clock()
        stats.tokens += len(chosen)
        stats.passed_tokens += len(chosen)
        stats.drafted += len(draft.tokens)
        stats.note_pass(len(path) - 1)
        stats.draft_seconds += drafted_at - began
        stats.verify_seconds += verified_at - drafted_at
        stats.accept_seconds += accepted_at - verified_at
        stats.decode_seconds += now - began
        yield Emitted(chosen, len(path) - 1, finish_reason(over, max_new_tokens - made))


def finish_reason(over: bool, left: int) -> FinishReason | None:
    """
    Args:
        over: the last token ends the answer.
        left: how many tokens may follow.
    """
    return "stop" if over else None if left else "length"


def room(target: Target, ids: list[int], max_new_tokens: int, name: str = "the prompt") -> int:
    """``max_new_tokens``, or what the target's context has left behind the prompt.

    Raises:
        BeagleError: nothing is left; the prompt is called by its ``name``.
    """
    limit = target.context_limit
    if len(ids) >= limit:
        raise BeagleError(f"{name} has {len(ids)} tokens, the context of {target.name} {limit}; shorten the prompt")
    if max_new_tokens < 1:
        raise BeagleError("max_new_tokens must be at least 1")
    if target.context_ends and len(ids) + max_new_tokens > limit:
        raise BeagleError(
            f"{name} and its answer may take {len(ids) + max_new_tokens} tokens, {target.name} ends at {limit}, since "
            f"{target.context_ends}; lower max_new_tokens to {limit - len(ids)}"
        )
    return min(max_new_tokens, limit - len(ids))


def accept(
    logits: Tensor, draft: Draft, sampler: Sampler, position: int, left: int
) -> tuple[list[int], list[int], bool]:
    """Walk from the root along the target's own choices while the draft has them.

    Args:
        logits: ``[nodes, vocabulary]``, the root's first.
    Returns:
        The accepted nodes (the root first), the tokens chosen at each of them, and whether the last ends the answer.
    """
    walk = Walk(draft, sampler.ended, left)
    if sampler.greedy and logits.is_cuda:  # one round trip; elsewhere only what the walk asks for
        greedy(walk, *best_of(logits), sampler)
    while walk.goes_on:
        walk.take(sampler.choose(logits[walk.path[-1]], position + len(walk.chosen)))
    return walk.path, walk.chosen, walk.over


def best_of(logits: Tensor) -> tuple[list[int], list[float]]:
    """The likeliest token at each node of ``[nodes, vocabulary]``, and its logit."""
    largest, tokens = logits.max(-1)
    return tokens.tolist(), largest.tolist()


def greedy(walk: Walk, tokens: list[int], largest: list[float], sampler: Sampler, first: int = 0) -> None:
    """Walk to the end of the way along the likeliest tokens (see ``best_of``), the root's at ``first``."""
    while walk.goes_on:
        node = first + walk.path[-1]
        sampler.check(largest[node])
        walk.take(tokens[node])


class Walk:
    """The way through a verified tree, from the root along the target's own choices.

    The target's choice at a node is what plain decoding would have chosen there; where a child
    carries that token the walk goes on, else the token is the bonus. Deterministic candidates are
    so verified losslessly, greedy or sampled.

    Attributes:
        path: the accepted nodes, the root first. chosen: the tokens chosen at each of them.
        goes_on: whether ``path[-1]`` still has no token. over: whether the last token ends the answer.
    """

    def __init__(self, draft: Draft, ended: Callable[[int], bool], left: int) -> None:
        """
        Args:
            ended: takes each chosen token, once and in order; whether it ends the answer. left: most tokens to choose.
        """
        self.path: list[int] = [0]
        self.chosen: list[int] = []
        self.goes_on = True
        self.over = False
        self._ended, self._left = ended, left
        self._children: dict[tuple[int, int], int] = {}
        for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True), 1):
            self._children.setdefault((parent + 1, token), node)

    def take(self, token: int) -> None:
        """The target chooses ``token`` at ``path[-1]``."""
        self.chosen.append(token)
        child = self._children.get((self.path[-1], token))
        self.over = self._ended(token)
        self.goes_on = child is not None and len(self.chosen) < self._left and not self.over
        if child is not None and self.goes_on:
            self.path.append(child)
