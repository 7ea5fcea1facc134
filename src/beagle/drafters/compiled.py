"""One level of a draft tree as a compiled graph, made by ``beagle compile`` and kept in the user's cache.

A level is a block and the LM head over a few nodes: a millisecond of products behind as much again of small
operations and of the interpreter. Two graphs of them: the root's level, and any number of nodes below.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from beagle.drafters.beams import Beams
from beagle.drafters.block import Block, Rotation
from beagle.drafters.tree import TreeDrafter
from beagle.targets import packages
from beagle.targets.quantize import quantize_linears
from beagle.targets.target import Target

ROOT, BELOW = "root.so", "below.so"
LevelOutput = tuple[Tensor, Tensor, Tensor]


class _TracedBeams(Beams):
    """A tree whose places, mask and RoPE are inputs of a graph."""

    def __init__(
        self, head: Block, level: int, rotation: Rotation, cache: tuple[Tensor, Tensor], slots: Tensor, mask: Tensor
    ) -> None:
        self.level = level
        self.appended = False
        self._head = head
        self._rotation = rotation
        self._cache = cache
        self._slots = slots
        self._mask = mask

    def rotation(self) -> Rotation:
        return self._rotation

    def append(self, k: Tensor, v: Tensor) -> None:
        self.appended = True
        for place, fresh in zip(self._cache, (k, v), strict=True):
            place[:, self._slots] = fresh[0]

    def attend(self, q: Tensor) -> Tensor:
        keys, values = (place[None, :, : self._mask.shape[1]] for place in self._cache)
        return self._head.attend(q, keys, values, self._mask[None, None])


class _Graph(nn.Module):
    """What is compiled: a level, and the log of the sum of its logits' exponentials."""

    def __init__(self, drafter: TreeDrafter, head: Block, lm_head: nn.Module, level: int) -> None:
        super().__init__()
        self.head = head
        self.lm_head = lm_head
        self.level = level
        self.appended = False
        self._drafter = drafter.fork()
        self._drafter.head = head
        self._drafter.embed = nn.Identity()

    def forward(
        self,
        embeddings: Tensor,
        newest: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        mask: Tensor,
    ) -> LevelOutput:
        beams = _TracedBeams(self.head, self.level, (cos, sin), (keys, values), slots, mask)
        states = self._drafter._level(beams, embeddings, newest)
        self.appended = beams.appended
        logits = self.lm_head(states.flatten(0, 1)).float()
        return states, logits, logits.logsumexp(-1, keepdim=True)


class CompiledLevels:
    """A package of one head."""

    def __init__(self, place: Path) -> None:
        """
        Raises:
            BeagleError: the package can't be read.
        """
        self._appends: dict[str, bool] = packages.about(place, "appends")  # whether a level's nodes write keys
        self._run = {name: packages.load(place / name) for name in (ROOT, BELOW)}

    def takes(self, beams: Beams, nodes: int) -> bool:
        """Whether there is a graph for so many nodes at the beams' level."""
        return beams.contexts == 1 and (nodes == 1) == (beams.level == 1)

    def __call__(self, beams: Beams, embeddings: Tensor, newest: Tensor) -> LevelOutput:
        """
        Args:
            embeddings, newest: ``[1, beam, hidden]``, of the nodes and of the states before them.
        Returns:
            Predicted states ``[1, beam, hidden]``; fp32 logits ``[beam, draft vocabulary]`` and the log of the sum
            of their exponentials ``[beam, 1]``.
        """
        graph = ROOT if beams.level == 1 else BELOW
        keys, values, slots, mask = beams.places(embeddings.shape[1] if self._appends[graph] else 0)
        states, logits, sums = self._run[graph]([embeddings, newest, *beams.rotation(), keys, values, slots, mask])
        return states, logits, sums


def find(folder: Path, target: Target, head: Block) -> CompiledLevels | None:
    """What ``build`` made of this very head, before its weights are packed; None if there is nothing."""
    if target.device.type != "cpu":
        return None
    place = packages.find(folder, _kind(target, head), lambda: _weights(target, head))
    return CompiledLevels(place) if place is not None else None


@torch.no_grad()
def build(folder: Path, target: Target, kind: type[TreeDrafter], head: Block, name: str) -> tuple[Path, float]:
    """Compile a freshly loaded head's levels; the head is of no use afterwards.

    Args:
        folder: of all packages. kind: the drafter that uses such heads. name: of the draft, for errors.
    Returns:
        The package's folder and the seconds it took.
    Raises:
        BeagleError: the head can't be traced, or there is no compiler, or no room.
    """
    began = time.perf_counter()
    weights = _weights(target, head)
    place = packages.place(folder, _kind(target, head), weights)
    lm_head = nn.Linear(target.hidden_size, len(weights["lm_head"]), bias="lm_bias" in weights, dtype=target.dtype)
    lm_head.weight = nn.Parameter(weights["lm_head"], requires_grad=False)
    if "lm_bias" in weights:
        lm_head.bias = nn.Parameter(weights["lm_bias"], requires_grad=False)
    graphs = {}
    for file, level in ((ROOT, 1), (BELOW, 2)):
        graphs[file] = _Graph(kind(target, copy.deepcopy(head)), head, lm_head, level)
        if target.quantize:
            quantize_linears(graphs[file], "int8")
    appends: dict[str, bool] = {}
    with packages.fresh(place, {"draft": name, "appends": appends}) as partial:
        for file, graph in graphs.items():
            appends[file] = _export(graph, partial / file, name)
    return place, time.perf_counter() - began


def _export(graph: _Graph, library: Path, name: str) -> bool:
    """Whether the level's nodes write keys."""
    c = graph.head.config
    root = graph.level == 1
    beam, known = (1, 11) if root else (6, 16)
    dtype = next(graph.head.parameters()).dtype
    embeddings = torch.ones(1, beam, c.hidden_size, dtype=dtype)
    rotation = torch.ones(1, 1, 1, c.head_dim, dtype=dtype)
    cache = torch.zeros(2, c.num_kv_heads, 40, c.head_dim, dtype=dtype)
    inputs = (
        embeddings,
        embeddings.clone(),
        rotation,
        rotation.clone(),
        cache[0].clone(),
        cache[1].clone(),
        torch.arange(known, known + beam),
        torch.zeros(beam, known + beam, dtype=dtype),
    )
    graph(*inputs)
    appends = graph.appended  # what tracing sets, it puts back
    auto = torch.export.Dim.AUTO
    nodes = {} if root else {1: auto}
    slots, mask = ({}, {1: auto}) if root else ({0: auto}, {0: auto, 1: auto})
    packages.export(graph, inputs, (nodes, nodes, {}, {}, {1: auto}, {1: auto}, slots, mask), library, name)
    return appends


def _weights(target: Target, head: Block) -> dict[str, Tensor]:
    trimmed = head.config.draft_vocab_size is not None
    weight, bias = target.head_rows(head.draft_vocab if trimmed else None)
    return {**head.state_dict(), "lm_head": weight, **({} if bias is None else {"lm_bias": bias})}


def _kind(target: Target, head: Block) -> str:
    return packages.kind("draft", head.architecture, asdict(head.config), str(target.dtype), target.quantize)
