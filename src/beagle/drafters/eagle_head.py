"""The EAGLE draft head (EAGLE, arXiv 2401.15077; EAGLE-2, arXiv 2406.16858, has the same): one
self-attention decoder layer over fused features, the baseline that the paper compares with.

Slot i holds the feature x_i of the target's state h_i and the token t_{i+1}; its output stands in for
h_{i+1} and so predicts t_{i+2}:

    x_i = FC([e(t_{i+1}); h_i])            FC of size 2d x d, with bias
    y = SelfAttn(x_i; x_0 … x_i) + x_i
    ĥ_{i+1} = MLP(y) + y

As published, the layer has no norm before its attention, as first layers have in EAGLE (FC's output
goes in as it is), and none behind it: the target's LM head applies to ĥ directly. The MLP has the
target's pre-norm. While drafting, ĥ is fed back through FC with the drafted token.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from beagle.drafters.block import Block, BlockConfig, LevelView, Rotation, register


@dataclass(frozen=True)
class EagleConfig(BlockConfig):
    """Everything that fixes an EAGLE head's shape: a block's settings, and no more."""


class FeatureHead(Block):
    """A draft head with self-attention over features, which a state and the token behind it make.

    ``queries`` and ``keys_values`` take features.
    """

    @abstractmethod
    def features(self, embeddings: Tensor, states: Tensor) -> Tensor:
        """What a slot's query, key, value and residual are made of.

        Args:
            embeddings: of the tokens t_{i+1}, ``[..., n, hidden]``.
            states: h_i, fused or predicted, ``[..., n, hidden]``.

        Returns:
            ``[..., n, features]``, however wide the head makes them, in the states' dtype.
        """

    @abstractmethod
    def finish(self, attended: Tensor, features: Tensor) -> Tensor:
        """Residual and MLP.

        Args:
            attended: attention's output, ``[..., heads, n, head_dim]``.
            features: of the queries' slots, ``[..., n, features]``.

        Returns:
            Predicted states ``[..., n, hidden]``.
        """

    def known(self, tokens: list[int], states: Tensor, newest: Tensor) -> tuple[list[int], Tensor]:
        """A slot's key needs the token behind its state, so the newest slot waits for the next token.

        Its key with the root token is a draft's first entry; once that token is known to the target, it is made again.
        """
        before = torch.cat([newest, states[:-1]])  # h_i of the slots whose t_{i+1} is now known
        return tokens[len(tokens) - len(before) :], before

    def remember(
        self, tokens: Tensor, states: Tensor, rotation: Rotation, embed: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        return self.keys_values(self.features(embed(tokens), self.fuse(states)), rotation)

    def level(self, seen: LevelView, embeddings: Tensor, newest: Tensor) -> Tensor:
        """Every node has a key of its own."""
        rotation = seen.rotation()
        features = self.features(embeddings, newest if seen.level > 1 else self.fuse(newest))
        seen.append(*self.keys_values(features, rotation))
        attended = seen.attend(self.queries(features, rotation), slice(None))
        return self.finish(attended, features)


@register("eagle")
class EagleHead(FeatureHead):
    """FC and the decoder layer; embeddings and LM head are the target's, frozen and shared."""

    config_class = EagleConfig
    config: EagleConfig

    def __init__(self, config: EagleConfig) -> None:
        super().__init__(config)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self._add_fusion()
        self._add_attention()
        self._add_mlp()
        self._initialise()

    def features(self, embeddings: Tensor, states: Tensor) -> Tensor:
        """x, as wide as a hidden state."""
        x: Tensor = self.fc(torch.cat([embeddings, states], dim=-1))
        return x.to(states.dtype)  # under autocast, too, the residual has the states' precision

    def finish(self, attended: Tensor, features: Tensor) -> Tensor:
        y = self._output(attended) + features
        return self._feed_forward(y, self.mlp_norm(y))
