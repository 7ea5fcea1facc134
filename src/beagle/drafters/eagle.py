"""Drafting with the EAGLE head: cached keys of true features, a key appended by every drafted node."""

from __future__ import annotations

import torch
from torch import Tensor

from beagle.drafters.beams import Beams
from beagle.drafters.block import Rotation
from beagle.drafters.eagle_head import EagleHead
from beagle.drafters.tree import TreeDrafter


class EagleDrafter(TreeDrafter):
    """A slot's key needs the token behind its state, so the newest slot waits for the next token.

    Its key with the root token is a draft's first entry; once that token is known to the target, it is made again.
    """

    head: EagleHead

    def _known(self, tokens: list[int], states: Tensor) -> tuple[list[int], Tensor]:
        before = torch.cat([self.newest, states[:-1]])  # h_i of the slots whose t_{i+1} is now known
        return tokens[len(tokens) - len(before) :], before

    def _remember(self, tokens: Tensor, states: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        return self.head.keys_values(self.head.features(self.embed(tokens), states), rotation)

    def _level(self, beams: Beams, tokens: Tensor, newest: Tensor) -> Tensor:
        rotation = beams.rotation()
        features = self.head.features(self.embed(tokens), newest)
        beams.append(*self.head.keys_values(features, rotation))
        attended = beams.attend(self.head.queries(features, rotation))
        return self.head.finish(attended, features)
