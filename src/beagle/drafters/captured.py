"""A whole draft of one context as a captured CUDA graph: one launch for all levels, one copy of the result to the host.

All levels of a chain or a dynamic tree have fixed shapes, so the graph is ``grow`` itself, over memory of
its own: the context's keys are copied into it, in fixed sizes, and drafted nodes append theirs behind. A graph can't
stop early; to ask the GPU after each level would cost the one launch.
"""

from __future__ import annotations

import math
from threading import Lock

import torch
from rich.console import Console
from torch import Tensor

from beagle.drafters.base import Draft, TreePlan, best_first
from beagle.drafters.block import Block, Rotations
from beagle.drafters.context import HeadContext, write_unread
from beagle.drafters.grow import Beams, EagerLevels, grow, least_score
from beagle.drafters.head_drafter import HeadDrafter
from beagle.errors import first_line
from beagle.limits import MAX_NODES
from beagle.targets import aot_cache
from beagle.targets.captured import GraphRecorder, Recorder, key_size

AGREES = 0.25  # between the log-probabilities of a level's best candidates: rounding chooses among near ties
_console = Console(stderr=True)


def capture_drafts(drafter: HeadDrafter) -> None:
    """Let drafts on a GPU be replayed from graphs, which are recorded when their size first comes."""
    if drafter.device.type == "cuda" and not aot_cache.compiled_disabled():
        drafter.use(CapturedDraft(drafter.eager, drafter.rotations), "captured")


class _FixedKeys:
    """Implements ``KeyStore`` for one context over a graph's memory: its slots first, drafted nodes' behind them."""

    def __init__(self, memory: Tensor, context: Tensor) -> None:
        """
        Args:
            memory: ``[2, cached_heads, slots, head_dim]``.
            context: the additive mask ``[keys]`` of the context's slots.
        """
        self._memory = memory
        self._context = context

    def write(self, k: Tensor, v: Tensor, at: int) -> None:
        at += len(self._context)
        for memory, fresh in zip(self._memory, (k, v), strict=True):
            memory[:, at : at + fresh.shape[2]] = fresh[0]

    def attend(self, head: Block, q: Tensor, heads: slice, mask: Tensor) -> Tensor:
        whole = torch.cat([self._context.expand(mask.shape[1], -1), mask[0]], dim=1)
        keys, values = self._memory[:, None, heads, : whole.shape[1]]
        return head.attend(q, keys, values, whole[None, None])

    def keep(self, contexts: list[int]) -> None:
        """There is one."""


class _Recorded:
    """A graph for one width and size of context; it drafts ``plan.depth`` levels, of which a shallower plan takes the first."""

    def __init__(self, levels: EagerLevels, rotations: Rotations, plan: TreePlan, keys: int, record: Recorder) -> None:
        head, device, dtype = levels.head, rotations.device, rotations.dtype
        c = head.config
        self.depth = plan.depth
        slots = keys + plan.depth * plan.width
        self._memory = torch.zeros(2, c.cached_heads, slots, c.head_dim, dtype=dtype, device=device)
        self._newest = torch.zeros(1, 1, c.state_size, dtype=dtype, device=device)
        self._numbers = torch.zeros(3, dtype=torch.long, device=device)  # the root, its slot, the context's keys
        self._noise = torch.zeros(1, plan.depth, len(head.draft_vocab), device=device)
        self._levels: list[int] = []  # candidates of each

        def run() -> Tensor:  # what it reads and didn't make must outlive it: the graph only knows where it lies
            root, slot, known = self._numbers.unbind()
            rotation = head.rotation((slot + torch.arange(plan.depth, device=device))[None], dtype)
            context = torch.zeros(keys, dtype=dtype, device=device)
            context = context.masked_fill(torch.arange(keys, device=device) >= known, torch.finfo(dtype).min)
            beams = Beams(head, _FixedKeys(self._memory, context), rotation)
            found = grow(levels, beams, root.view(1, 1), self._newest, plan, noise=self._noise)
            self._levels = [level.tokens.shape[1] for level in found]
            parts = zip(*((level.tokens, level.scores, level.parents) for level in found), strict=True)
            return torch.stack([torch.cat(part, dim=1)[0].double() for part in parts])  # holds every id exactly

        self._replay, self._out = record(run)

    def run(self, context: HeadContext, root: int, depth: int, noise: Tensor | None = None) -> Draft:
        """Candidates of the first ``depth`` levels after the token ``root``; the context must fit. ``noise`` is that of
        ``grow``."""
        if noise is None:
            self._noise.zero_()
        else:
            self._noise[:, : noise.shape[1]] = noise
        keys = context.keys
        self._memory[:, :, :keys] = context.cache[:, :, :keys]
        self._memory[:, :, keys:].zero_()  # a NaN behind a mask is a NaN
        self._newest.copy_(context.newest[None])
        for slot, number in zip(self._numbers, (root, context.length - 1, keys), strict=True):
            slot.fill_(number)  # a copy from the host would wait
        self._replay()
        tokens, scores, parents = self._out[:, : sum(self._levels[:depth])].cpu()
        return Draft(tokens.long().tolist(), parents.long().tolist(), scores.tolist())


class CapturedDraft:
    """Implements ``WholeDrafts``: graphs of one head's drafts, for all its contexts."""

    def __init__(self, levels: EagerLevels, rotations: Rotations, record: Recorder | None = None) -> None:
        self._levels, self._rotations = levels, rotations
        self._record = record or GraphRecorder(rotations.device)
        self._graphs: dict[tuple[int, int], _Recorded] = {}
        self._refused: dict[tuple[int, int], int] = {}  # depths that could not be recorded
        self._lock = Lock()

    def vocabulary(self, context: HeadContext) -> Tensor:
        return self._levels.head.draft_vocab

    def __call__(
        self,
        context: HeadContext,
        root: int,
        plan: TreePlan,
        min_expected_tokens: float = 0.0,
        noise: Tensor | None = None,
    ) -> Draft | None:
        """As of ``WholeDrafts``; None: a static tree, or one that could not be recorded."""
        if plan.kind == "static":
            return None
        write_unread([context])
        size = plan.width, key_size(context.keys)
        with self._lock:
            graph = self._graphs.get(size)
            if graph is None or graph.depth < plan.depth:
                if plan.depth >= self._refused.get(size, math.inf):
                    return None
                try:
                    graph = self._graphs[size] = self._recorded(context, root, plan, size[1])
                except Exception as error:  # no memory left, or whatever a head does that a graph can't
                    self._refused[size] = plan.depth
                    _console.print(
                        f"[dim]a draft of {plan.depth} levels can't be captured as a graph ({first_line(error)}), so it "
                        "runs one kernel at a time[/dim]",
                        highlight=False,
                    )
                    return None
            found = graph.run(context, root, plan.depth, noise)
        least = least_score(min_expected_tokens)
        return best_first(found.tokens, found.parents, found.scores, plan.nodes or MAX_NODES, least)

    def _recorded(self, context: HeadContext, root: int, plan: TreePlan, keys: int) -> _Recorded:
        """A graph, compared with the eager draft of this context."""
        levels, rotations = self._levels, self._rotations
        with torch.inference_mode(False), torch.no_grad():
            graph = _Recorded(levels, rotations, plan, keys, self._record)
        beams = Beams.of_contexts(levels.head, [context], rotations, plan.depth, plan.width)
        tokens = torch.tensor([[root]], device=rotations.device)
        eager = grow(levels, beams, tokens, context.newest[None], plan)
        scores, end = graph.run(context, root, plan.depth).scores, 0
        for level in eager:
            begin, end = end, end + level.scores.shape[1]
            ours = torch.tensor(scores[begin:end]).max()
            if not (ours - level.scores.max().cpu()).abs() < AGREES:  # NaN is no agreement either
                raise RuntimeError("its candidates are not the eager ones")
        return graph
