"""One level of a draft tree as a compiled graph, made by ``beagle compile`` and kept in the user's cache.

A level is a block and the LM head over a few nodes: a millisecond of products behind as much again of small
operations and of the interpreter. Two graphs of them: the root's level, and any number of nodes below.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beagle.drafters.block import Block, Rotation
from beagle.drafters.grow import Beams, ContextKeys, LevelOutput
from beagle.targets import aot_cache
from beagle.targets.linears import tiled
from beagle.targets.linears.quantized import quantize_linears
from beagle.targets.target import Target

ROOT, BELOW = "root.so", "below.so"


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


class _Graph(nn.Module):
    """What is compiled: a level, and the log of the sum of its logits' exponentials."""

    def __init__(self, head: Block, lm_head: nn.Module, level: int) -> None:
        super().__init__()
        self.head = head
        self.lm_head = lm_head
        self.level = level
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


class CompiledLevels:
    """Implements ``SomeLevels`` with a package of one head."""

    def __init__(self, place: Path, embed: Callable[[Tensor], Tensor]) -> None:
        """
        Args:
            place: the package's folder.
            embed: the target's embeddings, token ids ``[...]`` -> ``[..., hidden]``.

        Raises:
            BeagleError: the package can't be read.
        """
        self._appends: dict[str, bool] = aot_cache.metadata(place, "appends")  # whether a level's nodes write keys
        self._run = {name: aot_cache.load(place / name) for name in (ROOT, BELOW)}
        self._embed = embed

    def takes(self, beams: Beams, nodes: int) -> bool:
        """Whether there is a graph for so many nodes at the beams' level."""
        keys = beams.keys
        return isinstance(keys, ContextKeys) and len(keys.contexts) == 1 and (nodes == 1) == (beams.level == 1)

    def __call__(self, beams: Beams, tokens: Tensor, newest: Tensor) -> LevelOutput:
        assert isinstance(beams.keys, ContextKeys)
        (context,) = beams.keys.contexts
        graph = ROOT if beams.level == 1 else BELOW
        appended = tokens.shape[1] if self._appends[graph] else 0
        at = context.keys + beams.mask.shape[2]
        slots = torch.arange(at, at + appended, device=newest.device)
        if appended:
            beams.see_own(appended)
        (mask,) = F.pad(beams.mask, (context.keys, 0))
        inputs = [self._embed(tokens), newest, *beams.rotation(), *context.cache, slots, mask]
        states, logits, sums = self._run[graph](inputs)
        return states, logits, sums


def find(folder: Path, target: Target, head: Block) -> CompiledLevels | None:
    """What ``build`` made of this very head, before its weights are packed; None if there is nothing."""
    if target.device.type != "cpu":
        return None
    place = aot_cache.find(folder, _kind(target, head), lambda: _weights(target, head))
    return CompiledLevels(place, target.embed) if place is not None else None


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
    graphs = {}
    for file, level in ((ROOT, 1), (BELOW, 2)):
        graphs[file] = _Graph(head, lm_head, level)
        if target.quantize or tiled.used(target.dtype):  # drafts need not be exact
            quantize_linears(graphs[file], "int8")
    appends: dict[str, bool] = {}
    with aot_cache.writing(place, {"draft": name, "appends": appends}) as partial:
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
    cache = torch.zeros(2, c.cached_heads, 40, c.head_dim, dtype=dtype)
    inputs = (
        embeddings,
        torch.ones(1, beam, c.state_size if root else c.hidden_size, dtype=dtype),
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
    aot_cache.export(graph, inputs, (nodes, nodes, {}, {}, {1: auto}, {1: auto}, slots, mask), library, name)
    return appends


def _weights(target: Target, head: Block) -> dict[str, Tensor]:
    trimmed = head.config.draft_vocab_size is not None
    weight, bias = target.head_rows(head.draft_vocab if trimmed else None)
    return {**head.state_dict(), "lm_head": weight, **({} if bias is None else {"lm_bias": bias})}


def _kind(target: Target, head: Block) -> str:
    return aot_cache.key(
        "draft", head.architecture, asdict(head.config), str(target.dtype), tiled.used(target.dtype), target.quantize
    )
