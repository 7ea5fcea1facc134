"""A mixture of MLPs in a draft head's block: an ablation of the paper, which accepts more and is slower."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from beagle.drafters.block import BlockConfig

CHOSEN = 2  # experts that answer for a position


class Experts(nn.Module):
    """``count`` gated MLPs of the block's own size; each position takes the two its router prefers.

    All of them compute all positions: a draft has too few for sorting to pay.
    """

    def __init__(self, config: BlockConfig, count: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        d, m = config.hidden_size, config.intermediate_size
        self.activation = activation
        self.router = nn.Linear(d, count, bias=False)
        self.gate_proj = nn.ModuleList(nn.Linear(d, m, bias=False) for _ in range(count))
        self.up_proj = nn.ModuleList(nn.Linear(d, m, bias=False) for _ in range(count))
        self.down_proj = nn.ModuleList(nn.Linear(m, d, bias=False) for _ in range(count))

    def forward(self, x: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
        """``[..., hidden]`` -> ``[..., hidden]``; ``drop``: dropout of the MLPs' middle."""
        likes = self.router(x)
        best = likes.topk(min(CHOSEN, likes.shape[-1]), dim=-1)
        shares = torch.zeros_like(likes).scatter(-1, best.indices, best.values.softmax(-1).to(likes.dtype))
        out = torch.zeros_like(x)
        for i, (gate, up, down) in enumerate(zip(self.gate_proj, self.up_proj, self.down_proj, strict=True)):
            out = out + shares[..., i : i + 1] * down(drop(self.activation(gate(x)) * up(x)))
        return out
