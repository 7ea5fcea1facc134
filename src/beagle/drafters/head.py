"""The Beagle draft head: one cross-attention block (paper §4.1, in the shifted form).

Slot i holds the key and value of the target's state h_i and the query of the embedding e(t_{i+1});
its output stands in for h_{i+1} and so predicts t_{i+2}:

    y = CrossAttn(query = e(t_{i+1}); keys, values = h_0 … h_i) + e(t_{i+1}) + newest(h_i)
    ĥ_{i+1} = MLP(y) + y

Query and key of a slot share RoPE index i. ``newest`` is ours: the newest visible state, normed and
scaled per channel, so that the block need not spend attention on finding it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

Newest = Literal["none", "scale", "linear"]


@dataclass(frozen=True)
class HeadConfig:
    """Everything that fixes a head's shape; derived from any target's config by ``for_target``."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    target_vocab_size: int
    hidden_act: str = "silu"
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    newest_state: Newest = "scale"
    draft_vocab_size: int | None = None  # None: the target's whole vocabulary
    concat: bool = True  # False: predicted keys are never appended (paper A.4)

    @classmethod
    def for_target(cls, target: Any, **overrides: Any) -> HeadConfig:
        """The target's own conventions, with as many KV heads as query heads (see the ablation)."""
        config = target.config
        heads = config.num_attention_heads
        rope = getattr(config, "rope_parameters", None) or {}
        if "full_attention" in rope:
            rope = rope["full_attention"]
        act = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None) or "silu"
        settings: dict[str, Any] = {
            "hidden_size": target.hidden_size,
            "num_heads": heads,
            "num_kv_heads": heads,
            "head_dim": getattr(config, "head_dim", None) or target.hidden_size // heads,
            "intermediate_size": getattr(config, "intermediate_size", None) or 4 * target.hidden_size,
            "target_vocab_size": target.vocab_size,
            "hidden_act": act,
            "norm_eps": float(getattr(config, "rms_norm_eps", 1e-6)),
            "rope_theta": float(rope.get("rope_theta", 10_000.0)),
        }
        return cls(**{**settings, **overrides})


class BeagleHead(nn.Module):
    """The block alone; embeddings and LM head are the target's, frozen and shared."""

    draft_vocab: Tensor
    frequencies: Tensor

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.dropout = 0.0  # while training: of attention's output, the newest state and the MLP's middle
        d, wide = config.hidden_size, config.num_heads * config.head_dim
        narrow = config.num_kv_heads * config.head_dim
        self.embedding_norm = nn.RMSNorm(d, config.norm_eps)
        self.state_norm = nn.RMSNorm(d, config.norm_eps)
        self.q_proj = nn.Linear(d, wide, bias=False)
        self.k_proj = nn.Linear(d, narrow, bias=False)
        self.v_proj = nn.Linear(d, narrow, bias=False)
        self.o_proj = nn.Linear(wide, d, bias=False)
        if config.newest_state == "scale":
            self.newest = nn.Parameter(torch.full((d,), 0.5))
        elif config.newest_state == "linear":
            self.newest_proj = nn.Linear(d, d, bias=False)
        self.mlp_norm = nn.RMSNorm(d, config.norm_eps)
        self.gate_proj = nn.Linear(d, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(d, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, d, bias=False)
        self.activation = ACT2FN[config.hidden_act]
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        if config.newest_state == "linear":
            nn.init.eye_(self.newest_proj.weight)
            self.newest_proj.weight.data.mul_(0.5)
        frequencies = config.rope_theta ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)
        size = config.draft_vocab_size or config.target_vocab_size
        self.register_buffer("draft_vocab", torch.arange(size))  # draft id -> target id

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """RoPE of ``positions [..., n]``: cosines and sines, ``[..., 1, n, head_dim]``."""
        angle = positions[..., None, :, None].float() * self.frequencies
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def queries(self, embeddings: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """``[..., n, hidden]`` -> ``[..., heads, n, head_dim]``."""
        q = self.q_proj(self.embedding_norm(embeddings))
        return rotate(q.unflatten(-1, (self.config.num_heads, -1)).transpose(-3, -2), rotation)

    def keys_values(self, states: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """``[..., n, hidden]`` -> two of ``[..., kv_heads, n, head_dim]``."""
        normed = self.state_norm(states)
        k = self.k_proj(normed).unflatten(-1, (self.config.num_kv_heads, -1)).transpose(-3, -2)
        v = self.v_proj(normed).unflatten(-1, (self.config.num_kv_heads, -1)).transpose(-3, -2)
        return rotate(k, rotation), v

    def finish(self, attended: Tensor, embeddings: Tensor, newest: Tensor) -> Tensor:
        """Residual, newest state and MLP: ``[..., heads, n, head_dim]`` -> predicted states ``[..., n, hidden]``."""
        y = self.o_proj(self._drop(attended.transpose(-3, -2).flatten(-2))) + embeddings
        if self.config.newest_state != "none":
            normed = F.rms_norm(newest, newest.shape[-1:], eps=self.config.norm_eps)
            linear = self.config.newest_state == "linear"
            y = y + self._drop(self.newest_proj(normed) if linear else normed * self.newest)
        x = self.mlp_norm(y)
        return y + self.down_proj(self._drop(self.activation(self.gate_proj(x)) * self.up_proj(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout and self.training else x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax attention; mask additive, broadcast to ``[..., heads, queries, keys]``."""
        shared = self.config.num_heads != self.config.num_kv_heads
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Apply RoPE to ``[..., heads, n, head_dim]``."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin
