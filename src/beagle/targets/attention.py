"""One attention function for every family, installed through transformers' attention interface.

transformers hands every layer's fresh queries, keys and values (RoPE applied) to the function named
by ``config._attn_implementation``. Ours writes keys and values into the preallocated cache of the
pass under way and attends to them, so no modelling file is forked and no cache class is involved.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beagle.errors import BeagleError
from beagle.hf import AttentionInterface
from beagle.limits import MAX_NODES
from beagle.targets.cache import KVCache

NAME = "beagle"
WINDOW = "beagle_window"  # attribute of an attention module: its sliding window, None for the whole context
FOLDED = MAX_NODES + 1  # queries, a tree's at most: prompts have masks too large to repeat


class Pass:
    """One forward pass: where fresh keys go, and which keys each query sees."""

    _is_prompt = False  # a whole prompt and nothing before it

    def __init__(
        self,
        cache: KVCache,
        *,
        slots: slice | Tensor,
        key_positions: Tensor,
        query_positions: Tensor,
        visible: Tensor | None = None,
    ) -> None:
        """
        Args:
            cache: written in place.
            slots: where the fresh keys of every sequence go.
            key_positions: RoPE positions of the key slots, ``[batch or 1, keys]``.
            query_positions: RoPE positions of the queries, ``[batch or 1, queries]``.
            visible: bool ``[batch or 1, queries, keys]``; None: keys at the query's position and before it.
                Sliding windows are added per layer.
        """
        self.cache = cache
        self.slots = slots
        self.key_positions = key_positions
        self.query_positions = query_positions
        self._visible = visible
        self._is_prompt = visible is None and key_positions.shape[1] == query_positions.shape[1]
        self._masks: dict[int | None, Tensor] = {}
        self._folded_masks: dict[tuple[int | None, int], Tensor] = {}

    @property
    def visible(self) -> Tensor:
        """Bool ``[batch or 1, queries, keys]``; of a prompt it is made when a mask is asked for."""
        if self._visible is None:
            self._visible = self.key_positions[:, None] <= self.query_positions[:, :, None]
        return self._visible

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``[batch, kv_heads, queries, head_dim]``; return all keys and values in view."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[:, :, self.slots] = key
        values[:, :, self.slots] = value
        end = (self.key_positions if self._visible is None else self._visible).shape[-1]
        return keys[:, :, :end], values[:, :, :end]

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask ``[batch or 1, 1, queries, keys]``, built once per window size."""
        if window not in self._masks:
            seen = self.visible
            if window is not None:
                seen = seen & (self.key_positions[:, None, :] > self.query_positions[:, :, None] - window)
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            self._masks[window] = mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
        return self._masks[window]

    def _folded_mask(self, window: int | None, groups: int, mask: Tensor) -> Tensor:
        """``mask`` once for each head of a group, ``[batch or 1, 1, groups * queries, keys]``."""
        if (window, groups) not in self._folded_masks:
            self._folded_masks[window, groups] = mask.repeat(1, 1, groups, 1)
        return self._folded_masks[window, groups]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Attention output ``[batch, heads, queries, value_dim]``."""
        batch, heads, n, dim = query.shape
        kv_heads = key.shape[1]
        groups = heads // kv_heads
        if self._is_prompt and softcap is None and (window is None or n <= window):  # no mask, no memory of n²
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1
            )
        mask = self.mask(window, query.dtype)
        if softcap is None and groups > 1 and n <= FOLDED:
            # the query heads of a group become rows, so that keys are read once, not once a head
            folded = query.reshape(batch, kv_heads, groups * n, dim)
            if n > 1:
                mask = self._folded_mask(window, groups, mask)
            out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
            return out.reshape(batch, heads, n, -1)
        if softcap is None:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=scaling, enable_gqa=groups > 1
            )
        grouped = query.reshape(batch, kv_heads, groups, n, dim)
        return unfused(grouped, key[:, :, None], value[:, :, None], mask[:, :, None], scaling, softcap).reshape(
            batch, heads, n, -1
        )


class ExactPass(Pass):
    """The shape-stable form: bit-equal results however many drafted rows share the pass.

    A query at position p sees its keys in two parts, cut at a place that depends on p alone: those
    below the cut are shared by all rows and lie in position order; the last ones are gathered per
    row in path order, since a node's ancestors stand at scattered slots. The numbers of rows and of
    keys never change within a generation, and keys that a query doesn't see get probability 0, which
    adds nothing: so every sum runs over the same numbers in the same order, alone or in a tree.
    """

    def __init__(self, cache: KVCache, *, keys: int, tail_slots: Tensor, cuts: Tensor, **kwargs: Any) -> None:
        """
        Args:
            keys: padded number of shared keys.
            tail_slots: ``[rows, tail]`` slots of positions cut, cut + 1, … on each query's path.
            cuts: ``[rows]`` first position of each query's own part.
        """
        super().__init__(cache, **kwargs)
        self._keys = keys
        self.tail_slots = tail_slots
        self._cuts = cuts

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive fp32 mask ``[rows, 1, keys + tail]`` over the shared, then the own keys."""
        if window not in self._masks:
            own = self.query_positions[0][:, None]
            shared = torch.arange(self._keys, device=own.device).expand(len(own), -1)
            tail = self._cuts[:, None] + torch.arange(self.tail_slots.shape[1], device=own.device)
            positions = torch.cat([shared, tail], dim=1)
            seen = torch.cat([shared < self._cuts[:, None], tail <= own], dim=1)
            if window is not None:
                seen = seen & (own - positions < window)
            mask = torch.zeros(seen.shape, device=own.device).masked_fill_(~seen, torch.finfo(dtype).min)
            self._masks[window] = mask[:, None]
        return self._masks[window]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        _, heads, rows, dim = query.shape
        kv_heads, n, tail = key.shape[1], self._keys, self.tail_slots.shape[1]
        groups = heads // kv_heads
        # products in fp32 where the cache is half: the CPU's small half-precision ones take twice as long
        whole = query[0].float().reshape(kv_heads, groups, rows, dim)
        grouped = whole.transpose(1, 2)  # [kv_heads, rows, groups, head_dim]
        flat = grouped.reshape(kv_heads, rows * groups, dim)  # shared keys: one product a head
        own = self.tail_slots.flatten()
        own_keys = key[0].index_select(1, own).float().view(kv_heads, rows, tail, dim)
        own_values = value[0].index_select(1, own).float().view(kv_heads, rows, tail, -1)
        shared = torch.matmul(flat, key[0, :, :n].float().transpose(1, 2)).view(kv_heads, rows, groups, n)
        scores = torch.cat([shared, torch.matmul(grouped, own_keys.transpose(2, 3))], dim=-1)
        mask = self.mask(window, query.dtype)
        if softcap is None:
            scores = torch.add(mask, scores, alpha=scaling)
        else:
            scores = mask + softcap * torch.tanh(scores * (scaling / softcap))
        chances = torch.softmax(scores, dim=-1)
        below = chances[..., :n].view(kv_heads, rows * groups, n)
        out = torch.matmul(below, value[0, :, :n].float()).view(kv_heads, rows, groups, -1)
        out = out + torch.matmul(chances[..., n:], own_values)
        return out.transpose(1, 2).reshape(1, heads, rows, -1).to(query.dtype)


def unfused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """matmul, fp32 softmax, matmul: the one form whose rows do not depend on their neighbours."""
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    probabilities = torch.softmax(scores + mask.float(), dim=-1)
    return torch.matmul(probabilities.to(value.dtype), value)


current_pass: ContextVar[Pass] = ContextVar("current_pass")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; ``query`` is ``[batch, heads, queries, head_dim]``.

    What a layer sees is what its own mask says (``targets.probe`` reads it at load and leaves the window on the
    module); the mask that comes with a call, where there is one, is not read again.
    """
    if s_aux is not None:
        raise BeagleError("this target uses attention sinks, which are not supported yet")
    plan = current_pass.get()
    layer = module.layer_idx
    assert isinstance(layer, int)
    keys, values = plan.write(layer, key, value)
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    window = module.__dict__.get(WINDOW, sliding_window)
    out = plan.attend(query, keys, values, scaling, window, softcap)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)
