"""The two stages of each architecture, their loss, and the acceptance they are judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beagle.drafters.block import Block
from beagle.drafters.eagle3_head import Eagle3Head
from beagle.drafters.eagle_head import EagleHead
from beagle.drafters.head import BeagleHead
from beagle.targets.target import Target
from beagle.training import unrolled, windows
from beagle.training.config import TrainConfig
from beagle.training.data import Stored, collate
from beagle.training.losses import dpace_weights, regression, slot_losses, total
from beagle.training.windows import Batch, Part

LMHeadWeights = tuple[Tensor, Tensor | None]  # weight [draft_vocab, hidden], bias [draft_vocab]


@dataclass(frozen=True)
class Stages:
    """How one kind of head is trained.

    Attributes:
        early: one parallel pass, ``(head, batch, states, window, offset)`` -> part.
        late: simulated inference, ``(head, batch, states, window, offset, steps)`` -> a part a step.
        chains: as ``late``, exactly one chain of drafts from the base of each window, so that ``window`` offsets
            together start one from every slot.
    """

    early: Callable[[Any, Batch, Tensor, int, int], Part]
    late: Callable[[Any, Batch, Tensor, int, int, int], list[Part]]
    chains: Callable[[Any, Batch, Tensor, int, int, int], list[Part]]


STAGES: dict[type[Block], Stages] = {
    BeagleHead: Stages(windows.early, windows.late, windows.late),
    EagleHead: Stages(unrolled.single, unrolled.unrolled, unrolled.chains),
    Eagle3Head: Stages(unrolled.single, unrolled.unrolled, unrolled.chains),
}


def stage_loss(
    head: Block, batch: Batch, lm_head: LMHeadWeights, config: TrainConfig, *, stage: str, offset: int, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss of one batch (``config.loss`` plus regression) and without the regression."""
    keys_from = batch.states + config.noise * noise
    stages = STAGES[type(head)]
    window = config.stage_window(stage)
    if stage == "early":
        parts = [stages.early(head, batch, keys_from, window, offset)]
        shares = [1.0]
    else:
        parts = stages.late(head, batch, keys_from, window, offset, config.steps)
        shares = config.step_weights
    predicted, true, weights = [], [], []
    for share, (states, slots, real) in zip(shares, parts, strict=True):
        predicted.append(states[real])
        true.append(batch.pick(batch.top, slots + 1)[real])
        weights.append(torch.full((int(real.sum()),), share, device=states.device) / max(1, int(real.sum())))
    p, t, w = torch.cat(predicted), torch.cat(true), torch.cat(weights)
    dpace = config.dpace and stage == "late"
    values, acceptance = slot_losses(
        p, t, lm_head[0], torch.ones_like(w) if dpace else w, lm_head[1],
        loss=config.loss, cross_entropy_share=config.cross_entropy_share, measure=dpace,
    )  # fmt: skip
    if acceptance is not None:
        w = dpace_weights(acceptance, [real for *_, real in parts])
        values = values * w
    loss = total(values)
    if not config.regression:
        return loss, loss.detach()
    return loss + config.regression * regression(p, t, w), loss.detach()


@torch.no_grad()
def step_alpha(head: Block, target: Target, groups: list[list[Stored]], steps: int) -> tuple[list[float], list[int]]:
    """α_1 … α_steps of chain drafts from every slot of the validation samples, teacher-forced.

    α_j: share of j-th drafts that equal the target's greedy choice, given that the earlier ones did. Beside
    them, how many drafts each is a share of.
    """
    tried = torch.zeros(steps, dtype=torch.long)
    right = torch.zeros(steps, dtype=torch.long)
    for group in groups:
        for j, _, drafted, accepted in draft_chains(head, target, group, steps):
            tried[j] += int(drafted.sum())
            right[j] += int(accepted.sum())
    return (right / tried.clamp(min=1)).tolist(), tried.tolist()


@torch.no_grad()
def draft_chains(
    head: Block, target: Target, group: list[Stored], steps: int
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Chains of drafts from every slot of some samples, teacher-forced, a part of the slots at a time.

    Yields:
        Number of a draft in its chain, from 0; the slots ``[batch, chains]`` that it stands at; whether the chain has
        come that far, and whether this draft is the target's greedy choice, too (both bool, as the slots).
    """
    chains = STAGES[type(head)].chains
    whole, small = lm_head_rows(target), lm_head_rows(target, head.draft_vocab)
    batch = collate(group, target, target.columns(head.config.kv_layers))
    for offset in range(steps):
        alive: Tensor | None = None
        for j, (states, slots, real) in enumerate(chains(head, batch, batch.states, steps, offset, steps)):
            if alive is not None:
                real = real & alive
            draft = head.draft_vocab[F.linear(states[real], *small).argmax(-1)]
            truth = F.linear(batch.pick(batch.top, slots + 1)[real], *whole).argmax(-1)
            alive = torch.zeros_like(real)
            alive[real] = draft == truth
            yield j, slots, real, alive


def lm_head_rows(target: Target, index: Tensor | None = None) -> LMHeadWeights:
    """Weight and bias of the target's LM head for some tokens, in fp32."""
    weight, bias = target.head_rows(index)
    return weight.float(), None if bias is None else bias.float()
