"""What the paper tried and left out of its head and stages, and what we did: one head that has the switches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from beagle.drafters.block import BlockConfig, LevelView, register
from beagle.drafters.head import BeagleHead, HeadConfig
from beagle.training.own_keys import attend_with_own
from beagle.training.stages import STAGES, Stages
from beagle.training.windows import Batch, Part, additive, bases, early, seeing, span

CHOSEN = 2  # experts that answer for a position


@dataclass(frozen=True)
class AblatedConfig(HeadConfig):
    """A Beagle head's shape, and what is done otherwise.

    Attributes:
        newest_through_matrix: the newest state is added through a matrix in place of a scale.
        concat: False: predicted keys are never appended (paper A.4).
        experts: more than 0: so many MLPs in place of one, two of them at work.
        early_mask: ``blocks`` is inverse block attention; ``random`` the paper's ablation of it (Figure 7).
        late_loss: step i bears a loss on its immediate ``next`` token (l = i), or on all from there to the end of the
            ``window`` (l = k, Figure 12).
    """

    newest_through_matrix: bool = False
    concat: bool = True
    experts: int = 0
    early_mask: Literal["blocks", "random"] = "blocks"
    late_loss: Literal["next", "window"] = "next"


@register("beagle-ablated")
class AblatedHead(BeagleHead):
    """A Beagle head with something done otherwise."""

    config_class = AblatedConfig
    config: AblatedConfig

    def __init__(self, config: AblatedConfig) -> None:
        super().__init__(config)
        if config.experts:
            del self.gate_proj, self.up_proj, self.down_proj
            self.experts = Experts(config, config.experts, ACT2FN[config.hidden_act])
            self._initialise()
        if config.newest_through_matrix:
            del self.newest
            self.newest_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
            nn.init.eye_(self.newest_proj.weight)
            self.newest_proj.weight.data.mul_(0.5)

    def level(self, seen: LevelView, embeddings: Tensor, newest: Tensor) -> Tensor:
        if self.config.concat:
            return super().level(seen, embeddings, newest)
        return self.predict(seen.attend, seen.rotation(), embeddings, newest if seen.level > 1 else self.fuse(newest))

    def _from_newest(self, normed: Tensor) -> Tensor:
        if self.config.newest_through_matrix:
            through: Tensor = self.newest_proj(normed)
            return through
        return super()._from_newest(normed)

    def _feed_forward(self, y: Tensor, x: Tensor) -> Tensor:
        if self.config.experts:
            return y + self.experts(x, self._drop)
        return super()._feed_forward(y, x)


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


def early_stage(head: AblatedHead, batch: Batch, keys_from: Tensor, window: int, offset: int) -> Part:
    """The early stage with the head's mask; args and returns as ``training.windows.early``."""
    masked = early_random if head.config.early_mask == "random" else early
    return masked(head, batch, keys_from, window, offset)


def late_stage(head: AblatedHead, batch: Batch, keys_from: Tensor, window: int, offset: int, steps: int) -> list[Part]:
    """The late stage with the head's loss; args and returns as ``training.windows.late``."""
    simulate = late_window if head.config.late_loss == "window" else chains
    return simulate(head, batch, keys_from, window, offset, steps)


def early_random(head: BeagleHead, batch: Batch, keys_from: Tensor, window: int, offset: int) -> Part:
    """Each slot's newest keys are hidden at random, 0 to k-1 of them, so that distances to the newest visible key are
    those of ``early`` without its order.

    How the random masks were drawn the paper leaves open; this is our reading. Args and returns as ``early``.
    """
    slots = batch.first[:, None] + torch.arange(span(batch), device=batch.states.device)
    return seeing(head, batch, keys_from, slots - torch.randint(window, slots.shape, device=slots.device))


def late_window(head: BeagleHead, batch: Batch, keys_from: Tensor, window: int, offset: int, steps: int) -> list[Part]:
    """Step i computes all slots of the window from b+i-1 on; those before it would only repeat earlier steps.

    Returns:
        Per step: predicted states ``[batch, windows * (k-i+1), hidden]``, slots, and which are real.
    """
    return simulated(head, batch, keys_from, window, offset, [window - i for i in range(steps)])


def chains(head: BeagleHead, batch: Batch, keys_from: Tensor, window: int, offset: int, steps: int) -> list[Part]:
    """As ``training.windows.late``, with or without predicted keys."""
    return simulated(head, batch, keys_from, window, offset, [1] * steps)


def simulated(
    head: BeagleHead, batch: Batch, keys_from: Tensor, window: int, offset: int, reach: list[int]
) -> list[Part]:
    """The late stage; step i computes ``reach[i-1]`` slots of each window, the first being b+i-1."""
    n = batch.states.shape[1]
    concat = not isinstance(head, AblatedHead) or head.config.concat
    base = bases(batch, window, offset)
    everywhere = torch.arange(n, device=base.device)
    k, v = head.keys_values(keys_from, head.rotation(everywhere[None], keys_from.dtype))
    k, v = k.contiguous(), v.contiguous()  # a product with anything else copies it, and autograd keeps each copy
    mask = additive(everywhere <= base[..., None], k.dtype)[:, None]  # [batch, 1, windows, n]
    newest = batch.pick(keys_from, base)  # [batch, windows, hidden]
    own_k: list[Tensor] = []  # of each earlier step, [batch, kv_heads, windows, head_dim]
    own_v: list[Tensor] = []
    out: list[Part] = []
    for step, ahead in enumerate(reach, 1):
        slots = (base[..., None] + torch.arange(step - 1, step - 1 + ahead, device=base.device)).flatten(1)
        real = slots <= batch.last[:, None]
        embeddings = batch.pick(batch.embeddings, slots + 1)
        q = head.queries(embeddings, head.rotation(slots, embeddings.dtype))
        if step > 1 and concat:
            key, value = head.keys_values(newest, head.rotation(base + step - 1, newest.dtype))  # predicted for b+i-1
            own_k.append(key)
            own_v.append(value)
        whose = mask if ahead == 1 else mask.repeat_interleave(ahead, 2)
        if own_k:
            mine = ([x if ahead == 1 else x.repeat_interleave(ahead, 2) for x in own] for own in (own_k, own_v))
            attended = attend_with_own(q, k, v, whose, *mine)
        else:
            attended = head.attend(q, k, v, whose)
        predicted = head.finish(attended, embeddings, newest if ahead == 1 else newest.repeat_interleave(ahead, 1))
        newest = predicted[:, ::ahead]
        out.append((predicted, slots, real))
    return out


STAGES[AblatedHead] = Stages(early_stage, late_stage, chains)
