"""The decoder: draft a tree, verify it in one pass, accept a path, commit; for one answer and for many.

Greedy, sampling, chain, static and dynamic trees, and plain decoding (a tree of the root alone) are this one
iteration with different parts. Answers that are live together share the passes: the linear layers of the target
and of the draft head run once over the tokens of all of them. Each has a tree, an acceptance and a length of its own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from itertools import accumulate

import torch
from torch import Tensor

from beagle.decoding.costs import Costs
from beagle.decoding.drafts import NOTHING, Drafts
from beagle.decoding.live_cache import LiveCache, exact_keys
from beagle.decoding.live_costs import LiveCosts
from beagle.decoding.prefill import Prefill
from beagle.decoding.prefixes import PrefixCache
from beagle.decoding.sequence import Emitted, FinishReason, Sequence, SequenceError, Step
from beagle.decoding.walk import Verdict, Walk, accept
from beagle.drafters.base import Drafter, TreePlan
from beagle.errors import BeagleError
from beagle.targets.linears import tiled
from beagle.targets.shape import TreeShape
from beagle.targets.target import Target

Emissions = list[tuple[Sequence, Emitted]]


class Decoder:
    """Sequences that decode together; they enter and leave at any time between two steps.

    Alone, a sequence takes the passes of one answer. In exact mode each takes passes of its own always. What goes
    wrong in one sequence ends that sequence with an ``error``, and no other.

    Attributes:
        size: most live sequences.
        live: sequences that decode, in the order of the cache's.
    """

    def __init__(
        self,
        target: Target,
        *,
        size: int = 1,
        drafter: Drafter | None = None,
        plan: TreePlan | None = None,
        costs: Costs | None = None,
        shared_costs: Costs | None = None,
        exact: bool = False,
        keep_states: bool = False,
        prefixes: PrefixCache | None = None,
        piece: int | None = None,
    ) -> None:
        """
        Args:
            drafter: None is plain decoding.
            costs: measured times that choose the size of a tree, where the plan leaves it open.
            exact: shape-stable passes, bit-equal to plain decoding in this mode.
            prefixes: keys of earlier sequences, for prompts that begin as they did; of no use in exact mode, whose
                bits would be others.
            piece: most tokens of a prompt that run between two passes of the live sequences; None: all of them.
        Raises:
            BeagleError: ``exact``, which there is not for this target.
        """
        if exact:
            target.refuse_exact()
        self.target = target
        self.size = size
        self.live: list[Sequence] = []
        self._ran_prompts = False  # in the last step
        self._cache = LiveCache(target, size)
        self._prefill = Prefill(target, self._cache, None if exact else prefixes, piece, exact)
        self._drafter, self._exact = drafter, exact
        self._live_costs = costs if isinstance(costs, LiveCosts) else None
        self._drafts = Drafts(drafter, plan or TreePlan(), costs, shared_costs, exact, target.chains_only)
        self._keep_states = keep_states or self._prefill.prefixes is not None

    @property
    def free(self) -> int:
        return self.size - len(self.live) - len(self._prefill.waiting)

    def run(self, waiting: deque[Sequence]) -> Iterator[tuple[Sequence, Emitted]]:
        """Decode all that waits, yielding new tokens as they come; ``waiting`` may still grow meanwhile."""
        while waiting or self.live or self._prefill.waiting:
            if waiting and self.free >= max(1, self.size // 8):  # a pass over few prompts is dear among many
                self.enter([waiting.popleft() for _ in range(min(self.free, len(waiting)))])
            yield from self.step()

    def enter(self, sequences: Iterable[Sequence]) -> None:
        """Take on sequences, at most as many as are ``free``: their prompts run in the next steps."""
        self._prefill.add(sequences)

    @torch.no_grad()
    def step(self) -> Emissions:
        """Run prompts that wait, or one iteration of the live sequences: in turns where there are both.

        Returns:
            New tokens. Sequences whose answers end, or fail, have left.
        """
        prompts = bool(self._prefill.waiting) and not (self.live and self._ran_prompts)
        self._ran_prompts = prompts
        try:
            return self._run_prompts() if prompts else self._iterate() if self.live else []
        except BaseException:  # Ctrl-C, say
            self._prefill.prefixes = None  # what of the step is in the cache is not known: none of it is kept
            raise

    def leave(self, sequence: Sequence) -> None:
        """End an answer, if it hasn't ended."""
        if sequence.ended:
            return
        sequence.ended = True
        sequence.context = sequence.cache = None  # their memory is free for others
        if sequence in self._prefill.waiting:
            self._prefill.waiting.remove(sequence)
        if sequence not in self.live:
            return
        at, last = self.live.index(sequence), len(self.live) - 1
        prefixes = self._prefill.prefixes
        if prefixes is not None and sequence.error is None:
            cache = self._cache.whole
            known = [*sequence.ids, *sequence.tokens][: cache.lengths[at]]
            prefixes.keep(known, cache, at, sequence.states)
            sequence.states = []
        self._cache.remove(at, last, clear=sequence.error is not None)
        self.live[at] = self.live[last]
        self.live.pop()

    def _fail(self, sequence: Sequence, error: Exception) -> tuple[Sequence, Emitted]:
        sequence.error = error
        return self._left(sequence)

    def _left(self, sequence: Sequence) -> tuple[Sequence, Emitted]:
        """A sequence that has failed leaves."""
        self.leave(sequence)
        return sequence, Emitted([], 0)

    # prompts

    def _run_prompts(self) -> Emissions:
        found = self._prefill.step(len(self.live))
        self.live += found.sequences
        emitted = [self._left(one) for one in found.failed]
        if found.logits is not None:
            emitted += self._begin(found.sequences, found.states, found.logits)
        return emitted

    def _begin(self, sequences: list[Sequence], states: list[Tensor], logits: Tensor) -> Emissions:
        began = time.perf_counter()
        root = TreeShape([-1])
        walks = [Walk(NOTHING, one.sampler, first=i, position=0, left=1) for i, one in enumerate(sequences)]
        accept(walks, Verdict(logits))
        emitted = []
        for i, (one, own, walk) in enumerate(zip(sequences, states, walks, strict=True)):
            step = Step([one.ids[-1]], root, own[-1:], logits[i : i + 1], [0]) if one.watch else None
            emitted.append(self._take(one, walk, one.ids, own, step))
            one.stats.tokens += one.error is None
        seconds = (time.perf_counter() - began) / len(sequences)
        for one in sequences:
            one.stats.prefill_seconds += seconds
        return emitted

    def _take(
        self, sequence: Sequence, walk: Walk, tokens: list[int], states: Tensor, step: Step | None
    ) -> tuple[Sequence, Emitted]:
        try:
            if walk.error is not None:
                raise walk.error
            if self._drafter is not None and sequence.drafts:
                sequence.context = sequence.context or self._drafter.context()
                sequence.context.extend(tokens, states)
            if self._keep_states:
                sequence.states.append(states)
            if sequence.watch is not None and step is not None:
                sequence.watch(step)
        except Exception as error:
            return self._fail(sequence, error)
        sequence.tokens += walk.chosen
        reason: FinishReason | None = "stop" if walk.ended else None if sequence.left else "length"
        if reason is not None:
            self.leave(sequence)
        return sequence, Emitted(walk.chosen, len(walk.path) - 1, reason)

    # iterations

    def _iterate(self) -> Emissions:
        """Draft, verify and accept once for the live sequences."""
        clock, sequences, count = time.perf_counter, list(self.live), len(self.live)
        began = clock()
        try:
            drafts = self._drafts.of(sequences)
            drafted_at = clock()
            sizes = [1 + len(draft.tokens) for draft in drafts]
            self._grow(sizes)
            shapes = [draft.tree() for draft in drafts]
            trees = [[one.tokens[-1], *draft.tokens] for one, draft in zip(sequences, drafts, strict=True)]
            states, verdict = self._verify(sequences, trees, shapes)
            verified_at = clock()
            walks = []
            for one, draft, first in zip(sequences, drafts, accumulate(sizes[:-1], initial=0), strict=True):
                walks.append(Walk(draft, one.sampler, first=first, position=len(one.tokens), left=one.left))
            accept(walks, verdict)
        except SequenceError as failed:
            return [self._fail(failed.sequence, failed.error)]
        except Exception as error:  # of the pass that they share
            return [self._fail(one, error) for one in sequences]
        self._cache.whole.compact_sequences([walk.path for walk in walks])
        emitted = []
        each = [states] if count == 1 else states.split(sizes)
        for i, (one, own, walk) in enumerate(zip(sequences, each, walks, strict=True)):
            step = None
            if one.watch and verdict.logits is not None:
                step = Step(trees[i], shapes[i], own, verdict.logits.split(sizes)[i], walk.path)
            accepted = self._states_of(walk.path, own)
            emitted.append(self._take(one, walk, [trees[i][0], *walk.chosen[:-1]], accepted, step))
            if one.error is None:
                one.stats.note_pass(len(walk.path) - 1, len(walk.chosen), sizes[i] - 1)
        accepted_at = clock()
        if self._live_costs is not None and count == 1:
            self._live_costs.note(sizes[0], verified_at - drafted_at)
        for one in sequences:
            one.stats.draft_seconds += (drafted_at - began) / count
            one.stats.verify_seconds += (verified_at - drafted_at) / count
            one.stats.accept_seconds += (accepted_at - verified_at) / count
            one.stats.decode_seconds += (accepted_at - began) / count
        return emitted

    def _states_of(self, path: list[int], states: Tensor) -> Tensor:
        """Of accepted nodes ``[path, hidden]``; where they are kept, in memory of their own: the pass's states need not stay."""
        if not self._keep_states and path[-1] == len(path) - 1:
            return states[: len(path)]  # they come first
        return states.index_select(0, torch.tensor(path, device=states.device))

    def _verify(
        self, sequences: list[Sequence], trees: list[list[int]], shapes: list[TreeShape]
    ) -> tuple[Tensor, Verdict]:
        """Hidden states ``[tokens, hidden]`` of all trees, end to end, and the verdict on them."""
        target = self.target
        if self._exact:
            found = []
            for i, (one, tree, shape) in enumerate(zip(sequences, trees, shapes, strict=True)):
                tokens = torch.tensor(tree, device=target.device)
                try:
                    states = target.verify_exact(self._cache.of(i), tokens, shape, exact_keys(one))
                    found.append((states, target.exact_logits(states)))
                except Exception as error:
                    raise SequenceError(one, error) from error
            states, logits = found[0] if len(found) == 1 else [torch.cat(part) for part in zip(*found, strict=True)]
            verdict = Verdict(logits)
        else:
            tokens = torch.tensor([token for tree in trees for token in tree], device=target.device)
            if len(self.live) == 1:
                states = target.verify(self._cache.of(0), tokens, shapes[0])
            else:
                states = target.verify_trees(self._cache.whole, tokens, shapes)
            largest_only = all(one.sampler.greedy and one.watch is None for one in sequences)
            if largest_only and tiled.used(target.dtype) is not None:
                verdict = Verdict(None, target.likeliest(states))
            else:
                verdict = Verdict(target.logits(states))
        if target.device.type == "cuda":
            torch.cuda.synchronize(target.device)  # acceptance waits for the logits anyhow: time them where they belong
        return states, verdict

    def _grow(self, sizes: list[int]) -> None:
        """Room for trees of these sizes; where there is no memory for it, the longest sequence is to blame."""
        slots = [n + size for n, size in zip(self._cache.whole.lengths, sizes, strict=False)]
        try:
            self._cache.reserve(max(slots))
        except BeagleError as error:
            raise SequenceError(self.live[slots.index(max(slots))], error) from error


def decode(decoder: Decoder, sequence: Sequence) -> Generator[Emitted, None, None]:
    """One answer, by a decoder of its own: the tokens of each iteration until the sampler or the limit ends it.

    Raises:
        BeagleError: there is no memory for its cache; or the logits are no numbers.
    """
    decoder.enter([sequence])
    try:
        while not sequence.ended:
            for _, emitted in decoder.step():
                if sequence.error is not None:
                    raise sequence.error
                yield emitted
    finally:
        decoder.leave(sequence)
        sequence.error = None  # its traceback holds the sequence and its keys
