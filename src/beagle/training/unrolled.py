"""Training of EAGLE's heads: feature-level single step, and unrolled (HASS, EAGLE-3's training-time test).

In slots (see ``drafters.eagle_head``): a chain of drafts from base b has true features up to slot b;
its step j stands at slot b+j-1 with a feature of the state that step j-1 predicted for that slot. So
step j's query of slot i sees true features up to slot i-j+1 and behind them those of the last j-1
slots as steps 2 … j of the same chain made them, the last being its own.

Every slot starts a chain, and every step needs queries, keys and logits of all of them: unlike the
sliced late stage of ``training.windows``, time and peak memory grow with the number of steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from beagle.drafters.eagle_head import FeatureHead
from beagle.training.windows import Batch, Part, TrueKeys, bases


def single(head: FeatureHead, batch: Batch, keys_from: Tensor, window: int, offset: int) -> Part:
    """EAGLE's own training: teacher-forced (noised) hidden states, all slots in one causal pass.

    Args and returns as ``windows.early``; there are no windows here.
    """
    return chains(head, batch, keys_from, 1, 0, 1)[0]


def unrolled(head: FeatureHead, batch: Batch, keys_from: Tensor, window: int, offset: int, steps: int) -> list[Part]:
    """A chain of ``steps`` drafts from every slot, gradients through the predicted states (HASS).

    Args and returns as ``windows.late``; every slot is the base of a window.
    """
    return chains(head, batch, keys_from, 1, 0, steps)


def chains(head: FeatureHead, batch: Batch, keys_from: Tensor, window: int, offset: int, steps: int) -> list[Part]:
    """Simulated inference from each base.

    Args:
        keys_from: the (noised) states ``[batch, n, state_size]`` that true features come from.
        window: distance of bases.
        offset: of the first base, in [0, window).
    Returns:
        Per step: predicted states ``[batch, bases, hidden]``, slots, and which are real.
    """
    base = bases(batch, window, offset)
    true = head.features(batch.embeddings[:, 1:], head.fuse(keys_from[:, :-1]))  # the last slot's next token is unknown
    everywhere = torch.arange(true.shape[1], device=base.device)
    k, v = head.keys_values(true, head.rotation(everywhere[None], true.dtype))
    keys = TrueKeys(k, v, base, head.config.num_kv_heads)
    features = batch.pick(true, base)
    own_k: list[Tensor] = []  # of each step but the first, [batch, kv_heads, bases, head_dim]
    own_v: list[Tensor] = []
    out: list[Part] = []
    for step in range(1, steps + 1):
        slots = base + step - 1
        rotation = head.rotation(slots, features.dtype)
        if step > 1:
            features = head.features(batch.pick(batch.embeddings, slots + 1), out[-1][0])
            key, value = head.keys_values(features, rotation)
            own_k.append(key)
            own_v.append(value)
        q = head.queries(features, rotation)
        attended = keys.attend(head, q, own_k=own_k, own_v=own_v)
        out.append((head.finish(attended, features), slots, slots <= batch.last[:, None]))
    return out
