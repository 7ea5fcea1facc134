"""Growing a tree of candidates level by level: chain, static and dynamic (paper §3, EAGLE-2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from beagle.drafters.base import NODE_GAIN_SHARE, STATIC_PATHS, Draft, TreePlan, best_first
from beagle.drafters.block import Block, Rotation, Rotations
from beagle.drafters.context import HeadContext
from beagle.limits import MAX_NODES

LevelOutput = tuple[Tensor, Tensor, Tensor]


class KeyStore(Protocol):
    """Where the keys lie that growing trees read, and where drafted nodes write theirs behind them."""

    def write(self, k: Tensor, v: Tensor, at: int) -> None:
        """Store a key and value of each node, ``[contexts, cached_heads, beam, head_dim]``, ``at`` nodes in."""

    def attend(self, head: Block, q: Tensor, heads: slice, mask: Tensor) -> Tensor:
        """Attention of ``q [contexts, heads, beam, head_dim]``.

        Args:
            head: whose attention it is.
            q: the nodes' queries.
            heads: which of the cached heads they meet.
            mask: additive ``[contexts, beam, appended]``: which of the drafted nodes' keys each node sees.
        """

    def keep(self, contexts: list[int]) -> None:
        """Only these go on."""


class ContextKeys:
    """The keys of several contexts, in their own caches."""

    def __init__(self, contexts: Sequence[HeadContext]) -> None:
        self.contexts = list(contexts)

    def write(self, k: Tensor, v: Tensor, at: int) -> None:
        for context, key, value in zip(self.contexts, k, v, strict=True):
            context.write(key, value, context.keys + at)

    def attend(self, head: Block, q: Tensor, heads: slice, mask: Tensor) -> Tensor:
        out = []
        for context, query, own in zip(self.contexts, q, mask, strict=True):
            keys, values = context.cache[:, None, heads, : context.keys + own.shape[1]]
            whole = None
            if own.shape[1]:
                whole = torch.cat([own.new_zeros(len(own), context.keys), own], dim=1)[None, None]
            out.append(head.attend(query[None], keys, values, whole))
        return torch.cat(out)

    def keep(self, contexts: list[int]) -> None:
        self.contexts = [self.contexts[i] for i in contexts]


class Beams:
    """The trees of several contexts while they grow, level by level: what the nodes of a level see.

    Attributes:
        level: the level under way, the root's being 1.
        head: the draft head.
        keys: where the keys lie.
        mask: additive ``[contexts, beam, appended]``: which of the appended keys each node sees.
    """

    def __init__(self, head: Block, keys: KeyStore, rotation: Rotation) -> None:
        """
        Args:
            head: the draft head.
            keys: of the contexts.
            rotation: RoPE of the slots at which the levels stand, ``[contexts, 1, depth, head_dim]``.
        """
        self.level = 1
        self.head = head
        self.keys = keys
        self._cos, self._sin = rotation
        self.mask = self._cos.new_zeros(len(self._cos), 1, 0)

    @classmethod
    def of_contexts(
        cls, head: Block, contexts: Sequence[HeadContext], rotations: Rotations, depth: int, width: int
    ) -> Beams:
        """Beams over the contexts' own caches, which get room for ``depth`` levels of ``width`` nodes."""
        for context in contexts:
            context.reserve(context.length + 1 + depth * width)
        slots = [list(range(context.length - 1, context.length - 1 + depth)) for context in contexts]  # one a level
        end = max(context.length for context in contexts) - 1 + depth
        return cls(head, ContextKeys(contexts), rotations(torch.tensor(slots, device=rotations.device), end))

    def rotation(self) -> Rotation:
        """RoPE of the one slot at which all nodes of a context's level stand, ``[contexts, 1, 1, head_dim]``."""
        level = slice(self.level - 1, self.level)
        return self._cos[:, :, level], self._sin[:, :, level]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add a key and value of each node of the beams, ``[contexts, cached_heads, beam, head_dim]``, that only it sees
        among its beam."""
        self.keys.write(k, v, self.mask.shape[2])
        self.see_own(k.shape[2])

    def see_own(self, beam: int) -> None:
        """Each of ``beam`` nodes sees its own appended key from now on."""
        least = torch.finfo(self.mask.dtype).min
        own = torch.full((beam, beam), least, dtype=self.mask.dtype, device=self.mask.device).fill_diagonal_(0.0)
        self.mask = torch.cat([self.mask, own.expand(len(self.mask), -1, -1)], dim=2)

    def attend(self, q: Tensor, heads: slice) -> Tensor:
        """Attention of ``q [contexts, heads, beam, head_dim]`` over the contexts and what nodes see of the rest."""
        return self.keys.attend(self.head, q, heads, self.mask)

    def descend(self, parents: Tensor) -> None:
        """The next level's beams: parents ``[contexts, beam]`` among this level's nodes."""
        if self.mask.shape[2]:
            self.mask = self.mask.gather(1, parents[..., None].expand(-1, -1, self.mask.shape[2]))
        else:
            self.mask = self.mask.new_zeros(*parents.shape, 0)

    def keep(self, contexts: list[int]) -> None:
        """Only these go on."""
        self.keys.keep(contexts)
        self._cos, self._sin, self.mask = self._cos[contexts], self._sin[contexts], self.mask[contexts]


class LevelRunner(Protocol):
    """Computes one level of the trees."""

    def __call__(self, beams: Beams, tokens: Tensor, newest: Tensor) -> LevelOutput:
        """
        Args:
            beams: what the nodes see; appended keys go there.
            tokens: the nodes, ``[contexts, beam]``.
            newest: the state before each, as of ``Block.level``.

        Returns:
            Predicted states ``[contexts, beam, hidden]``; fp32 logits ``[contexts * beam, draft vocabulary]`` and the
            log of the sum of their exponentials ``[contexts * beam, 1]``.
        """


class EagerLevels:
    """Implements ``LevelRunner`` with the head's own modules."""

    def __init__(self, head: Block, embed: Callable[[Tensor], Tensor], logits: Callable[[Tensor], Tensor]) -> None:
        """
        Args:
            head: the draft head.
            embed: the target's embeddings, token ids ``[...]`` -> ``[..., hidden]``.
            logits: of the draft vocabulary, states ``[n, hidden]`` -> ``[n, draft vocabulary]``.
        """
        self.head, self.embed, self.logits = head, embed, logits

    def __call__(self, beams: Beams, tokens: Tensor, newest: Tensor) -> LevelOutput:
        states = self.head.level(beams, self.embed(tokens), newest)
        logits = self.logits(states.flatten(0, 1)).float()
        return states, logits, logits.logsumexp(-1, keepdim=True)


@dataclass(frozen=True)
class Level:
    """Candidates of one level: tokens, cumulative log-probabilities, parents (candidates of the levels
    above), each ``[contexts, candidates]``."""

    contexts: list[int]
    tokens: Tensor
    scores: Tensor
    parents: Tensor


def level_noise(contexts: Sequence[HeadContext], depth: int, draft_vocab: Tensor) -> Tensor | None:
    """Noise of the contexts' next drafts, ``[contexts, depth, draft vocabulary]``; None where no answer is sampled.

    Args:
        contexts: greedy ones among them have no noise.
        depth: levels.
        draft_vocab: token ids of the target, ``[draft vocabulary]``.
    """
    if all(context.noise is None for context in contexts):
        return None
    levels, none = range(1, depth + 1), torch.zeros(1, 1, device=draft_vocab.device).expand(depth, len(draft_vocab))
    found = [none if context.noise is None else context.noise(levels, draft_vocab) for context in contexts]
    return found[0][None] if len(found) == 1 else torch.stack(found)


def least_score(min_expected_tokens: float) -> float:
    """Cumulative log-probability below which a candidate is not worth verifying, see ``Drafter.draft``."""
    return math.log(NODE_GAIN_SHARE * min_expected_tokens) if min_expected_tokens > 0 else -math.inf


def grow(
    run_level: LevelRunner,
    beams: Beams,
    tokens: Tensor,
    newest: Tensor,
    plan: TreePlan,
    min_expected_tokens: float = 0.0,
    noise: Tensor | None = None,
) -> list[Level]:
    """All levels; nothing of it waits for the device, unless the tree is static or ``min_expected_tokens`` above 0.

    Args:
        run_level: computes a level.
        beams: of the contexts, at the root.
        tokens: the roots, ``[contexts, 1]``.
        newest: the state before each, ``[contexts, 1, state_size]``.
        plan: shape of the trees.
        min_expected_tokens: see ``Drafter.draft``.
        noise: added to the logits of each level, ``[contexts, depth, draft vocabulary]``, see ``level_noise``.

    Returns:
        Candidates of each level, all that were scored (paper §3, EAGLE-2's expansion): ``ranked_drafts`` chooses.
    """
    width = plan.width
    found: list[Level] = []
    paths: list[tuple[int, ...]] = []  # rank paths, static trees only
    live = list(range(len(tokens)))  # contexts that still grow
    scores = torch.zeros(len(tokens), 1, device=tokens.device)
    ids = torch.full((len(tokens), 1), -1, device=tokens.device)  # candidate index of each beam node
    total = 0
    least = least_score(min_expected_tokens)
    for level in range(1, plan.depth + 1):
        beams.level = level
        states, logits, sums = run_level(beams, tokens, newest)
        if noise is not None:
            own = noise if len(live) == len(noise) else noise[live]
            logits = (logits.unflatten(0, tokens.shape) + own[:, level - 1 : level]).flatten(0, 1)
            sums = logits.logsumexp(-1, keepdim=True)
        best, index = logits.topk(min(width, logits.shape[-1]), dim=-1)  # [contexts * beam, width]
        # rounding may put the log of a probability near 1 above 0, and a child before its parent
        log_probs = (best - sums).clamp(max=0.0).unflatten(0, tokens.shape)
        children = best.shape[1]
        level_scores = (scores[..., None] + log_probs).flatten(1)
        level_tokens = beams.head.draft_vocab[index].view(len(live), -1)
        level_parents = ids.repeat_interleave(children, dim=1)
        keep: Tensor | None = None
        if plan.kind == "static":  # the same places in every context
            above = [() if i < 0 else paths[i] for i in level_parents[0].tolist()]
            ranked = [(*path, i % children) for i, path in enumerate(above)]
            keep = torch.tensor([i for i, path in enumerate(ranked) if path in STATIC_PATHS], device=tokens.device)
            if not len(keep):
                break
            paths += [ranked[i] for i in keep.tolist()]
            level_scores, level_tokens, level_parents = (
                x[:, keep] for x in (level_scores, level_tokens, level_parents)
            )
        found.append(Level(live, level_tokens, level_scores, level_parents))
        if level == plan.depth:
            break
        if keep is None:
            scores, chosen = level_scores.topk(min(width, level_scores.shape[1]), dim=1)
            if min_expected_tokens > 0:
                worth = int((scores >= least).sum(1).max())
                scores, chosen = scores[:, : max(worth, 2)], chosen[:, : max(worth, 2)]
            parents = chosen // children  # each beam node's parent in the level above
            tokens = level_tokens.gather(1, chosen)
        else:
            scores, tokens = level_scores, level_tokens
            chosen = torch.arange(len(keep), device=tokens.device).expand_as(scores)
            parents = (keep // children).expand_as(scores)
        newest = states.gather(1, parents[..., None].expand(-1, -1, states.shape[2]))
        beams.descend(parents)
        ids = total + chosen
        total += level_tokens.shape[1]
        if min_expected_tokens > 0:
            gains = torch.where(scores >= least, scores.exp(), 0.0).sum(1)
            on = [i for i, gain in enumerate(gains.tolist()) if gain >= min_expected_tokens]
            if not on:
                break
            if len(on) < len(live):
                live = [live[i] for i in on]
                tokens, scores, newest, ids = tokens[on], scores[on], newest[on], ids[on]
                beams.keep(on)
    return found


def ranked_drafts(levels: list[Level], contexts: int, plan: TreePlan, least: float) -> list[Draft]:
    """Each context's candidates with scores of ``least`` or more, best first (static trees keep all, in their order)."""
    tokens = torch.cat([level.tokens.flatten() for level in levels]).tolist()
    scores = torch.cat([level.scores.flatten() for level in levels]).tolist()
    parents = torch.cat([level.parents.flatten() for level in levels]).tolist()
    drafts = [Draft([], [], []) for _ in range(contexts)]
    at = 0
    for level in levels:
        n = level.tokens.shape[1]
        for context in level.contexts:
            drafts[context].tokens.extend(tokens[at : at + n])
            drafts[context].parents.extend(parents[at : at + n])
            drafts[context].scores.extend(scores[at : at + n])
            at += n
    if plan.kind == "static":
        return drafts
    return [best_first(draft.tokens, draft.parents, draft.scores, plan.nodes or MAX_NODES, least) for draft in drafts]
