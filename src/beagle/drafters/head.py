"""The Beagle draft head: cross-attention blocks, in the paper one (paper §4.1, in the shifted form).

Slot i holds the key and value of the target's state h_i and the query of the embedding e(t_{i+1});
its output stands in for h_{i+1} and so predicts t_{i+2}:

    y = CrossAttn(query = e(t_{i+1}); keys, values = h_0 … h_i) + e(t_{i+1}) + newest(h_i)
    ĥ_{i+1} = MLP(norm(y) + token(t_{i+1})) + y

Query and key of a slot share RoPE index i. Ours are ``newest``, the newest visible state, and ``token``, the
embedding, both normed and scaled per channel: so that the block need not spend attention on finding that state,
and its MLP sees the token, which in y drowns among states several times as large.

Ours, too, are states of several target layers (``kv_layers``), fused into one, of which a predicted state takes the
place; and ``blocks``: further ones query the same states with what the one before them made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from beagle.drafters.block import Block, BlockConfig, Layer, LevelView, Rotation, register
from beagle.drafters.norm import RMSNorm, rms_norm


@dataclass(frozen=True)
class HeadConfig(BlockConfig):
    """Everything that fixes a Beagle head's shape."""

    newest_state: Literal["none", "scale"] = "scale"  # none, and no token in the MLP: the paper's block
    token_in_mlp: bool = True
    blocks: int = 1  # one behind the other; the paper has one

    removed: ClassVar[dict[str, Any]] = {"concat": True, "experts": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.newest_state not in ("none", "scale"):
            raise ValueError(f"newest_state is none or scale, not {self.newest_state!r}")
        if not 1 <= self.blocks <= 8:
            raise ValueError(f"blocks is a number from 1 to 8, not {self.blocks}")

    @property
    def cached_heads(self) -> int:
        return self.blocks * self.num_kv_heads


class FurtherBlock(Layer):
    """A block behind the first: its queries come from the one before it, its keys and values from the states, too."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        self.query_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.state_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self._add_attention()
        self._add_mlp()

    def queries(self, x: Tensor, rotation: Rotation) -> Tensor:
        return super().queries(self.query_norm(x), rotation)

    def keys_values(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        return super().keys_values(self.state_norm(x), rotation)

    def finish(self, attended: Tensor, x: Tensor) -> Tensor:
        """Residual and MLP: ``[..., heads, n, head_dim]`` and the block's input to ``[..., n, hidden]``."""
        y = self._output(attended) + x
        return self._feed_forward(y, self.mlp_norm(y))


@register("beagle")
class BeagleHead(Block):
    """The blocks alone; embeddings and LM head are the target's, frozen and shared."""

    config_class = HeadConfig
    config: HeadConfig

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        d = config.hidden_size
        self.embedding_norm = RMSNorm(d, config.norm_eps)
        self.state_norm = RMSNorm(d, config.norm_eps)
        self._add_fusion()
        self._add_attention()
        if config.newest_state == "scale":
            self.newest = nn.Parameter(torch.full((d,), 0.5))
        if config.token_in_mlp:
            self.token = nn.Parameter(torch.full((d,), 0.5))
        self._add_mlp()
        self.further = nn.ModuleList(FurtherBlock(config) for _ in range(1, config.blocks))
        self._initialise()

    def known(self, tokens: list[int], states: Tensor, newest: Tensor) -> tuple[list[int], Tensor]:
        """A slot's key is that of its state alone: known as soon as the target has run the token."""
        return tokens, states

    def remember(
        self, tokens: Tensor, states: Tensor, rotation: Rotation, embed: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        return self.keys_values(self.fuse(states), rotation)

    def level(self, seen: LevelView, embeddings: Tensor, newest: Tensor) -> Tensor:
        """A predicted state's key is made when a descendant needs it, so the deepest level's never are."""
        rotation = seen.rotation()
        if seen.level > 1:
            seen.append(*self.keys_values(newest, rotation))
        else:  # the root's state is the target's own, its key cached
            newest = self.fuse(newest)
        return self.predict(seen.attend, rotation, embeddings, newest)

    def predict(
        self, attend: Callable[[Tensor, slice], Tensor], rotation: Rotation, embeddings: Tensor, newest: Tensor
    ) -> Tensor:
        """All blocks.

        Args:
            attend: attention of queries ``[..., heads, n, head_dim]`` over some of the cached heads.
            rotation: RoPE of the queries.
            embeddings: ``[..., n, hidden]``.
            newest: the state before each, fused or predicted, ``[..., n, hidden]``.

        Returns:
            Predicted states ``[..., n, hidden]``.
        """
        heads = self.config.num_kv_heads
        y = self.finish(attend(self.queries(embeddings, rotation), slice(0, heads)), embeddings, newest)
        for i, block in enumerate(self.further, 1):
            assert isinstance(block, FurtherBlock)
            y = block.finish(attend(block.queries(y, rotation), slice(i * heads, (i + 1) * heads)), y)
        return y

    def queries(self, embeddings: Tensor, rotation: Rotation) -> Tensor:
        """``[..., n, hidden]`` -> ``[..., heads, n, head_dim]``."""
        return super().queries(self.embedding_norm(embeddings), rotation)

    def keys_values(self, states: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Of fused or predicted states ``[..., n, hidden]``, for all blocks: two of ``[..., cached_heads, n, head_dim]``."""
        k, v = super().keys_values(self.state_norm(states), rotation)
        for block in self.further:
            assert isinstance(block, FurtherBlock)
            more_k, more_v = block.keys_values(states, rotation)
            k, v = torch.cat([k, more_k], dim=-3), torch.cat([v, more_v], dim=-3)
        return k, v

    def finish(self, attended: Tensor, embeddings: Tensor, newest: Tensor) -> Tensor:
        """Residual, newest state and MLP: ``[..., heads, n, head_dim]`` -> predicted states ``[..., n, hidden]``."""
        y = self._output(attended) + embeddings
        if self.config.newest_state != "none":
            normed = rms_norm(newest, self.config.norm_eps)
            y = y + self._drop(self._from_newest(normed))
        x = self.mlp_norm(y)
        if self.config.token_in_mlp:
            x = x + self.token * rms_norm(embeddings, self.config.norm_eps)
        return self._feed_forward(y, x)

    def _from_newest(self, normed: Tensor) -> Tensor:
        return normed * self.newest
