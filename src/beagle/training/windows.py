"""Two-Stage Block-Attention Training: which slot sees what (paper §4.2, A.2, A.3).

In slots (see ``drafters.head``): a window of base b covers slots b … b+k-1; its true keys are those
of slots <= b. A batch brings ``first`` and ``last``, the slots of each sample that bear a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from beagle.drafters.block import Layer
from beagle.drafters.head import BeagleHead
from beagle.training.own_keys import again, attend_by_scores, attend_with_own, fused

MASK = 2**24  # most entries of a mask, and
SCORES = 2**21  # most scores of queries and keys, of all heads, that exist at a time: more are made part by part
GPU_SCORES = 2**25  # the same where a product takes less time than its start
ROUND = 16  # lengths: products of few shapes, as oneDNN keeps what it made for each

Part = tuple[Tensor, Tensor, Tensor]  # predicted states [batch, m, hidden], their slots [batch, m], which are real


@dataclass(frozen=True)
class Batch:
    """Padded samples.

    Attributes:
        embeddings: ``[batch, n, hidden]`` e(t_i), frozen.
        states: ``[batch, n, state_size]`` hidden states h_i, the top ones behind those of other layers.
        first: ``[batch]`` first slot that bears a loss (prompt length - 1).
        last: ``[batch]`` last such slot (tokens - 2: its output is compared with h_{last+1}).
        longest: most slots of a sample that bear a loss, where this is a part of a larger batch and padded as that is.
    """

    embeddings: Tensor
    states: Tensor
    first: Tensor
    last: Tensor
    longest: int | None = None

    @property
    def most_slots(self) -> int:
        """Most slots of a sample that bear a loss."""
        return int((self.last - self.first).max()) + 1 if self.longest is None else self.longest

    @property
    def top(self) -> Tensor:
        """The top states, ``[batch, n, hidden]``."""
        return self.states[..., -self.embeddings.shape[-1] :]

    def pick(self, source: Tensor, index: Tensor) -> Tensor:
        """Vectors of ``source [batch, n, hidden]`` at ``index [batch, m]``."""
        index = index.clamp(0, source.shape[1] - 1)
        return source.gather(1, index[..., None].expand(-1, -1, source.shape[-1]))


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Bool mask to additive."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


def bases(batch: Batch, window: int, offset: int) -> Tensor:
    """The first slots of all whole windows, ``[batch, windows]``; those beyond ``last`` are padding."""
    skipped = (-offset) % window
    start = batch.first + skipped
    slots = round_up(max(1, batch.most_slots - skipped), ROUND)
    count = -(-slots // window)
    return start[:, None] + torch.arange(count, device=start.device) * window


def early(head: BeagleHead, batch: Batch, keys_from: Tensor, window: int, offset: int) -> Part:
    """Inverse block attention: every slot of a window sees the true keys up to its base only.

    Args:
        keys_from: the (noised) states ``[batch, n, state_size]`` that keys, values and newest states come from.
        window: k.
        offset: ε in [0, k).
    Returns:
        Predicted states ``[batch, m, hidden]``, their slots ``[batch, m]``, and which of them are
        real, bool ``[batch, m]``.
    """
    steps = torch.arange(span(batch), device=batch.states.device)
    return seeing(head, batch, keys_from, batch.first[:, None] + (steps + offset) // window * window - offset)


def span(batch: Batch) -> int:
    """Most slots of a sample that bear a loss, rounded up."""
    return round_up(batch.most_slots, ROUND)


def slot_counts(first: Tensor, last: Tensor, window: int, offset: int, steps: int) -> list[int]:
    """How many slots bear a loss in each step of the chains from ``bases``, of a batch that need not be there.

    Args:
        first: ``[batch]``, as of ``Batch``.
        last: likewise.
        window: distance of bases.
        offset: ε in [0, window).
        steps: of each chain.
    """
    start = first + (-offset) % window
    return [int(((last - start - step) // window + 1).clamp(min=0).sum()) for step in range(steps)]


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def seeing(head: BeagleHead, batch: Batch, keys_from: Tensor, base: Tensor) -> Part:
    """One pass over all slots from ``first`` on, each seeing true keys up to ``base [batch, m]``."""
    n, m = batch.states.shape[1], base.shape[1]
    slots = batch.first[:, None] + torch.arange(m, device=batch.states.device)
    real = slots <= batch.last[:, None]
    base = base.clamp(min=0)
    everywhere = torch.arange(n, device=slots.device)
    keys_from = head.fuse(keys_from)
    k, v = head.keys_values(keys_from, head.rotation(everywhere[None], keys_from.dtype))
    embeddings = batch.pick(batch.embeddings, slots + 1)
    true = TrueKeys(k, v, base, head.config.num_kv_heads)

    def attend(q: Tensor, heads: slice) -> Tensor:
        return true.attend(head, q, heads)

    rotation = head.rotation(slots, embeddings.dtype)
    return head.predict(attend, rotation, embeddings, batch.pick(keys_from, base)), slots, real


def late(head: BeagleHead, batch: Batch, keys_from: Tensor, window: int, offset: int, steps: int) -> list[Part]:
    """Simulated inference, sliced: step i computes slot b+i-1 of each window only (the paper's l = i).

    It sees the true keys up to b and the i-1 states that earlier steps of its own window predicted;
    gradients flow through them. Memory is that of one ordinary pass for any number of steps.

    Returns:
        Per step: predicted states ``[batch, windows, hidden]``, slots, and which are real.
    """
    base = bases(batch, window, offset)
    everywhere = torch.arange(batch.states.shape[1], device=base.device)
    keys_from = head.fuse(keys_from)
    k, v = head.keys_values(keys_from, head.rotation(everywhere[None], keys_from.dtype))
    true = TrueKeys(k, v, base, head.config.num_kv_heads)
    newest = batch.pick(keys_from, base)  # [batch, windows, hidden]
    own: list[list[tuple[Tensor, Tensor]]] = [[] for _ in true.k]  # by block, a key and a value of each earlier step
    out: list[Part] = []

    def attend(q: Tensor, heads: slice) -> Tensor:
        own_k, own_v = zip(*own[true.block(heads)], strict=True) if own[0] else ((), ())
        return true.attend(head, q, heads, own_k, own_v)

    for step in range(1, steps + 1):
        slots = base + step - 1
        embeddings = batch.pick(batch.embeddings, slots + 1)
        rotation = head.rotation(slots, embeddings.dtype)
        if step > 1:
            key, value = head.keys_values(newest, rotation)  # of the state predicted for this slot
            for of, some_k, some_v in zip(own, *true.by_block(key.to(value.dtype), value), strict=True):
                of.append((some_k, some_v))
        newest = head.predict(attend, rotation, embeddings, newest)
        out.append((newest, slots, slots <= batch.last[:, None]))
    return out


class TrueKeys:
    """Keys and values of the true states, and up to which slot each query sees them.

    Of long samples, queries are taken part by part, and what a part needs is computed anew in the backward pass: the
    memory of a step grows with the length of a sample, not with its square.

    Keys and queries have the dtype of the values, which autocast makes bf16: products would make them so, each by a copy
    of its own that autograd keeps.
    """

    def __init__(self, k: Tensor, v: Tensor, base: Tensor, heads: int) -> None:
        """
        Args:
            k, v: ``[batch, cached_heads, n, head_dim]``.
            base: the last slot that each query sees, ``[batch, queries]``.
            heads: of the keys that each query meets.
        """
        k = k.to(v.dtype)  # products copy keys of another dtype, and keys that are not contiguous
        self.heads, self.base = heads, base
        self.k, self.v = ([part.contiguous() for part in x] for x in self.by_block(k, v))

    def by_block(self, *of: Tensor) -> list[tuple[Tensor, ...]]:
        """Each of some tensors ``[batch, cached_heads, …]`` as one for each block of the head."""
        return [x.split(self.heads, 1) for x in of]

    def block(self, heads: slice) -> int:
        """The one that these of the cached heads belong to."""
        return (heads.start or 0) // self.heads

    @cached_property
    def mask(self) -> Tensor:
        """Additive, ``[batch, 1, queries, n]``."""
        return up_to(self.base, self.k[0])

    def attend(
        self,
        head: Layer,
        q: Tensor,
        heads: slice = slice(None),
        own_k: Sequence[Tensor] = (),
        own_v: Sequence[Tensor] = (),
    ) -> Tensor:
        """Attention of queries to what they see.

        Args:
            head: whose attention it is.
            q: ``[batch, heads, queries, head_dim]``.
            heads: which of the keys' heads they meet.
            own_k, own_v: per earlier step a key and a value of each query's own window, as of ``attend_with_own``.
        Returns:
            ``[batch, heads, queries, head_dim]``.
        """
        block = self.block(heads)
        k, v = self.k[block], self.v[block]
        q = q.to(k.dtype)
        scores = SCORES if q.device.type == "cpu" else GPU_SCORES
        by_scores = own_k and not fused(q, k)
        rows = scores // q[:, :, :1, :1].numel() if by_scores else MASK // len(q)
        part = max(1, rows // k.shape[2])  # queries
        if q.shape[2] <= part:
            return _attend_to(head, q, k, v, self.mask, tuple(own_k), tuple(own_v))
        parts = zip(
            q.split(part, 2), self.base.split(part, 1), *(x.split(part, 2) for x in (*own_k, *own_v)), strict=True
        )
        out = []
        for some, base, *own in parts:
            end = min(round_up(int(base.max()) + 1, ROUND), k.shape[2])  # no query of the part sees more
            seen = k[:, :, :end], v[:, :, :end]
            out.append(again(_attend_part, head, some, *seen, base, tuple(own[: len(own_k)]), tuple(own[len(own_k) :])))
        return torch.cat(out, 2)


def up_to(base: Tensor, k: Tensor) -> Tensor:
    """The additive mask ``[batch, 1, queries, n]`` of queries that see keys ``[batch, heads, n, head_dim]`` up to ``base``."""
    return additive(torch.arange(k.shape[2], device=k.device) <= base[..., None], k.dtype)[:, None]


def _attend_to(
    head: Layer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, own_k: Sequence[Tensor], own_v: Sequence[Tensor]
) -> Tensor:
    if own_k:
        return attend_with_own(q, k, v, mask, own_k, own_v)
    return head.attend(q, k, v, mask)


def _attend_part(
    head: Layer, q: Tensor, k: Tensor, v: Tensor, base: Tensor, own_k: tuple[Tensor, ...], own_v: tuple[Tensor, ...]
) -> Tensor:
    mask = up_to(base, k)
    if own_k and not fused(q, k):
        return attend_by_scores(q, k, v, mask, own_k, own_v)
    return _attend_to(head, q, k, v, mask, own_k, own_v)
