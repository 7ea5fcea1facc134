"""Two-Stage Block-Attention Training: which slot sees what (paper §4.2, A.2, A.3).

In slots (see ``drafters.head``): a window of base b covers slots b … b+k-1; its true keys are those
of slots <= b. A batch brings ``first`` and ``last``, the slots of each row that bear a loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from beagle.drafters.head import BeagleHead

Part = tuple[Tensor, Tensor, Tensor]  # predicted states [batch, m, hidden], their slots [batch, m], which are real


@dataclass(frozen=True)
class Batch:
    """Padded samples.

    Attributes:
        embeddings: ``[batch, n, hidden]`` e(t_i), frozen.
        states: ``[batch, n, hidden]`` true states h_i.
        first: ``[batch]`` first slot that bears a loss (prompt length - 1).
        last: ``[batch]`` last such slot (tokens - 2: its output is compared with h_{last+1}).
    """

    embeddings: Tensor
    states: Tensor
    first: Tensor
    last: Tensor

    def pick(self, source: Tensor, index: Tensor) -> Tensor:
        """Rows of ``source [batch, n, hidden]`` at ``index [batch, m]``."""
        index = index.clamp(0, source.shape[1] - 1)
        return source.gather(1, index[..., None].expand(-1, -1, source.shape[-1]))


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Bool mask to additive."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


def bases(batch: Batch, window: int, offset: int) -> Tensor:
    """The first slots of all whole windows, ``[batch, windows]``; those beyond ``last`` are padding."""
    start = batch.first + (-offset) % window
    count = max(1, -(-int((batch.last - start).max() + 1) // window))
    return start[:, None] + torch.arange(count, device=start.device) * window


def early(head: BeagleHead, batch: Batch, keys_from: Tensor, window: int, offset: int) -> Part:
    """Inverse block attention: every slot of a window sees the true keys up to its base only.

    Args:
        keys_from: the (noised) states that keys, values and newest states come from.
        window: k. offset: ε in [0, k).
    Returns:
        Predicted states ``[batch, m, hidden]``, their slots ``[batch, m]``, and which of them are
        real, bool ``[batch, m]``.
    """
    n = batch.states.shape[1]
    m = int((batch.last - batch.first).max()) + 1
    steps = torch.arange(m, device=batch.states.device)
    slots = batch.first[:, None] + steps
    real = slots <= batch.last[:, None]
    base = (batch.first[:, None] + (steps + offset) // window * window - offset).clamp(min=0)
    everywhere = torch.arange(n, device=slots.device)
    k, v = head.keys_values(keys_from, head.rotation(everywhere[None], keys_from.dtype))
    embeddings = batch.pick(batch.embeddings, slots + 1)
    q = head.queries(embeddings, head.rotation(slots, embeddings.dtype))
    mask = additive(everywhere <= base[..., None], q.dtype)[:, None]
    attended = head.attend(q, k, v, mask)
    return head.finish(attended, embeddings, batch.pick(keys_from, base)), slots, real


def late(head: BeagleHead, batch: Batch, keys_from: Tensor, window: int, offset: int, steps: int) -> list[Part]:
    """Simulated inference, sliced: step i computes slot b+i-1 of each window only.

    It sees the true keys up to b and the i-1 states that earlier steps of its own window predicted;
    gradients flow through them. Memory is that of one ordinary pass for any number of steps.

    Returns:
        Per step: predicted states ``[batch, windows, hidden]``, slots, and which are real.
    """
    n = batch.states.shape[1]
    base = bases(batch, window, offset)
    everywhere = torch.arange(n, device=base.device)
    k, v = head.keys_values(keys_from, head.rotation(everywhere[None], keys_from.dtype))
    mask = additive(everywhere <= base[..., None], k.dtype)[:, None]  # [batch, 1, windows, n]
    newest = batch.pick(keys_from, base)
    own_k: list[Tensor] = []  # of each earlier step, [batch, kv_heads, windows, head_dim]
    own_v: list[Tensor] = []
    out: list[Part] = []
    for step in range(1, steps + 1):
        slots = base + step - 1
        real = slots <= batch.last[:, None]
        embeddings = batch.pick(batch.embeddings, slots + 1)
        rotation = head.rotation(slots, embeddings.dtype)
        q = head.queries(embeddings, rotation)
        if step > 1 and head.config.concat:
            key, value = head.keys_values(newest, rotation)  # the state predicted for this slot
            own_k.append(key)
            own_v.append(value)
        attended = attend_with_own(q, k, v, mask, own_k, own_v) if own_k else head.attend(q, k, v, mask)
        newest = head.finish(attended, embeddings, newest)
        out.append((newest, slots, real))
    return out


def attend_with_own(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, own_k: list[Tensor], own_v: list[Tensor]) -> Tensor:
    """Attention over shared true keys and, per query, the predicted keys of its own window.

    Args:
        q: ``[batch, heads, windows, head_dim]``. k, v: ``[batch, kv_heads, n, head_dim]``.
        own_k, own_v: per earlier step ``[batch, kv_heads, windows, head_dim]``.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    keys = torch.stack(own_k, 3).repeat_interleave(groups, 1)  # [batch, heads, windows, own, head_dim]
    values = torch.stack(own_v, 3).repeat_interleave(groups, 1)
    q = q * q.shape[-1] ** -0.5
    scores = torch.cat([q @ k.transpose(-1, -2) + mask, (q[..., None, :] * keys).sum(-1)], dim=-1)
    chances = F.softmax(scores.float(), dim=-1).to(v.dtype)
    n = k.shape[2]
    return chances[..., :n] @ v + (chances[..., n:, None] * values).sum(-2)
