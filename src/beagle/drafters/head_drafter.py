"""Drafting with a draft head: trees grown over the cached keys of each answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from beagle.drafters.base import STATIC_PATHS, Draft, Drafter, TreePlan
from beagle.drafters.block import Block, Rotations
from beagle.drafters.context import HeadContext, write_unread
from beagle.drafters.grow import (
    Beams,
    EagerLevels,
    Level,
    LevelOutput,
    LevelRunner,
    grow,
    least_score,
    level_noise,
    ranked_drafts,
)
from beagle.targets.linears.packed import pack_linears, packed, tile_linears
from beagle.targets.linears.quantized import VectorQuantizer, quantize_linears, quantized
from beagle.targets.target import Target


class SomeLevels(LevelRunner, Protocol):
    """A ``LevelRunner`` for some levels."""

    def takes(self, beams: Beams, nodes: int) -> bool:
        """Whether it can compute so many nodes of each context at the beams' level."""


class WholeDrafts(Protocol):
    """Grows the tree of one context at once."""

    def __call__(
        self, context: HeadContext, root: int, plan: TreePlan, noise: Tensor | None = None
    ) -> list[Level] | None:
        """All levels, on the host; None where it can't."""


class HeadDrafter(Drafter[HeadContext]):
    """Drafts with a head over cached keys (paper §4.1).

    Attributes:
        head: its weights are packed or quantised as the target's are.
        eager: computes levels that ``compiled`` doesn't.
        compiled: computes levels of one context's tree as graphs.
        captured: grows whole trees of one context as graphs.
    """

    def __init__(self, target: Target, head: Block) -> None:
        trimmed = head.config.draft_vocab_size is not None
        weights = sum(parameter.numel() for parameter in head.parameters())
        tokens = head.config.draft_vocab_size or target.vocab_size
        self.name = f"{head.architecture}, {weights} weights, {tokens} tokens"
        self._columns = target.columns(head.config.kv_layers)
        if target.quantize:  # in int8 always: a draft is made of small passes, where it is the fastest
            quantize_linears(head, "int8")
        tile_linears(head)
        pack_linears(head)  # what is left
        self.head = head
        self.device = target.device
        self.vocab_size = target.vocab_size
        self.lm_head, bias = target.head_rows(head.draft_vocab if trimmed else None)
        whole = quantized(self.lm_head, bias, "int8", VectorQuantizer()) if target.quantize else None
        self.rotations = Rotations(head, self.lm_head.dtype, self.device)
        self.eager = EagerLevels(head, target.embed, whole or packed(self.lm_head, bias))
        self.compiled: SomeLevels | None = None
        self.captured: WholeDrafts | None = None

    def use_compiled(self, levels: SomeLevels) -> None:
        """Let the levels of one context's tree be computed by compiled graphs from now on."""
        self.compiled = levels
        self.name += ", compiled"

    def use_captured(self, drafts: WholeDrafts) -> None:
        """Let the trees of one context be grown by captured graphs from now on."""
        self.captured = drafts
        self.name += ", captured"

    def context(self) -> HeadContext:
        return HeadContext(self.head, self.eager.embed, self.rotations, self._columns)

    @torch.no_grad()
    def draft(
        self, contexts: Sequence[HeadContext], roots: list[int], plan: TreePlan, min_expected_tokens: float = 0.0
    ) -> list[Draft]:
        if min_expected_tokens > 1 and len(contexts) > 1:  # of one context it may be a busy hour's measurement
            return [Draft([], [], []) for _ in contexts]
        write_unread(contexts)
        noise = level_noise(contexts, plan.depth, self.head.draft_vocab, self.vocab_size)
        levels = None
        if self.captured is not None and len(contexts) == 1:
            levels = self.captured(contexts[0], roots[0], plan, noise)
        if levels is None:
            width = max(plan.width, len(STATIC_PATHS))
            beams = Beams.of_contexts(self.head, contexts, self.rotations, plan.depth, width)
            tokens = torch.tensor(roots, device=self.device)[:, None]
            newest = torch.stack([context.newest for context in contexts])
            levels = grow(self._run_level, beams, tokens, newest, plan, min_expected_tokens, noise)
        return ranked_drafts(levels, len(contexts), plan, least_score(min_expected_tokens))

    def _run_level(self, beams: Beams, tokens: Tensor, newest: Tensor) -> LevelOutput:
        if self.compiled is not None and self.compiled.takes(beams, tokens.shape[1]):
            return self.compiled(beams, tokens, newest)
        return self.eager(beams, tokens, newest)
