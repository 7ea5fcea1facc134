"""A smaller causal LM of the same vocabulary as the drafter (Leviathan et al. 2023, arXiv 2211.17192)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beagle.drafters.base import STATIC_PATHS, Draft, DraftContext, Drafter, TreePlan, best_first
from beagle.errors import BeagleError
from beagle.limits import MAX_NODES
from beagle.targets.loading import load_target
from beagle.targets.shape import TreeShape
from beagle.targets.target import Target

PREFIX = "model:"  # of a ``draft`` that names a model


class SmallModelContext(DraftContext):
    """A KV cache of the small model.

    Between drafts it holds true tokens only; those that the model has not run yet (the target's bonus token,
    the deepest accepted candidate) wait in ``pending`` and share the next draft's first pass.
    """

    def __init__(self, small: Target) -> None:
        self.small = small
        self.cache = small.new_cache(1, 512)
        self.pending: list[int] = []
        self.nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node of the last draft that was run

    def extend(self, tokens: list[int], states: Tensor) -> None:
        if not self.length and self.can_run(tokens):  # the prompt
            self.cache = self.small.with_room(self.cache, len(tokens))
            self.small.prefill(torch.tensor([tokens], device=self.small.device), self.cache)
            return
        path: list[int] = []
        for token in tokens:
            node = self.nodes.get((path[-1] if path else -1, token))
            if node is None:
                break
            path.append(node)
        self.cache.compact(path)
        self.pending += tokens[len(path) :]
        self.nodes = {}  # the other nodes' slots are free again

    @property
    def length(self) -> int:
        """Tokens of the answer so far, the prompt included."""
        return self.cache.length + len(self.pending)

    def can_run(self, tokens: list[int]) -> bool:
        """Whether they fit into this model's own context and embedding table."""
        return self.cache.length + len(tokens) <= self.small.context_limit and max(tokens) < self.small.vocab_size

    def run_root(self, root: int) -> Tensor:
        """Run and commit what is pending, run the root after it: its state ``[1, hidden]``."""
        waiting = len(self.pending)
        tokens = torch.tensor([*self.pending, root], device=self.small.device)
        states = self.small.verify(self.cache, tokens, TreeShape(list(range(-1, waiting))))
        self.cache.compact(list(range(waiting)))
        self.pending = []
        self.nodes = {(-1, root): 0}
        return states[-1:]


class SmallModelDrafter(Drafter[SmallModelContext]):
    """Drafts with a causal LM that has a KV cache for each context."""

    def __init__(self, target: Target, small: Target) -> None:
        refuse_other_vocabulary(target, small.tokenizer, small.name)
        self.small = small
        self.name = f"{PREFIX}{small.name}"
        # embedding tables of one family differ in padding rows: propose no token that the target lacks
        self.vocab_size = min(small.vocab_size, target.vocab_size)

    def context(self) -> SmallModelContext:
        return SmallModelContext(self.small)

    def draft(
        self, contexts: Sequence[SmallModelContext], roots: list[int], plan: TreePlan, min_expected_tokens: float = 0.0
    ) -> list[Draft]:
        return [
            self._draft(context, root, plan, min_expected_tokens) for context, root in zip(contexts, roots, strict=True)
        ]

    def _draft(self, context: SmallModelContext, root: int, plan: TreePlan, min_expected_tokens: float) -> Draft:
        if min_expected_tokens > 1 or not context.can_run([*context.pending, root]):
            return Draft([], [], [])
        if self.small.chains_only:
            plan = plan.as_chain()
        length = context.length
        depth = min(plan.depth, self.small.context_limit - length)
        width = plan.width
        static = plan.kind == "static"
        context.cache = self.small.with_room(context.cache, length + 1 + depth * max(width, len(STATIC_PATHS)))
        # candidates of all levels, flat
        tokens: list[int] = []
        parents: list[int] = []
        scores: list[float] = []
        paths: list[tuple[int, ...]] = []  # ranks, from the root on
        states = context.run_root(root)
        shape = [-1]  # parents of the nodes that were run, the root first
        node_of = {-1: 0}  # candidate -> node
        beam = [-1]
        for level in range(1, depth + 1):
            logits = self.small.logits(states)[:, : self.vocab_size].float()
            if context.noise is not None:
                logits = logits + context.noise([level], torch.arange(self.vocab_size, device=logits.device))
            log_q = F.log_softmax(logits, dim=-1)
            best, index = log_q.topk(min(width, self.vocab_size), dim=-1)  # [beam, width]
            first = len(tokens)
            for parent, gains, choices in zip(beam, best.tolist(), index.tolist(), strict=True):
                path, score = (paths[parent], scores[parent]) if parent >= 0 else ((), 0.0)
                for rank, (gain, token) in enumerate(zip(gains, choices, strict=True)):
                    if static and (*path, rank) not in STATIC_PATHS:
                        continue
                    tokens.append(token)
                    parents.append(parent)
                    scores.append(score + gain)
                    paths.append((*path, rank))
            fresh = range(first, len(tokens))
            beam = list(fresh) if static else heapq.nlargest(width, fresh, key=scores.__getitem__)
            if level == depth or not beam or sum(math.exp(scores[i]) for i in beam) < min_expected_tokens:
                break
            done = len(shape)
            for candidate in beam:
                parent = node_of[parents[candidate]]
                node_of[candidate] = context.nodes[parent, tokens[candidate]] = len(shape)
                shape.append(parent)
            level_tokens = torch.tensor([tokens[i] for i in beam], device=self.small.device)
            states = self.small.verify(context.cache, level_tokens, TreeShape(shape), done)
        if static:
            return Draft(tokens, parents, scores)
        return best_first(tokens, parents, scores, plan.nodes or MAX_NODES)


def load_small(name: str, target: Target, **options: Any) -> SmallModelDrafter:
    """Load a small model as the drafter of ``target``; options as of ``targets.loading.load_target``.

    Raises:
        BeagleError: it can't be loaded, or its vocabulary is not the target's.
    """
    try:
        small = load_target(name, **options)
    except BeagleError as error:
        raise BeagleError(f"draft model '{name}': {error}") from error
    return SmallModelDrafter(target, small)


def refuse_other_vocabulary(target: Target, tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer some token of which is missing in the other one or has another id there."""
    ours, theirs = target.tokenizer.get_vocab(), tokenizer.get_vocab()
    if ours != theirs:
        differ = sum(ours.get(token) != theirs.get(token) for token in ours.keys() | theirs.keys())
        raise BeagleError(
            f"draft model '{name}' has another vocabulary than {target.name} ({differ} tokens differ); "
            "choose a model with the target's own tokenizer"
        )
