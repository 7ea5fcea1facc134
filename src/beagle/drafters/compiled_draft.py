"""A whole draft of one context on the CPU: levels by compiled graphs, all between them in plain Python.

A level of some candidates takes the CPU a millisecond, and ``grow``'s small tensors as much again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from beagle.drafters.base import Draft, TreePlan, best_first
from beagle.drafters.context import HeadContext, write_unread
from beagle.drafters.grow import least_score
from beagle.limits import MAX_NODES

Graph = Callable[[list[Tensor]], list[Tensor]]  # a ``LevelOutput``, as a list
MOST_UNREAD = 64  # slots whose keys the root's graph writes; large products make more at once


class CompiledDraft:
    """Implements ``WholeDrafts`` with the graphs of one head."""

    def __init__(self, draft_vocab: Tensor, root: Graph, root_appends: bool, below: Graph, appends: bool) -> None:
        """
        Args:
            draft_vocab: ``[draft vocabulary]`` draft id -> target id.
            root: the root's level, see ``compiled``.
            root_appends: whether its node writes a key.
            below: a level below, of 2 nodes or more.
            appends: whether its nodes write keys.
        """
        self._vocabulary, self._draft_vocab = draft_vocab, draft_vocab.tolist()
        self._root, self._root_appends = root, root_appends
        self._below, self._appends = below, appends
        self._numbers = torch.arange(0)

    def vocabulary(self, context: HeadContext) -> Tensor:
        return self._vocabulary

    def __call__(
        self,
        context: HeadContext,
        root: int,
        plan: TreePlan,
        min_expected_tokens: float = 0.0,
        noise: Tensor | None = None,
    ) -> Draft | None:
        if plan.kind == "static":
            return None
        if sum(len(tokens) for tokens, _ in context.unread) > MOST_UNREAD:
            write_unread([context])
        unread = sum(len(tokens) for tokens, _ in context.unread)
        context.reserve(context.length + 2 + plan.depth * max(plan.width, 2))
        self._number(context.cache.shape[2])
        width, least, known = plan.width, least_score(min_expected_tokens), context.keys + unread
        states, logits, sums = self._run_root(context, root, unread)
        appended = int(self._root_appends)
        seen = [list(range(appended))]  # appended keys that each node of the level sees
        nodes, scores = [-1], [0.0]  # of the level: candidates, cumulative log-probabilities
        draft = Draft([], [], [])
        for level in range(1, plan.depth + 1):
            first, children = len(draft.tokens), min(width, logits.shape[1])
            if noise is not None:
                logits = logits + noise[0, level - 1]
                sums = logits.logsumexp(-1, keepdim=True)
            best, index = logits.topk(children, dim=-1)
            rows = zip(best.tolist(), index.tolist(), sums.flatten().tolist(), scores, nodes, strict=False)
            for logit, tokens, total, score, node in rows:
                # rounding may put the log of a probability near 1 above 0, and a child before its parent
                draft.scores.extend(score + min(x - total, 0.0) for x in logit)
                draft.tokens.extend(self._draft_vocab[token] for token in tokens)
                draft.parents.extend([node] * children)
            if level == plan.depth:
                break
            nodes = sorted(range(first, len(draft.tokens)), key=lambda i: -draft.scores[i])[:width]
            scores = [draft.scores[i] for i in nodes]
            if min_expected_tokens > 0:
                worth = sum(score >= least for score in scores)
                if sum(math.exp(score) for score in scores[:worth]) < min_expected_tokens:
                    break
                nodes, scores = nodes[:worth], scores[:worth]
            parents = [(i - first) // children for i in nodes]
            beam = [*nodes, nodes[0]] if len(nodes) == 1 else nodes  # the graph is of 2 nodes or more
            parents += parents[: len(beam) - len(nodes)]
            seen = [seen[i] for i in parents]
            if self._appends:
                seen = [[*above, appended + i] for i, above in enumerate(seen)]
            newest = states[:, torch.tensor(parents)]
            tokens = [draft.tokens[i] for i in beam]
            states, logits, sums = self._run_below(context, tokens, newest, level, known, appended, seen)
            appended += len(beam) if self._appends else 0
        return best_first(draft.tokens, draft.parents, draft.scores, plan.nodes or MAX_NODES, least)

    def _run_root(self, context: HeadContext, root: int, unread: int) -> list[Tensor]:
        """The root's level; what is unread is read."""
        tokens = [token for own, _ in context.unread for token in own]
        states = [state for _, state in context.unread]
        padding = max(0, 2 - unread)  # the graph is of 2 slots or more; what is too many is written over
        tokens += [root] * padding
        states += [context.newest] * padding
        begin, end = context.keys, context.keys + len(tokens)
        known = context.keys + unread
        appended = int(self._root_appends)
        embeddings = context.embed(torch.tensor([*tokens, root]))
        slot = context.length - 1
        inputs = [
            embeddings[:-1],
            torch.cat(states),
            *context.rotations.span(begin, end),
            self._numbers[begin:end],
            embeddings[None, -1:],
            context.newest[None],
            *(part[None] for part in context.rotations.span(slot, slot + 1)),
            *context.cache,
            self._numbers[known : known + appended],
            embeddings.new_zeros(1, known + appended),
        ]
        out = self._root(inputs)
        context.keys, context.unread = known, []
        return out

    def _run_below(
        self,
        context: HeadContext,
        tokens: list[int],
        newest: Tensor,
        level: int,
        known: int,
        appended: int,
        seen: list[list[int]],
    ) -> list[Tensor]:
        """A level below.

        Args:
            context: whose draft it is.
            tokens: of the nodes.
            newest: the state before each, ``[1, nodes, hidden]``.
            level: of the nodes' parents; the root's is 1.
            known: slots of the context.
            appended: keys of drafted nodes behind them.
            seen: which of the appended keys each node sees, its own among them.
        """
        more = len(tokens) if self._appends else 0
        least = torch.finfo(newest.dtype).min
        own = [[least] * (appended + more) for _ in tokens]
        for row, visible in zip(own, seen, strict=True):
            for i in visible:
                row[i] = 0.0
        mask = newest.new_zeros(len(tokens), known + appended + more)
        mask[:, known:] = torch.tensor(own, dtype=mask.dtype)
        slot, at = context.length - 1 + level, known + appended
        inputs = [
            context.embed(torch.tensor([tokens])),
            newest,
            *(part[None] for part in context.rotations.span(slot, slot + 1)),
            *context.cache,
            self._numbers[at : at + more],
            mask,
        ]
        return self._below(inputs)

    def _number(self, end: int) -> None:
        if len(self._numbers) < end:
            self._numbers = torch.arange(2 * end)
