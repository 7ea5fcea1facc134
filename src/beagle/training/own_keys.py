"""Attention of simulated steps: over shared true keys and, per query, the predicted keys of its own window.

As in a fused kernel, the scores of all keys are computed anew in the backward pass and not kept for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
KERNEL_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_with_own(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, own_k: Sequence[Tensor], own_v: Sequence[Tensor]
) -> Tensor:
    """
    Args:
        q: ``[batch, heads, windows, head_dim]``. k, v: ``[batch, kv_heads, n, head_dim]``.
        mask: additive, ``[batch, 1, windows, n]``.
        own_k, own_v: per earlier step ``[batch, kv_heads, windows, head_dim]``.
    Returns:
        ``[batch, heads, windows, head_dim]``.
    """
    if fused(q, k):
        out: Tensor = _OwnKeys.apply(q, k, v, mask, *own_k, *own_v)
        return out
    return again(attend_by_scores, q, k, v, mask, tuple(own_k), tuple(own_v))  # the caller's lists grow meanwhile


def fused(q: Tensor, k: Tensor) -> bool:
    """Whether scores of ``q [batch, heads, …]`` for true keys ``k [batch, kv_heads, …]`` never exist at once."""
    return q.device.type == "cpu" and q.shape[1] == k.shape[1]


def again(attend: Callable[..., Tensor], *of: Any) -> Tensor:
    """A part of attention whose scores are not kept for the backward pass."""
    out: Tensor = checkpoint(attend, *of, use_reentrant=False, preserve_rng_state=False)
    return out


class _OwnKeys(torch.autograd.Function):
    """PyTorch's kernel attends to the true keys; own keys, few for each query, are merged with what it gives.

    With the merged output, and the normaliser of all keys in place of its own, its backward pass gives the true keys'
    share of the gradients.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *own: Tensor) -> Tensor:
        own_k, own_v = own[: len(own) // 2], own[len(own) // 2 :]
        out, normaliser = KERNEL(q, k, v, attn_mask=mask)
        wide = q.to(normaliser.dtype) * q.shape[-1] ** -0.5
        shares = torch.stack([(wide * key).sum(-1) for key in own_k])
        total = torch.logaddexp(normaliser, shares.logsumexp(0))
        shares.sub_(total).exp_()
        merged = out * (normaliser - total).exp()[..., None]
        for share, value in zip(shares, own_v, strict=True):
            merged.addcmul_(share[..., None], value.to(merged.dtype))
        out.copy_(merged)  # laid out as the kernel wants it
        ctx.save_for_backward(q, k, v, mask, out, total, shares, *own)
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (output,) = outputs
        q, k, v, mask, out, total, shares, *own = ctx.saved_tensors
        own_k, own_v = own[: len(own) // 2], own[len(own) // 2 :]
        of_q, of_k, of_v = KERNEL_BACKWARD(output, q, k, v, out, total, 0.0, False, attn_mask=mask)
        scale, wide, of_q = q.shape[-1] ** -0.5, output.to(total.dtype), of_q.to(total.dtype)
        along = (wide * out).sum(-1)
        of_own_k, of_own_v = [], []
        for share, key, value in zip(shares, own_k, own_v, strict=True):
            of_score = (share * ((wide * value).sum(-1) - along) * scale)[..., None]
            of_q.addcmul_(of_score, key.to(of_q.dtype))
            of_own_k.append((of_score * q).to(key.dtype))
            of_own_v.append((share[..., None] * output).to(value.dtype))
        return of_q.to(q.dtype), of_k, of_v, None, *of_own_k, *of_own_v


def attend_by_scores(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, own_k: tuple[Tensor, ...], own_v: tuple[Tensor, ...]
) -> Tensor:
    """The same, written out. Own keys are taken one by one: a stack of them would be as large as all keys of the windows
    together."""
    if (groups := q.shape[1] // k.shape[1]) > 1:
        k, v, *own = (x.repeat_interleave(groups, 1) for x in (k, v, *own_k, *own_v))
        own_k, own_v = tuple(own[: len(own_k)]), tuple(own[len(own_k) :])
    q = q * q.shape[-1] ** -0.5
    wide = q.to(torch.promote_types(q.dtype, torch.float32))  # these products are summed as wide as a matrix product's
    scores = torch.stack([(wide * key).sum(-1) for key in own_k], dim=-1)
    scores = torch.cat([q @ k.transpose(-1, -2) + mask, scores], dim=-1)
    probs = F.softmax(scores.float(), dim=-1).to(v.dtype)
    n = k.shape[2]
    out = probs[..., :n] @ v
    for i, value in enumerate(own_v, n):
        out = out + probs[..., i, None] * value
    return out
