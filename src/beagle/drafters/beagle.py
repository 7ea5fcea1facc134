"""Drafting with the Beagle head: cached keys of true states, lazily added keys of predicted ones."""

from __future__ import annotations

from torch import Tensor

from beagle.drafters.beams import Beams
from beagle.drafters.block import Rotation
from beagle.drafters.head import BeagleHead
from beagle.drafters.tree import TreeDrafter


class BeagleDrafter(TreeDrafter):
    """A slot's key is that of its state alone: known as soon as the target has run the token.

    A predicted state's key is made when a descendant needs it, so the deepest level's never are.
    """

    head: BeagleHead

    def _known(self, tokens: list[int], states: Tensor) -> tuple[list[int], Tensor]:
        return tokens, states

    def _remember(self, tokens: Tensor, states: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        return self.head.keys_values(states, rotation)

    def _level(self, beams: Beams, tokens: Tensor, newest: Tensor) -> Tensor:
        rotation = beams.rotation()
        if beams.level > 1 and self.head.config.concat:  # the root's state is a true one, cached
            beams.append(*self.head.keys_values(newest, rotation))
        embeddings = self.embed(tokens)
        attended = beams.attend(self.head.queries(embeddings, rotation))
        return self.head.finish(attended, embeddings, newest)
