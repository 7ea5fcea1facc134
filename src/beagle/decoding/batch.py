"""Decoding many answers at once: the loop's iteration over the rows of a batch, in shared passes.

Each row has a tree, an acceptance and a length of its own. What the rows share are the passes: the
linear layers of the target and of the draft head run once over the tokens of all rows.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from beagle.decoding.costs import Costs
from beagle.decoding.loop import FIRST_SLOTS, Emitted, Walk, best_of, finish_reason, greedy
from beagle.decoding.sampling import Sampler, choose_rows
from beagle.decoding.stats import Stats
from beagle.drafters.base import Draft, DraftContext, Drafter, TreePlan, prune
from beagle.limits import MAX_NODES
from beagle.targets.shape import TreeShape
from beagle.targets.target import Target

PROMPT_TOKENS = 4096  # of prompts that enter together, the shorter ones counted as long as the longest


@dataclass(eq=False)
class Row:
    """One answer, waiting or under way.

    Attributes:
        ids: the prompt. tokens: the answer so far.
        max_new_tokens: at least 1; the prompt and they fit into the batch's slots and the target's context.
        stats: a pass's time is shared equally among its rows, so that the pooled figures of all
            answers are those of the run.
        states: true states of the prompt and of all tokens but the last, ``[n, hidden]`` piece by
            piece, where the batch keeps them.
        context: what the drafter remembers of it. ended: whether the row has left its batch.
    """

    ids: list[int]
    max_new_tokens: int
    sampler: Sampler
    stats: Stats = field(default_factory=Stats)
    tokens: list[int] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    context: DraftContext | None = None
    ended: bool = False

    @property
    def left(self) -> int:
        return self.max_new_tokens - len(self.tokens)


class Batch:
    """Rows that decode together; they enter and leave at any time between two steps.

    The live rows are the first ones of the cache: the last takes the place of one that leaves.
    """

    def __init__(
        self,
        target: Target,
        *,
        rows: int,
        slots: int,
        drafter: Drafter | None = None,
        plan: TreePlan | None = None,
        costs: Costs | None = None,
        keep_states: bool = False,
    ) -> None:
        """
        Args:
            rows: most live rows. slots: most tokens of a prompt and its answer.
            drafter: None is plain decoding. plan: shape of the trees.
            costs: measured times that choose how many candidates share a pass, where the plan leaves it open.
        """
        self.target = target
        self.size = rows
        self.live: list[Row] = []
        self._cache = target.new_cache(rows, min(slots, FIRST_SLOTS) + (MAX_NODES + 1 if drafter else 1))
        self._cache.lengths = [0] * rows
        self._drafter, self._plan, self._costs = drafter, plan or TreePlan(), costs
        self._keep_states = keep_states

    def run(self, waiting: deque[Row]) -> Iterator[tuple[Row, Emitted]]:
        """Decode all that waits, yielding a row's new tokens as they come; ``waiting`` may still grow meanwhile."""
        while waiting or self.live:
            free = self.size - len(self.live)
            if waiting and free >= max(1, self.size // 8):  # a pass over few prompts is dear in a large batch
                yield from self.enter([waiting.popleft() for _ in range(min(free, len(waiting)))])
            yield from self.step()

    def enter(self, rows: list[Row]) -> Iterator[tuple[Row, Emitted]]:
        """Run the prompts of new rows, those of similar length in one pass, and choose their first tokens."""
        rows = sorted(rows, key=lambda row: len(row.ids))
        while rows:
            together = max(n for n in range(1, len(rows) + 1) if n == 1 or n * len(rows[n - 1].ids) <= PROMPT_TOKENS)
            yield from self._enter(rows[:together])
            rows = rows[together:]

    @torch.no_grad()
    def _enter(self, rows: list[Row]) -> list[tuple[Row, Emitted]]:
        began = time.perf_counter()
        first = len(self.live)
        lengths = [len(row.ids) for row in rows]
        self._cache = self.target.with_room(self._cache, max(lengths))
        tokens = torch.tensor([token for row in rows for token in row.ids], device=self.target.device)
        if len(rows) == 1 and lengths[0] > MAX_NODES:  # no mask of n²
            states = self.target.prefill(tokens[None], self._cache.sequence(first))[0]
        else:
            states = self.target.verify_rows(self._cache, tokens, [TreeShape.chain(n) for n in lengths], first)
        parts = states.split(lengths)
        logits = self.target.logits(torch.stack([part[-1] for part in parts]))
        chosen = choose_rows([row.sampler for row in rows], logits, [0] * len(rows))
        for i, (row, part, token) in enumerate(zip(rows, parts, chosen, strict=True)):
            self._cache.lengths[first + i] = len(row.ids)
            row.tokens.append(token)
            row.stats.tokens += 1
            if self._drafter is not None:
                row.context = self._drafter.context()
                row.context.extend(row.ids, part)
            if self._keep_states:
                row.states.append(part)
        self.live += rows
        emitted = []
        for row, token in zip(rows, chosen, strict=True):
            reason = finish_reason(row.sampler.ended(token), row.left)
            emitted.append((row, Emitted([token], 0, reason)))
            if reason is not None:
                self.leave(row)
        seconds = (time.perf_counter() - began) / len(rows)
        for row in rows:
            row.stats.prefill_seconds += seconds
        return emitted

    @torch.no_grad()
    def step(self) -> list[tuple[Row, Emitted]]:
        """One iteration for every live row; rows whose answers end leave."""
        if not self.live:
            return []
        target, rows, clock = self.target, list(self.live), time.perf_counter
        began = clock()
        drafts = self._draft()
        drafted_at = clock()

        shapes = [draft.tree() for draft in drafts]
        longest = max(self._cache.lengths[i] + len(shape.parents) for i, shape in enumerate(shapes))
        self._cache = target.with_room(self._cache, longest)
        nodes = [[row.tokens[-1], *draft.tokens] for row, draft in zip(rows, drafts, strict=True)]
        tokens = torch.tensor([token for tree in nodes for token in tree], device=target.device)
        states = target.verify_rows(self._cache, tokens, shapes)
        logits = target.logits(states)
        if target.device.type == "cuda":
            torch.cuda.synchronize(target.device)  # acceptance waits for the logits anyhow: time them where they belong
        verified_at = clock()

        walks = self._accept(logits, drafts)
        self._cache.compact_rows([walk.path for walk in walks])
        first = 0
        kept: list[Tensor] = []  # copies: the pass's states need not stay
        for walk, tree in zip(walks, nodes, strict=True):
            path = walk.path
            whole = path == list(range(len(path)))
            kept.append(states[first : first + len(path)].clone() if whole else states[[first + node for node in path]])
            first += len(tree)
        for row, walk, own in zip(rows, walks, kept, strict=True):
            if row.context is not None:
                row.context.extend([row.tokens[-1], *walk.chosen[:-1]], own)
        accepted_at = clock()

        emitted = []
        for row, draft, walk, own in zip(rows, drafts, walks, kept, strict=True):
            row.tokens += walk.chosen
            if self._keep_states:
                row.states.append(own)
            row.stats.tokens += len(walk.chosen)
            row.stats.passed_tokens += len(walk.chosen)
            row.stats.drafted += len(draft.tokens)
            row.stats.note_pass(len(walk.path) - 1)
            reason = finish_reason(walk.over, row.left)
            emitted.append((row, Emitted(walk.chosen, len(walk.path) - 1, reason)))
            if reason is not None:
                self.leave(row)
        now = clock()
        for row in rows:
            row.stats.draft_seconds += (drafted_at - began) / len(rows)
            row.stats.verify_seconds += (verified_at - drafted_at) / len(rows)
            row.stats.accept_seconds += (accepted_at - verified_at) / len(rows)
            row.stats.decode_seconds += (now - began) / len(rows)
        return emitted

    def leave(self, row: Row) -> None:
        """End an answer, if it hasn't ended; the last row takes its place in the cache."""
        if row.ended:
            return
        row.ended = True
        at = self.live.index(row)
        last = len(self.live) - 1
        if at != last:
            self._cache.copy_row(at, self._cache, last)
            self.live[at] = self.live[last]
        self._cache.lengths[last] = 0
        self.live.pop()
        row.context = None  # its memory is free for others

    def _draft(self) -> list[Draft]:
        """Each row's candidates; none where the limit leaves no room for one."""
        drafts = [Draft([], [], [])] * len(self.live)
        drafting = [i for i, row in enumerate(self.live) if row.left > 1]
        if self._drafter is None or not drafting:
            return drafts
        rows = [self.live[i] for i in drafting]
        reach = [min(self._plan.depth, row.left - 1) for row in rows]  # never past the limit or the context
        made = self._drafter.draft(
            [row.context for row in rows if row.context],
            [row.tokens[-1] for row in rows],
            replace(self._plan, depth=max(reach), nodes=None),
            self._costs.min_gain(len(self.live)) if self._costs else 0.0,
        )
        made = [prune(draft, depth, self._plan.nodes or MAX_NODES) for draft, depth in zip(made, reach, strict=True)]
        if self._costs is not None and self._plan.sized_by_costs:
            made = shared(made, self._costs, len(self.live))
        for i, draft in zip(drafting, made, strict=True):
            drafts[i] = draft
        return drafts

    def _accept(self, logits: Tensor, drafts: list[Draft]) -> list[Walk]:
        """Walk all trees side by side: rows that are not greedy take a step each, in one call, until all have ended."""
        walks = [Walk(draft, row.sampler.ended, row.left) for row, draft in zip(self.live, drafts, strict=True)]
        first, at = [], 0
        for draft in drafts:
            first.append(at)
            at += 1 + len(draft.tokens)
        samplers = [row.sampler for row in self.live]
        if any(sampler.greedy for sampler in samplers):
            best = best_of(logits)
            for walk, start, sampler in zip(walks, first, samplers, strict=True):
                if sampler.greedy:
                    greedy(walk, *best, sampler, start)
        while going := [i for i, walk in enumerate(walks) if walk.goes_on]:
            own = logits[[first[i] + walks[i].path[-1] for i in going]]
            positions = [len(self.live[i].tokens) + len(walks[i].chosen) for i in going]
            for i, token in zip(going, choose_rows([samplers[i] for i in going], own, positions), strict=True):
                walks[i].take(token)
        return walks


def shared(drafts: list[Draft], costs: Costs, roots: int) -> list[Draft]:
    """The candidates of all drafts that are worth their share of one pass, the likeliest first.

    Args:
        drafts: best first, so that what is kept of each is a prefix, which is a tree.
        roots: rows of the pass, those without a draft included.
    """
    ranked = sorted((-score, i) for i, draft in enumerate(drafts) for score in draft.scores)
    counts = [0] * len(drafts)
    for _, i in ranked[: costs.best_size([-score for score, _ in ranked], roots)]:
        counts[i] += 1
    return [draft.first(n) for draft, n in zip(drafts, counts, strict=True)]
