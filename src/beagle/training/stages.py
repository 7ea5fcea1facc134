"""The two stages of each architecture, their loss, and the acceptance they are judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beagle.drafters.block import Block
from beagle.drafters.eagle3_head import Eagle3Head
from beagle.drafters.eagle_head import EagleHead
from beagle.drafters.head import BeagleHead
from beagle.ranks import ALONE, Ranks
from beagle.targets.target import Target
from beagle.training import unrolled, windows
from beagle.training.answers import Sample
from beagle.training.config import TrainConfig
from beagle.training.data import collate
from beagle.training.losses import dpace_weights, regression, slot_losses, total
from beagle.training.windows import Batch, Part, slot_counts

Fill = Callable[
    [Sequence[Sample]], list[Sample]
]  # gives samples states that are neither stored nor the target's to make
LMHeadWeights = tuple[Tensor, Tensor | None]  # weight [draft_vocab, hidden], bias [draft_vocab]


@dataclass(frozen=True)
class Stages:
    """How one kind of head is trained.

    Attributes:
        early: one parallel pass, ``(head, batch, states, window, offset)`` -> part.
        late: simulated inference, ``(head, batch, states, window, offset, steps)`` -> a part a step.
        chains: as ``late``, exactly one chain of drafts from the base of each window, so that ``window`` offsets
            together start one from every slot.
        unrolled: whether a chain of ``late`` starts from every slot, whatever the window; None: neither that nor from
            the base of each window, so that its batches can't be computed in parts.
    """

    early: Callable[[Any, Batch, Tensor, int, int], Part]
    late: Callable[[Any, Batch, Tensor, int, int, int], list[Part]]
    chains: Callable[[Any, Batch, Tensor, int, int, int], list[Part]]
    unrolled: bool | None = None


STAGES: dict[type[Block], Stages] = {
    BeagleHead: Stages(windows.early, windows.late, windows.late, unrolled=False),
    EagleHead: Stages(unrolled.single, unrolled.unrolled, unrolled.chains, unrolled=True),
    Eagle3Head: Stages(unrolled.single, unrolled.unrolled, unrolled.chains, unrolled=True),
}


def stage_loss(
    head: Block, batch: Batch, lm_head: LMHeadWeights, config: TrainConfig, *, stage: str, offset: int, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss of one batch (``config.loss`` plus regression) and without the regression."""
    loss, shown, _ = part_loss(head, batch, lm_head, config, stage=stage, offset=offset, noise=noise)
    return loss, shown


def part_loss(
    head: Block,
    batch: Batch,
    lm_head: LMHeadWeights,
    config: TrainConfig,
    *,
    stage: str,
    offset: int,
    noise: Tensor,
    counts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a part of a batch adds to the loss of all of it.

    Args:
        counts: of the whole batch, see ``count_slots``; None: this is all of it.
    Returns:
        The loss, the same without the regression, and the sum of the weights of slots. By the last, summed over all
        parts, those of D-PACE are to be divided; others are normalised by the counts.
    """
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
    whole = counts is None
    counts = [int(real.sum()) for *_, real in parts] if counts is None else counts
    for share, count, (states, slots, real) in zip(shares, counts, parts, strict=True):
        predicted.append(states[real])
        true.append(batch.pick(batch.top, slots + 1)[real])
        weights.append(torch.full((len(predicted[-1]),), share, device=states.device) / max(1, count))
    p, t, w = torch.cat(predicted), torch.cat(true), torch.cat(weights)
    dpace = config.dpace and stage == "late"
    values, acceptance = slot_losses(
        p, t, lm_head[0], torch.ones_like(w) if dpace else w, lm_head[1],
        loss=config.loss, cross_entropy_share=config.cross_entropy_share, measure=dpace,
    )  # fmt: skip
    if acceptance is not None:
        w = dpace_weights(acceptance, [real for *_, real in parts], normalise=whole)
        values = values * w
    loss = total(values)
    if not config.regression:
        return loss, loss.detach(), w.sum()
    return loss + config.regression * regression(p, t, w), loss.detach(), w.sum()


def count_slots(head: Block, first: Tensor, last: Tensor, config: TrainConfig, *, stage: str, offset: int) -> list[int]:
    """Slots of a whole batch that bear a loss, in each step of a stage; arguments as of ``Batch`` and ``stage_loss``."""
    if stage == "early":
        return slot_counts(first, last, 1, 0, 1)
    chains = (1, 0) if STAGES[type(head)].unrolled else (config.window, offset)
    return slot_counts(first, last, *chains, config.steps)


@torch.no_grad()
def step_alpha(
    head: Block, target: Target, groups: list[list[Sample]], steps: int, ranks: Ranks = ALONE, fill: Fill = list
) -> tuple[list[float], list[int]]:
    """α_1 … α_steps of chain drafts from every slot of the validation samples, teacher-forced.

    α_j: share of j-th drafts that equal the target's greedy choice, given that the earlier ones did. Beside
    them, how many drafts each is a share of. Each of some ranks takes its share of the groups. ``fill`` as of ``Gradients``.
    """
    tried = torch.zeros(steps, dtype=torch.long)
    right = torch.zeros(steps, dtype=torch.long)
    for group in groups[ranks.every()]:
        for j, _, drafted, accepted in draft_chains(head, target, fill(group), steps):
            tried[j] += int(drafted.sum())
            right[j] += int(accepted.sum())
    ranks.sum([right, tried])
    return (right / tried.clamp(min=1)).tolist(), tried.tolist()


@torch.no_grad()
def draft_chains(
    head: Block, target: Target, group: list[Sample], steps: int
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
