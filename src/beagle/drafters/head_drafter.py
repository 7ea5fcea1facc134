"""Drafting with a draft head: trees grown over the cached keys of each answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from beagle.drafters.base import STATIC_PATHS, Draft, Drafter, TreePlan
from beagle.drafters.block import Block, Rotations
from beagle.drafters.context import HeadContext, write_unread
from beagle.drafters.grow import Beams, EagerLevels, grow, least_score, level_noise, ranked_drafts
from beagle.targets.linears.packed import pack_linears, packed, tile_linears
from beagle.targets.linears.quantized import VectorQuantizer, quantize_linears, quantized
from beagle.targets.target import Target


class WholeDrafts(Protocol):
    """Grows the tree of one context at once, what the context has not read included."""

    def vocabulary(self, context: HeadContext) -> Tensor:
        """Token ids that a draft of the context may have, ``[tokens]``."""

    def __call__(
        self,
        context: HeadContext,
        root: int,
        plan: TreePlan,
        min_expected_tokens: float = 0.0,
        noise: Tensor | None = None,
    ) -> Draft | None:
        """What of the tree is worth verifying, best first, as of ``best_first``; None where it can't.

        Arguments are those of ``grow``; noise is that of ``vocabulary``.
        """


class HeadDrafter(Drafter[HeadContext]):
    """Drafts with a head over cached keys (paper §4.1).

    Attributes:
        head: its weights are packed or quantised as the target's are.
        eager: computes levels.
        whole: grows the trees of one context as graphs, where there are some.
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
        self.lm_head, bias = target.head_rows(head.draft_vocab if trimmed else None)
        whole = quantized(self.lm_head, bias, "int8", VectorQuantizer()) if target.quantize else None
        self.rotations = Rotations(head, self.lm_head.dtype, self.device)
        self.eager = EagerLevels(head, target.embed, whole or packed(self.lm_head, bias))
        self.whole: WholeDrafts | None = None

    def use(self, drafts: WholeDrafts, name: str) -> None:
        """Let the trees of one context be grown by ``drafts`` from now on, whose name becomes part of the drafter's."""
        self.whole = drafts
        self.name += f", {name}"

    def context(self) -> HeadContext:
        return HeadContext(self.head, self.eager.embed, self.rotations, self._columns)

    @torch.no_grad()
    def draft(
        self, contexts: Sequence[HeadContext], roots: list[int], plan: TreePlan, min_expected_tokens: float = 0.0
    ) -> list[Draft]:
        if min_expected_tokens > 1 and len(contexts) > 1:  # of one context it may be a busy hour's measurement
            return [Draft([], [], []) for _ in contexts]
        if self.whole is not None and len(contexts) == 1:
            noise = None
            if contexts[0].noise is not None:
                noise = level_noise(contexts, plan.depth, self.whole.vocabulary(contexts[0]))
            found = self.whole(contexts[0], roots[0], plan, min_expected_tokens, noise)
            if found is not None:
                return [found]
        noise = level_noise(contexts, plan.depth, self.head.draft_vocab)
        write_unread(contexts)
        width = max(plan.width, len(STATIC_PATHS))
        beams = Beams.of_contexts(self.head, contexts, self.rotations, plan.depth, width)
        tokens = torch.tensor(roots, device=self.device)[:, None]
        newest = torch.stack([context.newest for context in contexts])
        levels = grow(self.eager, beams, tokens, newest, plan, min_expected_tokens, noise)
        return ranked_drafts(levels, len(contexts), plan, least_score(min_expected_tokens))
