"""Two-Stage Block-Attention Training: which slot sees what (paper §4.2, A.2, A.3).

In slots (see ``drafters.head``): a window of base b covers slots b … b+k-1; its true keys are those
of slots <= b. A batch brings ``first`` and ``last``, the slots of each sample that bear a loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from beagle.drafters.head import BeagleHead

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
    mask = additive(everywhere <= base[..., None], k.dtype)[:, None]

    def attend(q: Tensor, heads: slice) -> Tensor:
        return head.attend(q, k[:, heads], v[:, heads], mask)

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
    k, v = k.contiguous(), v.contiguous()  # a product with anything else copies it, and autograd keeps each copy
    mask = additive(everywhere <= base[..., None], k.dtype)[:, None]  # [batch, 1, windows, n]
    newest = batch.pick(keys_from, base)  # [batch, windows, hidden]
    own_k: list[Tensor] = []  # of each earlier step, [batch, cached_heads, windows, head_dim]
    own_v: list[Tensor] = []
    out: list[Part] = []

    def attend(q: Tensor, heads: slice) -> Tensor:
        if not own_k:
            return head.attend(q, k[:, heads], v[:, heads], mask)
        own = ([x[:, heads] for x in of] for of in (own_k, own_v))
        return attend_with_own(q, k[:, heads], v[:, heads], mask, *own)

    for step in range(1, steps + 1):
        slots = base + step - 1
        embeddings = batch.pick(batch.embeddings, slots + 1)
        rotation = head.rotation(slots, embeddings.dtype)
        if step > 1:
            key, value = head.keys_values(newest, rotation)  # of the state predicted for this slot
            own_k.append(key)
            own_v.append(value)
        newest = head.predict(attend, rotation, embeddings, newest)
        out.append((newest, slots, slots <= batch.last[:, None]))
    return out


def attend_with_own(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, own_k: list[Tensor], own_v: list[Tensor]) -> Tensor:
    """Attention over shared true keys and, per query, the predicted keys of its own window.

    As in a fused kernel, the scores of all keys are computed anew in the backward pass and not kept for it.

    Args:
        q: ``[batch, heads, windows, head_dim]``. k, v: ``[batch, kv_heads, n, head_dim]``.
        mask: additive, ``[batch, 1, windows, n]``.
        own_k, own_v: per earlier step ``[batch, kv_heads, windows, head_dim]``.
    Returns:
        ``[batch, heads, windows, head_dim]``.
    """
    own = tuple(own_k), tuple(own_v)  # the caller's lists grow before the backward pass
    out: Tensor = checkpoint(_attend, q, k, v, mask, *own, use_reentrant=False, preserve_rng_state=False)
    return out


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, own_k: tuple[Tensor, ...], own_v: tuple[Tensor, ...]
) -> Tensor:
    """Own keys are taken one by one: a stack of them would be as large as all keys of the windows together."""
    if (groups := q.shape[1] // k.shape[1]) > 1:
        k, v, *own = (x.repeat_interleave(groups, 1) for x in (k, v, *own_k, *own_v))
        own_k, own_v = tuple(own[: len(own_k)]), tuple(own[len(own_k) :])
    q = q * q.shape[-1] ** -0.5
    scores = torch.stack([(q * key).sum(-1) for key in own_k], dim=-1)
    scores = torch.cat([q @ k.transpose(-1, -2) + mask, scores], dim=-1)
    probs = F.softmax(scores.float(), dim=-1).to(v.dtype)
    n = k.shape[2]
    out = probs[..., :n] @ v
    for i, value in enumerate(own_v, n):
        out = out + probs[..., i, None] * value
    return out
