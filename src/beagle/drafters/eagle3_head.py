"""The EAGLE-3 draft head (arXiv 2503.01840) with what EAGLE-3.1 changed in it: the stronger baseline.

Slot i holds what three layers of the target, a low, a middle and a high one, put out at token t_i, fused
into g_i, and the token t_{i+1}; its output stands in for h_{i+1} and so predicts t_{i+2}:

    g_i = FC([norm(l_i); norm(m_i); norm(u_i)])      FC of size 3d x d, without bias
    x_i = [norm(e(t_{i+1})); norm(g_i)]              queries, keys and values are made of 2d channels
    y = SelfAttn(x_i; x_0 … x_i) + g_i
    ĥ_{i+1} = norm(MLP(norm(y)) + y)

While drafting, ĥ takes the place of g. From 3.1 are the norm of each layer's output before FC, and that
ĥ is fed back behind its norm, so that one tensor is read by the LM head and by the next step. The top
state is no input: the head is trained on tokens alone, without a regression on states.

Published EAGLE-3 trains an LM head of its own over the draft vocabulary. Here it is the target's, frozen, as
for every head of this package, and the final norm alone is trained: for SmolLM2-135M an LM head of 16,384
tokens would have 9.4 million weights, all of this head has 6.0 million, and heads are compared at one budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from beagle.drafters.block import BlockConfig, Rotation, register
from beagle.drafters.eagle_head import FeatureHead
from beagle.drafters.norm import RMSNorm


@dataclass(frozen=True)
class Eagle3Config(BlockConfig):
    """Everything that fixes an EAGLE-3 head's shape; ``kv_layers`` are the layers that are fused."""

    norm_layers: bool = True  # each layer's output, before FC; without, as EAGLE-3 was published

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kv_layers:
            raise ValueError("an eagle3 head reads at least one layer: kv_layers is empty")

    @classmethod
    def default_kv_layers(cls, count: int) -> tuple[int, ...]:
        """As published: 2, the middle, and the third from the top, as far as a shallow target has them."""
        return tuple(sorted({2, count // 2, count - 3} & {*range(1, count)}))


@register("eagle3")
class Eagle3Head(FeatureHead):
    """Fusion, decoder layer and final norm; embeddings and LM head are the target's, frozen and shared.

    Features are ``[norm(e); norm(g); g]``, 3 x hidden: what attention reads, and the residual.
    """

    config_class = Eagle3Config
    config: Eagle3Config

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)
        d, eps = config.hidden_size, config.norm_eps
        if config.norm_layers:
            self.layer_norms = nn.ModuleList(RMSNorm(d, eps) for _ in config.kv_layers)
        self.layer_proj = nn.Linear(len(config.kv_layers) * d, d, bias=False)
        self.embedding_norm = RMSNorm(d, eps)
        self.state_norm = RMSNorm(d, eps)
        self._add_attention(2 * d)
        self._add_mlp()
        self.final_norm = RMSNorm(d, eps)
        self._initialise()

    def fuse(self, states: Tensor) -> Tensor:
        """g: ``[..., state_size]`` -> ``[..., hidden]``; the top state, the last part, is not read."""
        parts = list(states.split(self.config.hidden_size, dim=-1)[:-1])
        if self.config.norm_layers:
            parts = [norm(part) for norm, part in zip(self.layer_norms, parts, strict=True)]
        g: Tensor = self.layer_proj(torch.cat(parts, dim=-1))
        return g.to(states.dtype)  # under autocast, too, the residual has the states' precision

    def features(self, embeddings: Tensor, states: Tensor) -> Tensor:
        return torch.cat([self.embedding_norm(embeddings), self.state_norm(states), states], dim=-1)

    def queries(self, x: Tensor, rotation: Rotation) -> Tensor:
        """Of features ``[..., n, 3 x hidden]``: ``[..., heads, n, head_dim]``."""
        return super().queries(x[..., : -self.config.hidden_size], rotation)

    def keys_values(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Of features ``[..., n, 3 x hidden]``: two of ``[..., kv_heads, n, head_dim]``."""
        return super().keys_values(x[..., : -self.config.hidden_size], rotation)

    def finish(self, attended: Tensor, features: Tensor) -> Tensor:
        y = self._output(attended) + features[..., -self.config.hidden_size :]
        predicted: Tensor = self.final_norm(self._feed_forward(y, self.mlp_norm(y)))
        return predicted
