"""The Beagle draft head: one cross-attention block (paper §4.1, in the shifted form).

Slot i holds the key and value of the target's state h_i and the query of the embedding e(t_{i+1});
its output stands in for h_{i+1} and so predicts t_{i+2}:

    y = CrossAttn(query = e(t_{i+1}); keys, values = h_0 … h_i) + e(t_{i+1}) + newest(h_i)
    ĥ_{i+1} = MLP(norm(y) + token(t_{i+1})) + y

Query and key of a slot share RoPE index i. Ours are ``newest``, the newest visible state, and ``token``, the
embedding, both normed and scaled per channel: so that the block need not spend attention on finding that state,
and its MLP sees the token, which in y drowns among states several times as large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beagle.drafters.block import Block, BlockConfig, LevelView, Rotation, register


@dataclass(frozen=True)
class HeadConfig(BlockConfig):
    """Everything that fixes a Beagle head's shape."""

    newest_state: Literal["none", "scale"] = "scale"  # none, and no token in the MLP: the paper's block
    token_in_mlp: bool = True

    removed: ClassVar[dict[str, Any]] = {"concat": True, "experts": 0}

    def __post_init__(self) -> None:
        if self.newest_state not in ("none", "scale"):
            raise ValueError(f"newest_state is none or scale, not {self.newest_state!r}")


@register("beagle")
class BeagleHead(Block):
    """The block alone; embeddings and LM head are the target's, frozen and shared."""

    config_class = HeadConfig
    config: HeadConfig

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        d = config.hidden_size
        self.embedding_norm = nn.RMSNorm(d, config.norm_eps)
        self.state_norm = nn.RMSNorm(d, config.norm_eps)
        self._add_attention()
        if config.newest_state == "scale":
            self.newest = nn.Parameter(torch.full((d,), 0.5))
        if config.token_in_mlp:
            self.token = nn.Parameter(torch.full((d,), 0.5))
        self._add_mlp()
        self._initialise()

    def known(self, tokens: list[int], states: Tensor, newest: Tensor) -> tuple[list[int], Tensor]:
        """A slot's key is that of its state alone: known as soon as the target has run the token."""
        return tokens, states

    def remember(
        self, tokens: Tensor, states: Tensor, rotation: Rotation, embed: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        return self.keys_values(states, rotation)

    def level(self, seen: LevelView, embeddings: Tensor, newest: Tensor) -> Tensor:
        """A predicted state's key is made when a descendant needs it, so the deepest level's never are."""
        rotation = seen.rotation()
        if seen.level > 1:  # the root's state is the target's own, cached
            seen.append(*self.keys_values(newest, rotation))
        attended = seen.attend(self.queries(embeddings, rotation))
        return self.finish(attended, embeddings, newest)

    def queries(self, embeddings: Tensor, rotation: Rotation) -> Tensor:
        """``[..., n, hidden]`` -> ``[..., heads, n, head_dim]``."""
        return super().queries(self.embedding_norm(embeddings), rotation)

    def keys_values(self, states: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """``[..., n, hidden]`` -> two of ``[..., kv_heads, n, head_dim]``."""
        return super().keys_values(self.state_norm(states), rotation)

    def finish(self, attended: Tensor, embeddings: Tensor, newest: Tensor) -> Tensor:
        """Residual, newest state and MLP: ``[..., heads, n, head_dim]`` -> predicted states ``[..., n, hidden]``."""
        y = self._output(attended) + embeddings
        if self.config.newest_state != "none":
            normed = F.rms_norm(newest, newest.shape[-1:], eps=self.config.norm_eps)
            y = y + self._drop(self._from_newest(normed))
        x = self.mlp_norm(y)
        if self.config.token_in_mlp:
            x = x + self.token * F.rms_norm(embeddings, embeddings.shape[-1:], eps=self.config.norm_eps)
        return self._feed_forward(y, x)

    def _from_newest(self, normed: Tensor) -> Tensor:
        return normed * self.newest
