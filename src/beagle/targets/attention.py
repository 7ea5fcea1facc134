"""One attention function for every family, installed through transformers' attention interface.

transformers hands every layer's fresh queries, keys and values (RoPE applied) to the function named
by ``config._attn_implementation``. Ours writes keys and values into the preallocated cache of the
current plan and attends to them, so no modelling file is forked and no cache class is involved.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beagle.hf import AttentionInterface
from beagle.limits import MAX_TREE_TOKENS
from beagle.targets.linears import tiled
from beagle.targets.plan import Plan, Window

NAME = "beagle"
WINDOW = "beagle_window"  # attribute of an attention module: a ``Window``

current_plan: ContextVar[Plan] = ContextVar("current_plan")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; ``query`` is ``[batch, heads, queries, head_dim]``.

    ``s_aux`` are sinks ``[heads]``: one more score for each head, whose value is 0. ``indices`` say which keys each token
    sees of those in view, as ``targets.indexed`` gives them. What a layer sees else is what its own mask says
    (``targets.probe`` reads it at load and leaves the window on the module); the mask that comes with a call, where there is
    one, is not read again.
    """
    plan = current_plan.get()
    layer = plan.named_layer if plan.named_layer is not None else module.layer_idx
    plan.named_layer = None
    assert isinstance(layer, int)
    keys, values = write(plan, layer, key, value)
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    window = module.__dict__[WINDOW]
    if indices is not None:
        mask = plan.masks[window]
        plan = replace(plan, made_masks={window: mask.masked_fill(~indices, torch.finfo(mask.dtype).min)}, folded={})
    out = attend_plan(plan, query, keys, values, scaling, window, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)


def write(plan: Plan, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Store fresh keys and values ``[batch, kv_heads, tokens, head_dim]``; return all in view."""
    keys, values = plan.layers[2 * layer], plan.layers[2 * layer + 1]
    sequences = plan.sequences
    if sequences is not None:
        keys[sequences.sequence, :, plan.slots] = key[0].transpose(0, 1)
        values[sequences.sequence, :, plan.slots] = value[0].transpose(0, 1)
        count = sequences.padding.shape[0]
        return keys[:count, :, : plan.keys], values[:count, :, : plan.keys]
    keys[:, :, plan.slots] = key
    values[:, :, plan.slots] = value
    if plan.tail is not None:
        return keys, values
    return keys[:, :, : plan.keys], values[:, :, : plan.keys]


def attend_plan(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: Window,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """``[batch, heads, tokens, head_dim]`` to ``[batch, heads, tokens, value_dim]``, as the plan has it."""
    compute = attend_exact if plan.tail is not None else attend_trees if plan.sequences is not None else attend
    return compute(plan, query, key, value, scaling, window, softcap, sinks)


def attend(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: Window,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """``[batch, heads, queries, head_dim]`` to ``[batch, heads, queries, value_dim]``."""
    batch, heads, n, dim = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    fused = softcap is None and sinks is None
    if plan.kind == "prompt" and fused and window not in plan.masks:  # no memory of n²
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1)
    mask = plan.masks[window]
    ours = tiled.attends(query, key, value)
    if fused and (groups > 1 or ours) and n <= MAX_TREE_TOKENS:  # masks of prompts are too large to repeat
        # the query heads of a group become queries, so that keys are read once, not once a head
        folded = query.reshape(batch, kv_heads, groups * n, dim)
        if n > 1 or mask.shape[1] > 1:
            mask = _folded(plan, window, groups)
        if ours:
            return tiled.attend(folded, key, value, mask, scaling).reshape(batch, heads, n, -1)
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
        return out.reshape(batch, heads, n, -1)
    if fused:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=groups > 1)
    grouped = query.reshape(batch, kv_heads, groups, n, dim)
    wide = mask[:, :, None].float()
    own = None if sinks is None else sinks.view(kv_heads, groups, 1, 1)
    if n <= MAX_TREE_TOKENS:
        return _scored(grouped, key, value, wide, scaling, softcap, own).reshape(batch, heads, n, -1)
    # a prompt's scores of all heads at once would take too much memory
    parts = [
        _scored(grouped[:, i], key[:, i], value[:, i], wide, scaling, softcap, None if own is None else own[i])
        for i in (slice(head, head + 1) for head in range(kv_heads))
    ]
    return torch.cat(parts, dim=1).reshape(batch, heads, n, -1)


def _scored(
    grouped: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of ``grouped [batch, kv_heads, groups, queries, head_dim]`` with its scores at hand."""
    scores = torch.matmul(grouped, key[:, :, None].transpose(-1, -2)).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.matmul(_weights(scores + mask, sinks).to(value.dtype), value[:, :, None])


def _weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax of scores ``[..., keys]`` in fp32, beside that of each head's sink, to be broadcast to ``[..., 1]``."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    beside = sinks.float().expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, beside], dim=-1), dim=-1)[..., :-1]


def _folded(plan: Plan, window: Window, groups: int) -> Tensor:
    """The window's mask once for each head of a group, ``[batch or 1, kv_heads or 1, groups * queries, keys]``."""
    if (window, groups) not in plan.folded:
        mask = plan.masks[window]
        shared = mask.shape[1] == 1
        plan.folded[window, groups] = (
            mask.repeat(1, 1, groups, 1) if shared else mask.unflatten(1, (-1, groups)).flatten(2, 3)
        )
    return plan.folded[window, groups]


def attend_trees(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: Window,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Queries end to end ``[1, heads, tokens, head_dim]`` to ``[1, heads, tokens, value_dim]``.

    Queries are padded to those of the longest tree; keys and values are those of the sequences, where they are.
    """
    sequences = plan.sequences
    assert sequences is not None
    flat = query[0].transpose(0, 1)  # [tokens, heads, head_dim]
    padded = flat.unflatten(0, sequences.padding.shape) if sequences.full else flat[sequences.padding]
    out = (
        attend(plan, padded.transpose(1, 2), key, value, scaling, window, softcap, sinks).transpose(1, 2).flatten(0, 1)
    )
    return (out if sequences.full else out[sequences.place]).transpose(0, 1)[None]


def attend_exact(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: Window,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """``[1, heads, tokens, head_dim]`` to ``[1, heads, tokens, value_dim]``, as of ``plan.of_exact_tree``."""
    assert plan.tail is not None
    _, heads, tokens, dim = query.shape
    kv_heads, n, tail = key.shape[1], plan.keys, plan.tail.shape[1]
    groups = heads // kv_heads
    # products in fp32 where the cache is half: the CPU's small half-precision ones take twice as long
    whole = query[0].float().reshape(kv_heads, groups, tokens, dim)
    grouped = whole.transpose(1, 2)  # [kv_heads, tokens, groups, head_dim]
    flat = grouped.reshape(kv_heads, tokens * groups, dim)  # shared keys: one product a head
    own = plan.tail.flatten()
    own_keys = key[0].index_select(1, own).float().view(kv_heads, tokens, tail, dim)
    own_values = value[0].index_select(1, own).float().view(kv_heads, tokens, tail, -1)
    shared = torch.matmul(flat, key[0, :, :n].float().transpose(1, 2)).view(kv_heads, tokens, groups, n)
    scores = torch.cat([shared, torch.matmul(grouped, own_keys.transpose(2, 3))], dim=-1)
    mask = plan.masks[window]
    if mask.shape[1] > 1:  # heads have biases of their own
        mask = mask.view(tokens, kv_heads, groups, -1).transpose(0, 1)
    if softcap is None:
        scores = torch.add(mask, scores, alpha=scaling)
    else:
        scores = mask + softcap * torch.tanh(scores * (scaling / softcap))
    weights = _weights(scores, sinks if sinks is None else sinks.view(kv_heads, 1, groups, 1))
    below = weights[..., :n].view(kv_heads, tokens * groups, n)
    out = torch.matmul(below, value[0, :, :n].float()).view(kv_heads, tokens, groups, -1)
    out = out + torch.matmul(weights[..., n:], own_values)
    return out.transpose(1, 2).reshape(1, heads, tokens, -1).to(query.dtype)
