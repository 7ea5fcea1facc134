"""Drafting with the EAGLE head: cached keys of true features, a key appended by every drafted node."""

from __future__ import annotations

import torch
from torch import Tensor

from beagle.drafters.eagle_head import EagleHead
from beagle.drafters.tree import TreeDrafter


class EagleDrafter(TreeDrafter):
    """A slot's key needs the token behind its state, so the newest slot waits for the next token.

    Its key with the root token is a draft's first entry; ``extend`` makes it again.
    """

    head: EagleHead

    def _remember(self, tokens: list[int], states: Tensor) -> tuple[Tensor, Tensor]:
        before = torch.cat([self.newest, states[:-1]])  # h_i of the slots whose t_{i+1} is now known
        known = torch.tensor(tokens[len(tokens) - len(before) :], dtype=torch.long, device=self.device)
        features = self.head.features(self.embed(known), before)
        return self.head.keys_values(features, self._rotation(self.keys, self.keys + len(before)))

    def _level(self, level: int, tokens: Tensor, newest: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        rotation = self._slot(level)
        features = self.head.features(self.embed(tokens), newest)
        mask = self._append(*self.head.keys_values(features, rotation), mask)
        attended = self._attend(self.head.queries(features, rotation), mask)
        return self.head.finish(attended, features), mask
