"""Levels of a draft tree as compiled graphs, made by ``beagle compile`` and kept in the user's cache.

A level is a block and the LM head over a few nodes: a millisecond of products behind as much again of small
operations and of the interpreter. Two graphs of them: the root's level, before which the keys of what the target has
run since the last draft are written, and any number of nodes below.
"""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from beagle.drafters.block import Block, Rotation
from beagle.drafters.compiled_draft import CompiledDraft
from beagle.drafters.grow import LevelOutput
from beagle.targets import aot_cache
from beagle.targets.linears import tiled
from beagle.targets.linears.joined import join_linears
from beagle.targets.linears.quantized import quantize_linears
from beagle.targets.target import Target

ROOT, BELOW = "root.so", "below.so"
FORMAT = 2  # of what the graphs take; another one is another key


class _GraphView:
    """Implements ``LevelView`` for one context whose slots, mask and RoPE are inputs of a graph."""

    def __init__(
        self, head: Block, level: int, rotation: Rotation, cache: tuple[Tensor, Tensor], slots: Tensor, mask: Tensor
    ) -> None:
        """
        Args:
            head: the draft head.
            level: the root's is 1.
            rotation: RoPE of the level.
            cache: keys and values, ``[cached_heads, capacity, head_dim]``.
            slots: where the nodes' keys go, ``[appended]``.
            mask: additive ``[beam, keys]``.
        """
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
        for cache, fresh in zip(self._cache, (k, v), strict=True):
            cache[:, self._slots] = fresh[0]

    def attend(self, q: Tensor, heads: slice) -> Tensor:
        keys, values = (cache[None, heads, : self._mask.shape[1]] for cache in self._cache)
        return self._head.attend(q, keys, values, self._mask[None, None])


class _Below(nn.Module):
    """What is compiled: a level, and the log of the sum of its logits' exponentials.

    Attributes:
        appended: whether the nodes of the level that was run last wrote keys.
    """

    level = 2

    def __init__(self, head: Block, lm_head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.lm_head = lm_head
        self.appended = False

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
        seen = _GraphView(self.head, self.level, (cos, sin), (keys, values), slots, mask)
        states = self.head.level(seen, embeddings, newest)
        self.appended = seen.appended
        logits = self.lm_head(states.flatten(0, 1)).float()
        return states, logits, logits.logsumexp(-1, keepdim=True)


class _Root(_Below):
    """The root's level, behind the keys and values of the slots that the context has not read."""

    level = 1

    def forward(  # type: ignore[override]
        self,
        unread_embeddings: Tensor,
        unread_states: Tensor,
        unread_cos: Tensor,
        unread_sin: Tensor,
        unread_slots: Tensor,
        embeddings: Tensor,
        newest: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        mask: Tensor,
    ) -> LevelOutput:
        rotation = unread_cos, unread_sin
        k, v = self.head.remember(unread_slots, unread_states, rotation, lambda _: unread_embeddings)
        keys[:, unread_slots] = k
        values[:, unread_slots] = v
        return super().forward(embeddings, newest, cos, sin, keys, values, slots, mask)


def find(folder: Path, target: Target, head: Block) -> CompiledDraft | None:
    """What ``build`` made of this very head, before its weights are packed; None if there is nothing.

    Raises:
        BeagleError: the package can't be read.
    """
    if target.device.type != "cpu":
        return None
    place = aot_cache.find(folder, _kind(target, head), lambda: _weights(target, head))
    if place is None:
        return None
    appends: dict[str, bool] = aot_cache.metadata(place, "appends")  # whether a level's nodes write keys
    root, below = (aot_cache.load(place / name) for name in (ROOT, BELOW))
    return CompiledDraft(head.draft_vocab, root, appends[ROOT], below, appends[BELOW])


@torch.no_grad()
def build(folder: Path, target: Target, head: Block, name: str) -> tuple[Path, float]:
    """Compile a freshly loaded head's levels.

    Args:
        folder: of all packages.
        target: that the head drafts for.
        head: of no use afterwards.
        name: of the draft, for errors.

    Returns:
        The package's folder and the seconds it took.
    Raises:
        BeagleError: the head can't be traced, or there is no compiler, or no room.
    """
    began = time.perf_counter()
    weights = _weights(target, head)
    place = aot_cache.path(folder, _kind(target, head), weights)
    lm_head = nn.Linear(target.hidden_size, len(weights["lm_head"]), bias="lm_bias" in weights, dtype=target.dtype)
    lm_head.weight = nn.Parameter(weights["lm_head"], requires_grad=False)
    if "lm_bias" in weights:
        lm_head.bias = nn.Parameter(weights["lm_bias"], requires_grad=False)
    appends: dict[str, bool] = {}
    with aot_cache.writing(place, {"draft": name, "appends": appends}) as partial:
        for file, graph in ((ROOT, _Root), (BELOW, _Below)):
            appends[file] = _export(graph(deepcopy(head), deepcopy(lm_head)), target, partial / file, name)
    return place, time.perf_counter() - began


def _export(graph: _Below, target: Target, library: Path, name: str) -> bool:
    """Whether the level's nodes write keys."""
    c = graph.head.config
    root = graph.level == 1
    beam, unread, known = (1, 3, 11) if root else (6, 0, 16)
    dtype = next(graph.head.parameters()).dtype
    rotation = torch.ones(1, 1, 1, c.head_dim, dtype=dtype)
    cache = torch.zeros(2, c.cached_heads, 40, c.head_dim, dtype=dtype)
    inputs: tuple[Tensor, ...] = (
        torch.ones(1, beam, c.hidden_size, dtype=dtype),
        torch.ones(1, beam, c.state_size if root else c.hidden_size, dtype=dtype),
        rotation,
        rotation.clone(),
        cache[0].clone(),
        cache[1].clone(),
        torch.arange(known, known + beam),
        torch.zeros(beam, known + beam, dtype=dtype),
    )
    auto = torch.export.Dim.AUTO
    nodes = {} if root else {1: auto}
    slots, mask = ({}, {1: auto}) if root else ({0: auto}, {0: auto, 1: auto})
    shapes: tuple[dict[int, object], ...] = (nodes, nodes, {}, {}, {1: auto}, {1: auto}, slots, mask)
    if root:
        turned = torch.ones(1, unread, c.head_dim, dtype=dtype)
        inputs = (
            torch.ones(unread, c.hidden_size, dtype=dtype),
            torch.ones(unread, c.state_size, dtype=dtype),
            turned,
            turned.clone(),
            torch.arange(known - unread, known),
            *inputs,
        )
        shapes = ({0: auto}, {0: auto}, {1: auto}, {1: auto}, {0: auto}, *shapes)
    join_linears(graph, lambda: graph(*inputs))
    if target.quantize or tiled.used(target.dtype):  # drafts need not be exact
        quantize_linears(graph, "int8")
    graph(*inputs)
    appends = graph.appended  # what tracing sets, it puts back
    aot_cache.export(graph, inputs, shapes, library, name)
    return appends


def _weights(target: Target, head: Block) -> dict[str, Tensor]:
    trimmed = head.config.draft_vocab_size is not None
    weight, bias = target.head_rows(head.draft_vocab if trimmed else None)
    return {**head.state_dict(), "lm_head": weight, **({} if bias is None else {"lm_bias": bias})}


def _kind(target: Target, head: Block) -> str:
    return aot_cache.key(
        "draft",
        FORMAT,
        head.architecture,
        asdict(head.config),
        str(target.dtype),
        tiled.used(target.dtype),
        target.quantize,
    )
