"""Growing a tree of candidates level by level: chain, static and dynamic (paper §3, EAGLE-2)."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from beagle.drafters.base import HOPE, STATIC_PATHS, Draft, Drafter, TreePlan, best_first
from beagle.drafters.beams import Beams
from beagle.drafters.block import Block, Rotation, Rotations
from beagle.limits import MAX_NODES
from beagle.targets.packing import pack_linears, packed
from beagle.targets.quantize import RowQuantizer, quantize_linears, quantized
from beagle.targets.target import Target

if TYPE_CHECKING:
    from beagle.drafters.captured import CapturedDraft
    from beagle.drafters.compiled import CompiledLevels


class TreeDrafter(Drafter):
    """Implements ``Drafter`` for heads of one block over cached keys; key i is that of slot i.

    When a draft begins the cache holds keys of true states only (paper §4.1), those of the newest made just then:
    where another drafter is sure, none is read. While drafting, each node of the beam may append a key of its own
    behind them, which it and its descendants see; later ones are written over those.

    A subclass says how a context is remembered and how one level is computed.
    """

    head: Block

    def __init__(self, target: Target, head: Block) -> None:
        rows = head.config.draft_vocab_size or target.vocab_size
        weights = sum(parameter.numel() for parameter in head.parameters())
        self.name = f"{head.architecture}, {weights} weights, {rows} tokens"  # what a draft's cost depends on
        if target.quantize:  # in int8 always: a draft is made of small passes, where it is the fastest
            quantize_linears(head, "int8")
        pack_linears(head)
        self.head = head
        self.embed = target.embed
        self.device = target.device
        trimmed = head.config.draft_vocab_size is not None
        self.lm_head, bias = target.head_rows(head.draft_vocab if trimmed else None)
        whole = quantized(self.lm_head, bias, "int8", RowQuantizer()) if target.quantize else None
        self.logits = whole or packed(self.lm_head, bias)
        self.length = 0  # tokens of the context
        self.keys = 0  # of true states, in the cache
        self._unread: list[tuple[list[int], Tensor]] = []  # what the slots behind those are made of
        self.newest = torch.zeros(0, head.config.hidden_size, dtype=self.lm_head.dtype, device=self.device)
        self._cache = torch.zeros(2, head.config.num_kv_heads, 0, head.config.head_dim)
        self.rotations = Rotations(head, self.lm_head.dtype, self.device)
        self.compiled: CompiledLevels | None = None
        self.captured: CapturedDraft | None = None

    def use(self, compiled: CompiledLevels) -> None:
        """Let the levels of one context's tree be computed by compiled graphs from now on."""
        self.compiled = compiled
        self.name += ", compiled"

    @abstractmethod
    def _known(self, tokens: list[int], states: Tensor) -> tuple[list[int], Tensor]:
        """What the next slots are made of, now that the target has run ``tokens`` too.

        Args:
            states: true states ``[n, hidden]`` of the tokens; ``self.newest`` is the state before them.
        Returns:
            A token and a state ``[m, hidden]`` for each slot that can be written.
        """

    @abstractmethod
    def _remember(self, tokens: Tensor, states: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Keys and values ``[kv_heads, m, head_dim]`` of such slots, of several contexts end to end."""

    @abstractmethod
    def _level(self, beams: Beams, tokens: Tensor, newest: Tensor) -> Tensor:
        """One level of the trees.

        Args:
            tokens: ``[contexts, beam]``, the nodes. newest: ``[contexts, beam, hidden]``, the state before each.
        Returns:
            Predicted states ``[contexts, beam, hidden]``.
        """

    def fork(self) -> TreeDrafter:
        return copy.copy(self)

    def begin(self, tokens: list[int], states: Tensor) -> None:
        self.length = self.keys = 0
        self._unread = []
        self._cache = self._cache[:, :, :0]  # fresh: forks must not share it
        self.newest = states[:0]
        self.extend(tokens, states)
        self._catch_up([self])

    def extend(self, tokens: list[int], states: Tensor) -> None:
        self._unread.append(self._known(tokens, states))
        self.length += len(tokens)
        self.newest = states[-1:]

    @torch.no_grad()
    def _catch_up(self, rows: Sequence[Self]) -> None:
        """Write the keys that the rows' next draft reads and the cache lacks."""
        tokens: list[int] = []
        states: list[Tensor] = []
        slots: list[int] = []
        counts: list[int] = []
        for row in rows:
            known = [token for own, _ in row._unread for token in own]
            tokens += known
            states += [state for _, state in row._unread]
            slots += range(row.keys, row.keys + len(known))
            counts.append(len(known))
            row._unread = []
            row._reserve(row.length)
        if not tokens:
            return
        index = torch.tensor([tokens, slots], device=self.device)
        k, v = self._remember(index[0], torch.cat(states), self.rotations(index[1], max(slots) + 1))
        for row, key, value, n in zip(rows, k.split(counts, 1), v.split(counts, 1), counts, strict=True):
            row._write(key, value, row.keys)
            row.keys += n

    def draft(self, root: int, plan: TreePlan, min_gain: float = 0.0) -> Draft:
        return self.draft_rows([self], [root], plan, min_gain)[0]

    @torch.no_grad()
    def draft_rows(self, rows: Sequence[Self], roots: list[int], plan: TreePlan, min_gain: float = 0.0) -> list[Draft]:
        if min_gain > 1 and len(rows) > 1:  # of one context it may be a busy hour's measurement
            return [Draft([], [], []) for _ in rows]
        least = math.log(HOPE * min_gain) if min_gain > 0 else -math.inf
        self._catch_up(rows)
        found = self.captured(rows[0], roots[0], plan) if self.captured is not None and len(rows) == 1 else None
        if found is None:
            beams = Beams(self, rows, plan.depth, max(plan.width, len(STATIC_PATHS)))
            tokens = torch.tensor(roots, device=self.device)[:, None]
            found = self.grow(beams, tokens, torch.stack([row.newest for row in rows]), plan, min_gain)
        return ranked_drafts(found, len(rows), plan, least)

    def grow(self, beams: Beams, tokens: Tensor, newest: Tensor, plan: TreePlan, min_gain: float = 0.0) -> list[Level]:
        """All levels; nothing of it waits for the device, unless the tree is static or ``min_gain`` above 0.

        Args:
            tokens: ``[contexts, 1]``, the roots. newest: ``[contexts, 1, hidden]``, the state before each.
            min_gain: as of ``draft``.
        Returns:
            Candidates of each level, all that were scored (paper §3, EAGLE-2's expansion): ``ranked_drafts`` chooses.
        """
        width = plan.width
        found: list[Level] = []
        paths: list[tuple[int, ...]] = []  # rank paths, static trees only
        live = list(range(len(tokens)))  # contexts that still grow
        scores = torch.zeros(len(tokens), 1, device=self.device)
        ids = torch.full((len(tokens), 1), -1, device=self.device)  # candidate index of each beam node
        total = 0
        least = math.log(HOPE * min_gain) if min_gain > 0 else -math.inf
        for level in range(1, plan.depth + 1):
            beams.level = level
            states, logits, sums = self._computed(beams, tokens, newest)
            best, index = logits.topk(min(width, logits.shape[-1]), dim=-1)  # [contexts * beam, width]
            # rounding may put the log of a chance near 1 above 0, and a child before its parent
            chances = (best - sums).clamp(max=0.0).unflatten(0, tokens.shape)
            children = best.shape[1]
            level_scores = (scores[..., None] + chances).flatten(1)
            level_tokens = self.head.draft_vocab[index].view(len(live), -1)
            level_parents = ids.repeat_interleave(children, dim=1)
            keep: Tensor | None = None
            if plan.kind == "static":  # the same places in every context
                above = [() if i < 0 else paths[i] for i in level_parents[0].tolist()]
                ranked = [(*path, i % children) for i, path in enumerate(above)]
                keep = torch.tensor([i for i, path in enumerate(ranked) if path in STATIC_PATHS], device=self.device)
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
                if min_gain > 0:
                    worth = int((scores >= least).sum(1).max())
                    scores, chosen = scores[:, : max(worth, 2)], chosen[:, : max(worth, 2)]
                parents = chosen // children  # each beam node's parent in the level above
                tokens = level_tokens.gather(1, chosen)
            else:
                scores, tokens = level_scores, level_tokens
                chosen = torch.arange(len(keep), device=self.device).expand_as(scores)
                parents = (keep // children).expand_as(scores)
            newest = states.gather(1, parents[..., None].expand(-1, -1, states.shape[2]))
            beams.descend(parents)
            ids = total + chosen
            total += level_tokens.shape[1]
            if min_gain > 0:
                gains = torch.where(scores >= least, scores.exp(), 0.0).sum(1)
                on = [i for i, gain in enumerate(gains.tolist()) if gain >= min_gain]
                if not on:
                    break
                if len(on) < len(live):
                    live = [live[i] for i in on]
                    tokens, scores, newest, ids = tokens[on], scores[on], newest[on], ids[on]
                    beams.keep(on)
        return found

    def _computed(self, beams: Beams, tokens: Tensor, newest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``_level``, its fp32 logits ``[contexts * beam, vocabulary]`` and the log of the sum of their exponentials."""
        if self.compiled is not None and self.compiled.takes(beams, tokens.shape[1]):
            return self.compiled(beams, self.embed(tokens), newest)
        states = self._level(beams, tokens, newest)
        logits = self.logits(states.flatten(0, 1)).float()
        return states, logits, logits.logsumexp(-1, keepdim=True)

    def _write(self, k: Tensor, v: Tensor, at: int) -> None:
        self._cache[0, :, at : at + k.shape[1]] = k
        self._cache[1, :, at : at + k.shape[1]] = v

    def _reserve(self, capacity: int) -> None:
        """Room for so many keys; what there is grows by doubling."""
        if capacity <= self._cache.shape[2]:
            return
        c = self.head.config
        fresh = torch.zeros(
            2, c.num_kv_heads, max(512, 2 * capacity), c.head_dim, dtype=self.lm_head.dtype, device=self.device
        )
        if self.keys:
            fresh[:, :, : self.keys] = self._cache[:, :, : self.keys]
        self._cache = fresh


@dataclass(frozen=True)
class Level:
    """Candidates of one level: tokens, cumulative log-probabilities, parents (candidates of the levels
    above), each ``[contexts, candidates]``."""

    contexts: list[int]
    tokens: Tensor
    scores: Tensor
    parents: Tensor


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
