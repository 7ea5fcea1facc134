"""Drafting with the Beagle head: cached keys of true states, lazily added keys of predicted ones."""

from __future__ import annotations

from torch import Tensor

from beagle.drafters.head import BeagleHead
from beagle.drafters.tree import TreeDrafter


class BeagleDrafter(TreeDrafter):
    """A slot's key is that of its state alone: known as soon as the target has run the token.

    A predicted state's key is made when a descendant needs it, so the deepest level's never are.
    """

    head: BeagleHead

    def _remember(self, tokens: list[int], states: Tensor) -> tuple[Tensor, Tensor]:
        return self.head.keys_values(states, self._rotation(self.keys, self.keys + len(tokens)))

    def _level(self, level: int, tokens: Tensor, newest: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        rotation = self._slot(level)
        if level > 1 and self.head.config.concat:  # the root's state is a true one, cached
            mask = self._append(*self.head.keys_values(newest, rotation), mask)
        embeddings = self.embed(tokens)
        attended = self._attend(self.head.queries(embeddings, rotation), mask)
        return self.head.finish(attended, embeddings, newest), mask
