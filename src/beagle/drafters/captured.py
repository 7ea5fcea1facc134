"""A whole draft of one context as a captured CUDA graph: one launch for all levels, one copy of the result to the host.

All levels of a chain or a dynamic tree have fixed shapes, so the graph is ``TreeDrafter.grow`` itself, over memory of
its own: the context's keys are copied into it, in fixed sizes, and drafted nodes append theirs behind. A graph can't
stop early; where a level is a few kernels of one launch, there is little to stop for.
"""

from __future__ import annotations

import torch
from rich.console import Console
from torch import Tensor

from beagle.drafters.base import TreePlan
from beagle.drafters.beams import Beams, Rotation
from beagle.drafters.block import Block
from beagle.drafters.tree import Level, TreeDrafter
from beagle.targets import packages
from beagle.targets.captured import GraphRecorder, Recorder, key_size
from beagle.targets.loading import first_line

_console = Console(stderr=True)


def capture(drafter: TreeDrafter) -> None:
    """Let drafts on a GPU be replayed from graphs, which are recorded when their size first comes."""
    if drafter.device.type == "cuda" and not packages.left_aside():
        drafter.captured = CapturedDraft(drafter)
        drafter.name += ", captured"


class _FixedBeams(Beams):
    """The tree of one context over a graph's memory: the context's slots first, drafted nodes' behind them."""

    def __init__(self, head: Block, rotation: Rotation, memory: Tensor, context: Tensor) -> None:
        """
        Args:
            rotation: of all levels' slots. memory: ``[2, kv_heads, slots, head_dim]``. context: the additive mask
                ``[keys]`` of the context's slots.
        """
        self.level = 1
        self._head = head
        self._cos, self._sin = rotation
        self._memory = memory
        self._context = context
        self._mask = context.new_zeros(1, 1, 0)

    def append(self, k: Tensor, v: Tensor) -> None:
        at = len(self._context) + self._mask.shape[2]
        for place, fresh in zip(self._memory, (k, v), strict=True):
            place[:, at : at + fresh.shape[2]] = fresh[0]
        self._see_own(k.shape[2])

    def attend(self, q: Tensor) -> Tensor:
        mask = torch.cat([self._context.expand(self._mask.shape[1], -1), self._mask[0]], dim=1)
        keys, values = self._memory[:, None, :, : mask.shape[1]]
        return self._head.attend(q, keys, values, mask[None, None])


class _Recorded:
    """A graph for one width and size of context; it drafts ``plan.depth`` levels, of which a shallower plan takes the first."""

    def __init__(self, drafter: TreeDrafter, plan: TreePlan, keys: int, record: Recorder) -> None:
        c, device, dtype = drafter.head.config, drafter.device, drafter.lm_head.dtype
        self.depth = plan.depth
        slots = keys + plan.depth * plan.width
        self._memory = torch.zeros(2, c.num_kv_heads, slots, c.head_dim, dtype=dtype, device=device)
        self._newest = torch.zeros(1, 1, c.hidden_size, dtype=dtype, device=device)
        self._numbers = torch.zeros(3, dtype=torch.long, device=device)  # the root, its slot, the context's keys
        self._levels: list[int] = []  # candidates of each
        places, depths = torch.arange(keys, device=device), torch.arange(plan.depth, device=device)

        def run() -> Tensor:
            root, slot, known = self._numbers.unbind()
            rotation = drafter.head.rotation((slot + depths)[None], dtype)
            context = torch.zeros(keys, dtype=dtype, device=device)
            context = context.masked_fill(places >= known, torch.finfo(dtype).min)
            beams = _FixedBeams(drafter.head, rotation, self._memory, context)
            found = drafter.grow(beams, root.view(1, 1), self._newest, plan)
            self._levels = [level.tokens.shape[1] for level in found]
            parts = zip(*((level.tokens, level.scores, level.parents) for level in found), strict=True)
            return torch.stack([torch.cat(part, dim=1)[0].double() for part in parts])  # holds every id exactly

        self._replay, self._out = record(run)

    def run(self, row: TreeDrafter, root: int) -> list[Level]:
        self._memory[:, :, : row.keys] = row._cache[:, :, : row.keys]
        self._memory[:, :, row.keys :].zero_()  # a NaN behind a mask is a NaN
        self._newest.copy_(row.newest[None])
        self._numbers.copy_(torch.tensor([root, row.length - 1, row.keys]))
        self._replay()
        levels = self._out.cpu().split(self._levels, dim=1)
        return [Level([0], part[:1].long(), part[1:2].float(), part[2:].long()) for part in levels]


class CapturedDraft:
    """Graphs of one head's drafts, for all its forks; they must not draft at the same time."""

    def __init__(self, drafter: TreeDrafter, record: Recorder | None = None) -> None:
        """
        Args:
            record: takes a CUDA graph's place.
        """
        self._drafter = drafter.fork()
        self._record = record or GraphRecorder(drafter.device)
        self._graphs: dict[tuple[int, int], _Recorded | None] = {}

    def __call__(self, row: TreeDrafter, root: int, plan: TreePlan) -> list[Level] | None:
        """All levels, on the host; None: a static tree, or one that could not be recorded."""
        if plan.kind == "static":
            return None
        size = plan.width, key_size(row.keys)
        graph = self._graphs.get(size)
        if size not in self._graphs or (graph is not None and graph.depth < plan.depth):
            graph = self._graphs[size] = self._recorded(plan, size[1])
        return graph.run(row, root)[: plan.depth] if graph is not None else None

    def _recorded(self, plan: TreePlan, keys: int) -> _Recorded | None:
        try:
            with torch.inference_mode(False), torch.no_grad():
                return _Recorded(self._drafter, plan, keys, self._record)
        except RuntimeError as error:  # no memory left, for one
            reason = first_line(error)  # its traceback would hold the memory
        _console.print(
            f"[dim]a draft of {plan.depth} levels can't be captured as a graph ({reason}), so it runs one kernel at a "
            "time[/dim]",
            highlight=False,
        )
        return None
