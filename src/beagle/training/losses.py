"""The losses of paper §4.2, computed so that the logits of all slots never exist at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROUND = 64  # of slots: products of few shapes, as oneDNN keeps what it made for each
CHUNK = 512  # slots whose logits exist at a time: fewer are slower products, more are slower memory


class _SoftCrossEntropy(torch.autograd.Function):
    """Σ_r weight_r · CE(p_r, q_r); the LM head is frozen, so its input's gradient is made at once."""

    @staticmethod
    def forward(
        ctx: Any, predicted: Tensor, true: Tensor, head: Tensor, weights: Tensor, bias: Tensor | None
    ) -> Tensor:
        real = len(predicted)
        predicted, true = (F.pad(x, (0, 0, 0, -real % ROUND)) for x in (predicted, true))
        weights = F.pad(weights, (0, -real % ROUND))
        total = predicted.new_zeros(())
        gradient = torch.empty_like(predicted)
        for at in range(0, len(predicted), CHUNK):
            chunk = slice(at, at + CHUNK)
            log_q = F.log_softmax(F.linear(predicted[chunk], head, bias).float(), dim=-1)
            p = F.softmax(F.linear(true[chunk], head, bias).float(), dim=-1)
            total += -(weights[chunk] * torch.linalg.vecdot(p, log_q)).sum()
            error = log_q.exp_().sub_(p).mul_(weights[chunk, None])
            gradient[chunk] = error.to(head.dtype) @ head
        ctx.save_for_backward(gradient[:real])
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0], None, None, None, None


def soft_cross_entropy(
    predicted: Tensor, true: Tensor, head: Tensor, weights: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the draft's distribution against the target's, both over the draft vocabulary.

    Args:
        predicted: states ``[slots, hidden]``.
        true: the target's, ``[slots, hidden]``.
        head: rows of the LM head, ``[draft_vocab, hidden]``.
        weights: of the slots, ``[slots]``.
        bias: ``[draft_vocab]`` of the LM head, where it has one.

    Returns:
        The weighted sum, a scalar.
    """
    out: Tensor = _SoftCrossEntropy.apply(predicted, true, head, weights, bias)
    return out


def regression(predicted: Tensor, true: Tensor, weights: Tensor) -> Tensor:
    """Smooth-L1 between states (EAGLE's "vloss"), mean over channels, weighted sum over slots."""
    per_slot = F.smooth_l1_loss(predicted.float(), true.float(), reduction="none").mean(-1)
    return (weights * per_slot).sum()
